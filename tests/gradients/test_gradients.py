"""Per-sample gradients against one torch.autograd.grad a sample, in fp64."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gradient_cases import (
    CLASSES,
    CLASSIFICATION,
    MODELS,
    assert_same,
    collect,
    conv_net,
    loop,
    make,
    mlp,
    other_weights,
)
from trak_ext.gradients import GradientComputer
from trak_ext.gradients.functional import EvalMode, computing
from trak_ext.inputs.batches import batch_tensors
from trak_ext.tasks import Task


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_equal_the_loop(name, dtype, tolerance):
    model, (x, y) = make(name)
    weights = other_weights(model)
    expected, outputs = loop(model, weights, (x, y))
    model.to(dtype)
    weights = {k: v.to(dtype) if v.is_floating_point() else v for k, v in weights.items()}
    batch = (x.to(dtype) if x.is_floating_point() else x, y)
    got, f = collect(GradientComputer(model, CLASSIFICATION), weights, batch)
    assert all(grad.dtype == dtype for grad in got.values())
    assert_same(got, expected, tolerance)
    torch.testing.assert_close(f.double(), outputs, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("name", MODELS)
def test_the_models_own_state_is_left_alone(name):
    model, batch = make(name)
    before = copy.deepcopy(model.state_dict())
    collect(GradientComputer(model, CLASSIFICATION), other_weights(model), batch)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_weights_that_are_not_given_are_the_models():
    model, batch = make("conv")
    weights = other_weights(model)
    part = {name: weights[name] for name in ("0.weight", "1.running_mean")}
    expected, _ = loop(model, {**model.state_dict(), **part}, batch)
    got, _ = collect(GradientComputer(model, CLASSIFICATION), part, batch)
    assert_same(got, expected, 1e-5)


def test_batchnorm_and_dropout_are_in_eval_and_flags_come_back():
    model, batch = make("conv")
    model.train()
    model[1].eval()  # a frozen BatchNorm stays one
    weights = other_weights(model)
    computer = GradientComputer(model, CLASSIFICATION, chunk_size=2)
    expected, _ = loop(model, weights, batch)
    for _ in range(2):
        got, _ = collect(computer, weights, batch)
        assert_same(got, expected, 1e-5)
        assert [m.training for m in model.modules() if m is not model[1]] == [True] * 7
        assert not model[1].training


def test_flags_come_back_after_an_error_and_after_stopping_early():
    model, batch = make("conv")

    def fails(model, batch):
        raise KeyError("of the user")

    with pytest.raises(KeyError, match="of the user"):
        list(GradientComputer(model, Task("fails", fails))({}, batch))
    assert all(module.training for module in model.modules())
    chunks = GradientComputer(model, CLASSIFICATION, chunk_size=2)({}, batch)
    next(chunks)
    assert all(module.training for module in model.modules())
    chunks.close()
    assert all(module.training for module in model.modules())


def test_eval_mode_leaves_a_model_in_eval_in_eval():
    model = conv_net().eval()
    with computing(model, EvalMode(model)):
        pass
    assert not any(module.training for module in model.modules())


def test_tied_weights_count_once():
    model, batch = make("tied")
    computer = GradientComputer(model, CLASSIFICATION)
    assert computer.names == ["embed.weight", "mix.weight", "mix.bias"]
    assert computer.num_params == CLASSES * 6 + 36 + 6
    # Either use of the tied weight alone gives another gradient than their sum.
    untied = copy.deepcopy(model)
    untied.head.weight = nn.Parameter(model.embed.weight.detach().clone())
    parts, _ = loop(untied, untied.state_dict(), batch)
    got, _ = collect(computer, model.state_dict(), batch)
    for name in ("embed.weight", "head.weight"):
        assert not torch.allclose(got["embed.weight"].double(), parts[name], atol=1e-3)
    total = parts["embed.weight"] + parts["head.weight"]
    torch.testing.assert_close(got["embed.weight"].double(), total, rtol=1e-4, atol=1e-6)


class Explodes(torch.autograd.Function):
    """The identity, whose backward raises."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        raise ArithmeticError("differentiated")


class HalfFrozen(nn.Module):
    def __init__(self):
        super().__init__()
        self.frozen = nn.Parameter(torch.randn(7, 5), requires_grad=False)
        self.body = nn.Linear(7, 7)
        self.head = nn.Linear(7, CLASSES)

    def forward(self, x):
        return self.head(torch.relu(self.body(F.linear(x, Explodes.apply(self.frozen)))))


@pytest.mark.parametrize("one_by_one", [False, True])
def test_parameters_that_are_not_chosen_are_never_differentiated(one_by_one):
    model = HalfFrozen()
    batch = (torch.randn(4, 5), torch.randint(0, CLASSES, (4,)))
    names = ["body.weight", "body.bias", "head.weight", "head.bias"]
    expected, _ = loop(model, model.state_dict(), batch, names)
    computer = GradientComputer(model, CLASSIFICATION)
    computer._one_by_one = one_by_one
    got, _ = collect(computer, {}, batch)
    assert_same(got, expected, 1e-5)
    for params in (["frozen"], lambda name, parameter: True):
        chosen = GradientComputer(model, CLASSIFICATION, params)
        chosen._one_by_one = one_by_one
        with pytest.raises(ArithmeticError, match="differentiated"):
            collect(chosen, {}, batch)


@pytest.mark.parametrize("params", ["*.weight", lambda name, parameter: name.endswith("weight")])
def test_chosen_gradients_equal_the_loop(params):
    model, batch = make("conv")
    names = ["0.weight", "1.weight", "6.weight"]
    expected, _ = loop(model, model.state_dict(), batch, names)
    got, _ = collect(GradientComputer(model, CLASSIFICATION, params), {}, batch)
    assert_same(got, expected, 1e-5)


class SparseText(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 5, sparse=True)
        self.layers = mlp()

    def forward(self, x):
        return self.layers(self.embed(x).mean(1))


def test_sparse_gradients_come_dense():
    model = SparseText()
    batch = (torch.randint(0, 9, (4, 3)), torch.randint(0, CLASSES, (4,)))
    dense = copy.deepcopy(model)
    dense.embed.sparse = False
    expected, _ = loop(dense, model.state_dict(), batch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got, _ = collect(GradientComputer(model, CLASSIFICATION), {}, batch)
    assert all(grad.layout == torch.strided for grad in got.values())
    assert_same(got, expected, 1e-5)


@pytest.mark.parametrize("one_by_one", [False, True])
def test_an_output_without_parameters_has_zero_gradients(one_by_one):
    task = Task("constant", lambda model, batch: batch[0].sum(1))
    computer = GradientComputer(mlp(), task)
    computer._one_by_one = one_by_one
    x = torch.randn(1, 5)
    grads, f = collect(computer, {}, (x, torch.zeros(1)))
    assert all(not grad.any() for grad in grads.values())
    assert all(grad.shape == (1, *computer.shapes[name]) for name, grad in grads.items())
    torch.testing.assert_close(f, x.sum(1))


def test_q_and_r_of_a_users_task_are_passed_on():
    def function(model, batch):
        f = model(batch["x"])[:, 0]
        return f, f * 2, batch["r"]

    model, x, r = mlp(), torch.randn(5, 5), torch.rand(5)
    computer = GradientComputer(model, Task("mine", function), chunk_size=2)
    parts = list(computer({}, {"x": x, "r": r}))
    expected = model(x)[:, 0].detach()
    torch.testing.assert_close(torch.cat([part.weight for part in parts]), expected * 2)
    torch.testing.assert_close(torch.cat([part.curvature for part in parts]), r)


@pytest.mark.parametrize("nest", [
    lambda x, y: {"x": x, "labels": y},
    lambda x, y: ((x,), {"deep": [y]}),
    lambda x, y: [x, y],
], ids=["mapping", "nested", "list"])  # fmt: skip
def test_batches_of_any_nesting(nest):
    model, (x, y) = make("mlp")

    def function(model, batch):
        inputs, labels = batch_tensors(batch)
        return CLASSIFICATION(model, (inputs, labels)).output

    expected, _ = loop(model, model.state_dict(), (x, y))
    got, _ = collect(GradientComputer(model, Task("mine", function)), {}, nest(x, y))
    assert_same(got, expected, 1e-5)
