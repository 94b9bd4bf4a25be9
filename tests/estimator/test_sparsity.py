"""Soft-thresholding against its formula, entry by entry."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trak_ext import soft_threshold


@given(
    rows=st.lists(st.lists(st.floats(-4, 4, width=32), min_size=3, max_size=3), min_size=1),
    threshold=st.floats(0, 5, width=32),
)
@settings(deadline=None, max_examples=60)
def test_equals_the_formula(rows, threshold):
    got = soft_threshold(torch.tensor(rows), threshold)
    for found, given_row in zip(got.tolist(), rows, strict=True):
        for value, score in zip(found, given_row, strict=True):
            expected = math.copysign(max(abs(score) - threshold, 0), score)
            assert value == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_threshold_for_each_target(dtype):
    scores = torch.tensor([[3.0, -3.0], [-1.0, 1.0]], dtype=dtype)
    got = soft_threshold(scores, torch.tensor([0.5, 2.0]))
    assert got.dtype == dtype
    assert got.tolist() == [[2.5, -1.0], [-0.5, 0.0]]


@pytest.mark.parametrize("keep", [0, 1, 5, 20])
def test_keep_leaves_that_many_apart_from_zero(keep):
    scores = torch.randn(20, 7, generator=torch.Generator().manual_seed(0))
    got = soft_threshold(scores, keep=keep)
    assert ((got != 0).sum(0) == keep).all()
    largest = scores.abs().topk(keep, 0).indices
    assert set(map(tuple, largest.T.sort().values.tolist())) == set(
        map(tuple, got.abs().topk(keep, 0).indices.T.sort().values.tolist())
    )
    assert torch.equal(got.sign() * (got != 0), scores.sign() * (got != 0))


def test_keep_with_ties_leaves_at_most_that_many():
    assert soft_threshold(torch.ones(4, 1), keep=2).tolist() == [[0.0]] * 4


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({}, r"^threshold: expected either threshold or keep, got neither$"),
        ({"threshold": 1.0, "keep": 1}, r"^threshold: expected either .*, got both$"),
        ({"threshold": -1.0}, r"^threshold: expected a finite number that is at least 0"),
        ({"threshold": torch.tensor([1.0, -1.0])}, r"^threshold: expected numbers of at least 0"),
        ({"threshold": torch.ones(3)}, r"^threshold: "),
        ({"keep": 5}, r"^keep: expected an integer from 0 to 4, got 5$"),
    ],
)
def test_bad_arguments(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        soft_threshold(torch.ones(4, 2), **arguments)
