"""Promise: any B, P, k >= 0."""

from __future__ import annotations

import pytest
import torch

import trak_ext


@pytest.mark.parametrize("kind", ["rademacher", "normal"])
@pytest.mark.parametrize("shape", [(0, 5, 4), (3, 0, 4), (3, 5, 0), (0, 0, 0), (1, 1, 1)])
def test_project(kind, shape):
    rows, params, proj_dim = shape
    got = trak_ext.project(torch.ones(rows, params), proj_dim, kind=kind)
    assert got.shape == (rows, proj_dim)
    if params == 0:
        assert (got == 0).all()
    mapping = trak_ext.project({"a": torch.ones(rows, params, 1)}, proj_dim, kind=kind)
    assert torch.equal(mapping, got)
    out = torch.ones(rows, proj_dim)
    trak_ext.project(torch.ones(rows, params), proj_dim, kind=kind, out=out)
    assert torch.equal(out, got + 1)


def test_projection_matrix():
    assert trak_ext.projection_matrix(0, 5).shape == (0, 5)
    assert trak_ext.projection_matrix(5, 0).shape == (5, 0)


def test_score_without_samples_or_targets():
    features = torch.randn(2, 6, 4)
    assert trak_ext.score(features[:, :0], features).shape == (0, 6)
    assert trak_ext.score(features, features[:, :0]).shape == (6, 0)
    assert trak_ext.kernel_matrix(features[:, :0]).tolist() == torch.zeros(2, 4, 4).tolist()
    best = trak_ext.top_k(features[:, :0], features, 0)
    assert best.values.shape == best.indices.shape == (6, 0)
    assert trak_ext.top_k(features, features[:, :0], 3).values.shape == (0, 3)
