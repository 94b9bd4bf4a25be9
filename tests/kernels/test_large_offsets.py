"""Promise: 64-bit indices throughout; P beyond 2**32 is testable with tiny tensors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import trak_ext
from trak_ext import reference

OFFSETS = [2**31 - 5, 2**32 - 5, 2**34 - 5, 2**39 - 5, 2**40, 2**40 + 77, 2**62]


@pytest.mark.parametrize("kind", ["rademacher", "normal"])
@pytest.mark.parametrize("offset", OFFSETS)
def test_project_far_down_the_matrix(kind, offset):
    grads = torch.randint(-4, 5, (3, 300)).float()
    got = trak_ext.project(grads, 33, kind=kind, param_offset=offset)
    exact = reference.project(grads.numpy(), 33, kind=kind, param_offset=offset)
    np.testing.assert_allclose(got.numpy(), exact, rtol=0, atol=1e-3)


def test_far_rows_are_not_near_rows_again():
    rows = [trak_ext.projection_matrix(128, 64, param_offset=o) for o in (0, 2**32, 2**39, 2**40)]
    for i in range(4):
        for j in range(i):
            agreement = (rows[i] == rows[j]).float().mean()
            assert abs(float(agreement) - 0.5) < 5 * 0.5 / (128 * 64) ** 0.5


@pytest.mark.parametrize(
    ("shape", "strides"), [((2, 64), (2**31, 1)), ((1, 2), (1, 2**31)), ((2, 2), (64, 2**31))]
)
def test_strides_beyond_two_to_the_31_elements(tmp_path, shape, strides):
    # A sparse file: 4 GiB to look at, a few pages on disk.
    path = tmp_path / "sparse"
    with open(path, "wb") as file:
        file.truncate(2 * (2**31 + 4096))
    far = torch.from_file(str(path), shared=True, size=2**31 + 4096, dtype=torch.float16)
    grads = far.as_strided(shape, strides)
    grads.copy_(torch.randint(-9, 10, shape))
    expected = trak_ext.project(grads.clone(), 20)
    assert torch.equal(trak_ext.project(grads, 20), expected)
    assert expected.any()
