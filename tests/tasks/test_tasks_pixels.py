"""Segmentation: sums over pixels and single pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from trak_ext.gradients import GradientComputer
from trak_ext.inputs.batches import split_ids
from trak_ext.tasks import TASKS, classification_output, pixel_targets


def setting(count=2):
    images, labels = torch.randn(count, 3, 4, 5), torch.randint(0, 4, (count, 4, 5))
    labels[0, 1, 2:] = -100
    return nn.Conv2d(3, 4, 3, padding=1), images, labels


def test_sums_and_means_over_pixels():
    model, images, labels = setting()
    f, q, r = TASKS["pixel_classification"](model, (images, labels))
    logits = model(images).detach().permute(0, 2, 3, 1)
    for i in range(2):
        kept = labels[i] != -100
        each = classification_output(logits[i][kept], labels[i][kept])
        torch.testing.assert_close(f[i].detach(), each.output.sum())
        torch.testing.assert_close(q[i], each.weight.mean())
        torch.testing.assert_close(r[i], each.curvature.mean())


def test_single_pixels_add_up_to_the_whole():
    model, images, labels = setting()
    each, sample = pixel_targets((images, labels))
    assert sample.bincount().tolist() == [17, 20]
    (pixels,) = GradientComputer(model, TASKS["pixel"])({}, each)
    (whole,) = GradientComputer(model, TASKS["pixel_classification"])({}, (images, labels))
    for name, grad in whole.grads.items():
        added = torch.zeros_like(grad).index_add(0, sample, pixels.grads[name])
        torch.testing.assert_close(added, grad, rtol=1e-4, atol=1e-4)


def test_one_pixel():
    model, images, labels = setting()
    position = torch.tensor([13, 4])  # rows 2 and 0, columns 3 and 4
    given = {"input": images, "labels": labels, "target_position": position}
    f, q, _ = TASKS["pixel"](model, given)
    logits = model(images)
    rows = torch.stack([logits[0, :, 2, 3], logits[1, :, 0, 4]])
    expected = classification_output(rows, torch.stack([labels[0, 2, 3], labels[1, 0, 4]]))
    torch.testing.assert_close(f, expected.output)
    torch.testing.assert_close(q, expected.weight.detach())
    for nowhere in (-1, 20, 7):  # 7 is ignored
        given["target_position"] = torch.tensor([nowhere, 4])
        assert TASKS["pixel"](model, given).output.isnan().tolist() == [True, False]


def test_models_of_torchvision_return_a_mapping():
    model, images, labels = setting()
    wrapped = TASKS["pixel_classification"](lambda x: {"out": model(x)}, (images, labels))
    plain = TASKS["pixel_classification"](model, (images, labels))
    assert torch.equal(wrapped.output, plain.output)


def test_logits_of_another_size_are_refused():
    model, images, labels = setting()
    with pytest.raises(ValueError, match=r"^model: expected logits \[B, C, ...\]"):
        TASKS["pixel_classification"](model, (images[:, :, :2], labels))


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_ids_are_repeated_with_their_samples(kind):
    _, images, labels = setting()
    ids = [7, 3] if kind is torch.tensor else ["a", "b"]
    batch = {"input": images, "labels": labels, "sample_id": kind(ids)}
    each, sample = pixel_targets(batch)
    rest, found = split_ids(each)
    assert found == [ids[i] for i in sample.tolist()]
    assert torch.equal(rest["input"], images[sample])
