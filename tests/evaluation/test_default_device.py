"""Measures and demo data are the same under another default device, on which nothing has values."""

from __future__ import annotations

import pytest
import torch

from trak_ext import evaluation
from trak_ext.demo import digits
from trak_ext.evaluation import flip_labels, mislabel_auc

N, T, M = 12, 3, 20


def tensors():
    g = torch.Generator().manual_seed(0)
    scores, other = torch.randn(2, N, T, generator=g)
    masks = torch.rand(M, N, generator=g) < 0.5
    return scores, other, masks, torch.randn(M, T, generator=g), torch.randn(N, T, generator=g)


SCORES, OTHER, MASKS, OUTPUTS, CHANGES = tensors()


def retrain(masks, seeds):
    return masks.double() @ SCORES.double()


def retrain_classes(masks, seeds):
    return (retrain(masks, seeds) > 0).long()


MEASURES = {
    "lds": lambda: evaluation.lds(SCORES, MASKS, OUTPUTS),
    "lds_difference": lambda: evaluation.lds_difference(SCORES, OTHER, MASKS, OUTPUTS),
    "brittleness": lambda: evaluation.counterfactual_brittleness(
        SCORES, retrain_classes, counts=(2, 5)
    ),
    "leave_one_out": lambda: evaluation.leave_one_out_correlation(SCORES, CHANGES),
    "leave_one_out_changes": lambda: evaluation.leave_one_out_changes(retrain, N),
    "mislabel_auc": lambda: mislabel_auc(SCORES[:, 0], MASKS[0]),
    "flip_labels": lambda: flip_labels(torch.ones(N, device="cpu").long(), num_classes=3, share=1),
    "subset_masks": lambda: digits.subset_masks(4, 10),
    "load_digits_split": lambda: digits.load_digits_split(50, 20),
}


def parts(result):
    if isinstance(result, (tuple, list)):
        return [part for value in result for part in parts(value)]
    return [result]


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
def test_the_default_device_does_not_matter(measure):
    if measure is MEASURES["load_digits_split"]:
        pytest.importorskip("sklearn")
    expected = parts(measure())
    torch.set_default_device("meta")
    try:
        found = parts(measure())
    finally:
        torch.set_default_device(None)
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b) if isinstance(b, torch.Tensor) else a == b
