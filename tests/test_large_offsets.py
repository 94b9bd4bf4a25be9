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


def test_strides_beyond_two_to_the_31_elements():
    # One row that repeats a tiny buffer: rows 2**31 elements apart would need 8 GiB; a stride of 0
    # in parameters reaches the same arithmetic without the memory.
    grads = torch.ones(1, 1).expand(2, 2**20)
    got = trak_ext.project(grads, 4)
    matrix = trak_ext.projection_matrix(2**20, 4)
    assert torch.equal(got, matrix.sum(0, dtype=torch.float64).float().expand(2, 4))
