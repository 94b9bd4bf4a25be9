"""f, Q and R of the tasks against derivatives of the loss taken by autograd."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from trak_ext.tasks import TASKS, ModelOutput, Task, classification_output, get_task


def derivatives(loss, at):
    """First and second derivative of an elementwise loss by autograd."""
    at = at.detach().clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(at).sum(), at, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), at)
    return first.detach(), second


@given(
    batch=st.integers(1, 6),
    classes=st.integers(2, 9),
    scale=st.sampled_from([0.1, 1.0, 5.0]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=30, deadline=None)
def test_classification_against_cross_entropy(batch, classes, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(batch, classes, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, classes, (batch,), generator=generator)
    f, q, r = classification_output(logits, labels)
    p = logits.softmax(1).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(f, (p / (1 - p)).log(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(F.cross_entropy(logits, labels, reduction="none"), F.softplus(-f))

    # With the other logits held still df = d logit_y, so these are the derivatives by f.
    def loss(own):
        moved = logits.scatter(1, labels[:, None], own[:, None])
        return F.cross_entropy(moved, labels, reduction="none")

    first, second = derivatives(loss, logits.gather(1, labels[:, None])[:, 0])
    torch.testing.assert_close(q, -first, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(r, second, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", [(5,), (5, 1)])
@pytest.mark.parametrize("integers", [False, True])
def test_regression_against_half_the_squared_error(shape, integers):
    prediction = torch.randn(shape, dtype=torch.float64)
    labels = torch.arange(5) if integers else torch.randn(5, dtype=torch.float64)
    f, q, r = TASKS["regression"](lambda x: x, (prediction, labels))
    assert torch.equal(f, prediction.reshape(-1))
    first, second = derivatives(lambda at: (at - labels) ** 2 / 2, f)
    assert torch.equal(q, -first)
    assert torch.equal(r, second)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_regression_does_not_round_labels_to_the_prediction(dtype):
    labels = torch.tensor([1000.3, -0.123456])
    _, q, _ = TASKS["regression"](lambda x: x, (torch.tensor([1000.0, 0.0], dtype=dtype), labels))
    torch.testing.assert_close(q.float(), torch.tensor([0.3, -0.123456]), rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [80.0, 1e4, 1e30])
def test_large_logits_are_stable(size, dtype):
    logits = torch.tensor([[size, 0.0, -size]] * 3, dtype=dtype, requires_grad=True)
    f, q, r = classification_output(logits, torch.tensor([0, 1, 2]))
    torch.testing.assert_close(f, torch.tensor([size, -size, -2 * size], dtype=dtype))
    assert q.isfinite().all()
    torch.testing.assert_close(q, torch.tensor([0.0, 1.0, 1.0], dtype=dtype), atol=1e-30, rtol=1e-6)
    assert (r <= 1e-30).all()
    (gradient,) = torch.autograd.grad(f.sum(), logits)
    expected = torch.tensor([[1.0, -1, 0], [-1, 1, 0], [-1, 0, 1]], dtype=dtype)
    torch.testing.assert_close(gradient, expected)


def test_confident_p_keeps_its_small_q():
    # 1 - p is 4e-18: below the spacing of fp64 at 1, yet Q must not be zero.
    logits = torch.tensor([[40.0, 0.0]], dtype=torch.float64)
    output = classification_output(logits, torch.tensor([0]))
    expected = torch.exp(torch.tensor([-40.0], dtype=torch.float64))
    torch.testing.assert_close(output.weight, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(output.curvature, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_worked_on_in_fp32(dtype):
    logits = torch.randn(4, 5).to(dtype)
    labels = torch.tensor([0, 1, 2, 4])
    for part, expected in zip(
        classification_output(logits, labels),
        classification_output(logits.float(), labels),
        strict=True,
    ):
        assert part.dtype == torch.float32
        assert torch.equal(part, expected)


@pytest.mark.parametrize("label", [-100, -1, 3])
def test_a_label_of_no_class_is_not_a_number(label):
    f = classification_output(torch.randn(2, 3), torch.tensor([1, label])).output
    assert f.isfinite().tolist() == [True, False]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_labels_of_any_integer_dtype(dtype):
    logits, labels = torch.randn(3, 4), torch.tensor([3, 0, 2])
    expected = classification_output(logits, labels).output
    assert torch.equal(classification_output(logits, labels.to(dtype)).output, expected)


@pytest.mark.parametrize("task", ["image_classification", "text_classification"])
@pytest.mark.parametrize("key", ["labels", "label"])
def test_mappings_are_keyword_arguments_and_logits_are_found(task, key):
    table = torch.randn(7, 3)

    def model(input_ids, attention_mask):
        hidden = table[input_ids] * attention_mask[:, :, None]
        return SimpleNamespace(loss=None, logits=hidden.sum(1))

    ids, mask = torch.randint(0, 7, (4, 5)), torch.randint(0, 2, (4, 5))
    labels = torch.tensor([0, 2, 1, 1])
    batch = {"attention_mask": mask, key: labels, "input_ids": ids}
    got = get_task(task)(model, batch)
    logits = (table[ids] * mask[:, :, None]).sum(1)
    for part, expected in zip(got, classification_output(logits, labels), strict=True):
        assert torch.equal(part, expected)


def test_regression_of_mappings_and_logits():
    x, y = torch.randn(4, 2), torch.randn(4)
    model = nn.Linear(2, 1)
    got = TASKS["regression"](lambda x: SimpleNamespace(logits=model(x)), {"x": x, "labels": y})
    assert torch.equal(got.output, model(x)[:, 0])
    assert torch.equal(got.weight, y - model(x).detach()[:, 0])


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize(
    "form",
    [tuple, lambda parts: ModelOutput(*parts) if len(parts) == 3 else tuple(parts)],
    ids=["tuple", "ModelOutput"],
)
def test_what_a_users_task_leaves_out_is_ones(parts, form):
    x = torch.randn(4, 1, requires_grad=True)
    given_parts = [x * 2, x * 3, x * 5][:parts]
    task = Task("mine", lambda model, batch: form(given_parts))
    f, q, r = task(None, None)
    assert torch.equal(f, x[:, 0] * 2)
    assert torch.equal(q, x[:, 0] * 3 if parts > 1 else torch.ones(4))
    assert torch.equal(r, x[:, 0] * 5 if parts > 2 else torch.ones(4))
    assert f.requires_grad
    assert not q.requires_grad
    assert not r.requires_grad


def test_a_single_tensor_is_f():
    x = torch.randn(3)
    assert torch.equal(Task("mine", lambda model, batch: batch)(None, x).output, x)


def test_get_task():
    mine = Task("mine", lambda model, batch: batch)
    assert get_task(mine) is mine
    assert all(get_task(name).name == name for name in TASKS)
    assert {"image_classification", "text_classification", "regression"} <= set(TASKS)
