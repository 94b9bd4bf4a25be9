"""Promise: a row's bits do not depend on its batch, threads, strides or a repeat."""

from __future__ import annotations

import pytest
import torch

import trak_ext

# Every way of computing that a caller can ask for.
WAYS = [
    {"kind": "rademacher"},
    {"kind": "rademacher", "precision": "medium"},
    {"kind": "normal"},
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_batch(way, dtype):
    grads = torch.randn(131, 1000).to(dtype)
    whole = trak_ext.project(grads, 45, **way, param_offset=7)
    for rows in (1, 2, 3, 5, 8, 12, 13, 31, 64, 65):
        for start in (0, 66):
            part = trak_ext.project(grads[start : start + rows], 45, **way, param_offset=7)
            assert torch.equal(part, whole[start : start + rows])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", [(1, 20000, 700), (70, 3000, 513), (5, 100000, 40)])
def test_threads(way, shape):
    rows, params, proj_dim = shape
    grads = torch.randn(rows, params)
    results = []
    for threads in (1, 2, 3, 7):
        trak_ext.set_num_threads(threads)
        results.append(trak_ext.project(grads, proj_dim, **way))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("way", WAYS)
def test_columns(way):
    # The first columns of a wider projection are the narrower one.
    grads = torch.randn(9, 5000)
    wide = trak_ext.project(grads, 700, **way)
    for proj_dim in (1, 31, 32, 33, 512, 513):
        assert torch.equal(trak_ext.project(grads, proj_dim, **way), wide[:, :proj_dim])


@pytest.mark.parametrize("way", WAYS)
def test_strides_and_alignment(way):
    grads = torch.randn(10, 999)
    plain = trak_ext.project(grads, 64, **way)
    shifted = torch.empty(10 * 999 + 1)[1:].view(10, 999).copy_(grads)
    for same in (grads.T.contiguous().T, torch.stack([grads, grads], 2)[:, :, 1], shifted):
        assert torch.equal(trak_ext.project(same, 64, **way), plain)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_poison_stays_in_its_row(way, poison):
    grads = torch.randn(20, 2000)
    clean = trak_ext.project(grads, 50, **way)
    grads[13, 777] = poison
    got = trak_ext.project(grads, 50, **way)
    others = [i for i in range(20) if i != 13]
    assert torch.equal(got[others], clean[others])
    assert not torch.isfinite(got[13]).any()


def test_repeat():
    grads = torch.randn(33, 10000)
    first = trak_ext.project(grads, 300)
    assert all(torch.equal(trak_ext.project(grads, 300), first) for _ in range(5))
