"""Binary and multi-label heads against autograd and against each other."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from trak_ext.tasks import TASKS, binary_output, classification_output, multilabel_output


@pytest.mark.parametrize("shape", [(6,), (6, 1)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.bool, torch.uint8])
def test_binary_against_binary_cross_entropy(shape, dtype):
    logits = 3 * torch.randn(shape, dtype=torch.float64)
    labels = torch.tensor([0, 1, 1, 0, 1, 0])
    f, q, r = TASKS["binary_classification"](lambda x: x, (logits, labels.to(dtype)))
    p = logits.reshape(-1).sigmoid()
    p = torch.where(labels == 1, p, 1 - p)
    torch.testing.assert_close(f, (p / (1 - p)).log())
    loss = F.binary_cross_entropy_with_logits(logits.reshape(-1), labels.double(), reduction="none")
    torch.testing.assert_close(loss, F.softplus(-f))
    at = f.clone().requires_grad_()
    (first,) = torch.autograd.grad(F.softplus(-at).sum(), at, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), at)
    torch.testing.assert_close(q, -first.detach())
    torch.testing.assert_close(r, second)


def test_binary_is_two_classes_with_one_logit_at_zero():
    logits, labels = torch.randn(7), torch.randint(0, 2, (7,))
    both = torch.stack([torch.zeros(7), logits], 1)
    for part, expected in zip(
        binary_output(logits, labels), classification_output(both, labels), strict=True
    ):
        torch.testing.assert_close(part, expected)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_multilabel_is_a_sum_of_binary_ones(dtype):
    logits, labels = torch.randn(4, 5), torch.randint(0, 2, (4, 5)).to(dtype)
    f, q, r = TASKS["multilabel_classification"](lambda x: x, {"x": logits, "labels": labels})
    for i in range(4):
        one = binary_output(logits[i], labels[i])
        torch.testing.assert_close(f[i], one.output.sum())
        torch.testing.assert_close(q[i], one.weight.mean())
        torch.testing.assert_close(r[i], one.curvature.mean())


def test_multilabel_q_is_the_derivative_along_equal_moves():
    # With all signed logits moved alike, df = L dt and the sum of losses moves by -sum(1-p) dt.
    logits, labels = torch.randn(1, 5, dtype=torch.float64), torch.randint(0, 2, (1, 5))
    sign = 2.0 * labels - 1
    t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    loss = F.binary_cross_entropy_with_logits(logits + sign * t, labels.double(), reduction="sum")
    (slope,) = torch.autograd.grad(loss, t)
    torch.testing.assert_close(multilabel_output(logits, labels).weight[0], -slope / 5)


def test_labels_that_are_left_out():
    logits = torch.randn(2, 3)
    labels = torch.tensor([[1, -100, 0], [-100, -100, -100]])
    f, q, _ = multilabel_output(logits, labels)
    kept = multilabel_output(logits[:1, [0, 2]], labels[:1, [0, 2]])
    torch.testing.assert_close(f[0], kept.output[0])
    torch.testing.assert_close(q[0], kept.weight[0])
    assert f[1].isnan()


@pytest.mark.parametrize("label", [2, -1, 0.5])
def test_labels_that_are_neither_are_not_numbers(label):
    labels = torch.tensor([1, label])
    assert binary_output(torch.randn(2), labels).output.isnan().tolist() == [False, True]
    two = multilabel_output(torch.randn(2, 2), torch.stack([torch.ones(2), labels]))
    assert two.output.isnan().tolist() == [False, True]


@pytest.mark.parametrize(
    ("task", "shape", "labels"),
    [
        ("binary_classification", (3, 2), (3,)),
        ("binary_classification", (3,), (3, 2)),
        ("multilabel_classification", (3,), (3,)),
        ("multilabel_classification", (3, 4), (3, 5)),
    ],
)
def test_shapes_that_do_not_fit(task, shape, labels):
    with pytest.raises(ValueError, match=r"^model: expected .*logit"):
        TASKS[task](lambda x: x, (torch.zeros(shape), torch.zeros(labels)))
