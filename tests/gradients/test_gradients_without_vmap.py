"""Models that vmap cannot take, outputs that are random, and the modes of whoever calls."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gradient_cases import (
    CLASSES,
    CLASSIFICATION,
    assert_same,
    collect,
    loop,
    make,
    mlp,
    other_weights,
)
from trak_ext.gradients import GradientComputer


class Witness(nn.Module):
    """An MLP that notes the dtype its layers compute in, where that is not undone."""

    def __init__(self, note=lambda dtype: None):
        super().__init__()
        self.layers = mlp()
        self.note = note

    def forward(self, x):
        logits = self.layers(x)
        self.note(logits.dtype)
        return logits


@pytest.mark.parametrize("chunk_size", [2, 6])
@pytest.mark.parametrize("one_by_one", [False, True])
def test_autocast_is_honoured(chunk_size, one_by_one):
    dtypes = set()
    model = Witness(dtypes.add)
    batch = (torch.randn(6, 5), torch.randint(0, CLASSES, (6,)))
    states = [model.state_dict(), other_weights(model)]
    computer = GradientComputer(model, CLASSIFICATION, chunk_size=chunk_size)
    computer._one_by_one = one_by_one
    exact = [loop(model, state, batch)[0] for state in states]
    dtypes.clear()
    with torch.autocast("cpu", torch.bfloat16):
        # Twice over two checkpoints, so that no cast of other weights may be remembered.
        got = [collect(computer, state, batch)[0] for state in states + states]
    assert dtypes == {torch.bfloat16}
    for grads, state, without in zip(got, states + states, exact + exact, strict=True):
        with torch.autocast("cpu", torch.bfloat16):
            expected, _ = loop(model, state, batch, dtype=torch.float32)
        assert_same(grads, expected, 2e-2)
        assert max(float((grads[n] - without[n]).abs().max()) for n in grads) > 1e-4


class WithItem(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = mlp()

    def forward(self, x):
        return self.layers(x) * (2.0 if x.sum().item() > 0 else 0.5)


class OldSquare(torch.autograd.Function):
    """Without a vmap rule and without setup_context."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * ctx.saved_tensors[0] * gradient


class NewSquare(torch.autograd.Function):
    """With setup_context, but without a vmap rule."""

    @staticmethod
    def forward(x):
        return x * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx, gradient):
        return 2 * ctx.saved_tensors[0] * gradient


class WithFunction(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.layers = mlp()
        self.function = function

    def forward(self, x):
        return self.function.apply(self.layers(x))


class WithIf(WithItem):
    def forward(self, x):
        y = self.layers(x)
        return y * 3 if y[0, 0] > 0 else y - 1


class WithNonzero(WithItem):
    def forward(self, x):
        return self.layers(x) + self.layers(x)[x[:, 0].abs() > 0.01].sum(0)


NOT_FOR_VMAP = {
    "item": WithItem,
    "if": WithIf,
    "mask": WithNonzero,
    "old function": lambda: WithFunction(OldSquare),
    "new function": lambda: WithFunction(NewSquare),
}


@pytest.mark.parametrize("make_model", NOT_FOR_VMAP.values(), ids=NOT_FOR_VMAP)
def test_what_vmap_cannot_take_goes_one_by_one_with_one_warning(make_model):
    model = make_model()
    batch = (torch.randn(6, 5), torch.randint(0, CLASSES, (6,)))
    weights = other_weights(model)
    computer = GradientComputer(model, CLASSIFICATION, chunk_size=4)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        first, f = collect(computer, weights, batch)
        second, _ = collect(computer, weights, batch)
    assert [warning.category for warning in caught] == [RuntimeWarning]
    message = str(caught[0].message)
    assert message.startswith("trak_ext computes gradients one sample at a time, which is slow")
    assert "\n" not in message
    expected, outputs = loop(model, weights, batch)
    for got in (first, second):
        assert_same(got, expected, 1e-5)
    torch.testing.assert_close(f.double(), outputs, rtol=1e-5, atol=1e-5)
    assert all(module.training for module in model.modules())


def test_a_model_for_vmap_gets_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        collect(GradientComputer(*make("conv")[:1], CLASSIFICATION), {}, make("conv")[1])


def test_a_fault_of_the_model_is_not_put_on_vmap():
    computer = GradientComputer(mlp(), CLASSIFICATION)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeError, match="cannot be multiplied"):
            list(computer({}, (torch.randn(3, 4), torch.zeros(3, dtype=torch.int64))))
    # Nor does it turn vmap off for what comes after.
    calls = []
    computer.model.register_forward_hook(lambda *_: calls.append(1))
    collect(computer, {}, (torch.randn(3, 5), torch.zeros(3, dtype=torch.int64)))
    assert len(calls) == 1 + 2 + 1  # which weights are written to; the same twice; the gradients


class Noisy(WithItem):
    def forward(self, x):
        return F.dropout(self.layers(x), 0.5, training=True)


class NoisyWithItem(WithItem):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.5, training=True)


@pytest.mark.parametrize("model_class", [Noisy, NoisyWithItem])
def test_an_output_that_is_random_in_eval_is_refused(model_class):
    computer = GradientComputer(model_class(), CLASSIFICATION)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(RuntimeError, match=r"^model: expected an output that is not random"):
            collect(computer, {}, (torch.randn(3, 5), torch.zeros(3, dtype=torch.int64)))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("model_class", [Witness, WithItem])
def test_the_callers_grad_mode_does_not_matter(mode, model_class):
    model = model_class()
    batch = (torch.randn(6, 5), torch.randint(0, CLASSES, (6,)))
    expected, _ = loop(model, model.state_dict(), batch)
    with warnings.catch_warnings(), mode():
        warnings.simplefilter("ignore")
        got, _ = collect(GradientComputer(model, CLASSIFICATION), model.state_dict(), batch)
    assert_same(got, expected, 1e-5)
