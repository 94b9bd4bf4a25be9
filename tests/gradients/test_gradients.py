"""Per-sample gradients against one torch.autograd.grad a sample, in fp64."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import trak_ext.gradients.computer
from trak_ext.gradients import GradientComputer
from trak_ext.gradients.functional import eval_mode
from trak_ext.inputs.loaders import batch_tensors
from trak_ext.tasks import TASKS, Task

CLASSIFICATION = TASKS["image_classification"]
CLASSES = 4


class TiedText(nn.Module):
    """Embedding whose weight is the output layer's as well."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(CLASSES, 6)
        self.mix = nn.Linear(6, 6)
        self.head = nn.Linear(6, CLASSES, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(torch.tanh(self.mix(self.embed(tokens))).mean(1))


class Attention(nn.Module):
    """Written out, since torch's own has no batching rule on the CPU and says so."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6, padding_idx=0)
        self.norm = nn.LayerNorm(6)
        self.qkv = nn.Linear(6, 18)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, tokens):
        q, k, v = self.qkv(self.norm(self.embed(tokens))).chunk(3, -1)
        weights = (q @ k.transpose(1, 2)).masked_fill((tokens == 0)[:, None], -1e9).softmax(-1)
        return self.head((weights @ v).mean(1))


class Unused(nn.Module):
    """With a parameter that f does not depend on, one without elements, and a scalar one."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(5, CLASSES)
        self.unused = nn.Parameter(torch.randn(3))
        self.empty = nn.Parameter(torch.zeros(0, 2))
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        return self.first(x) * self.scale


def mlp():
    return nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, CLASSES))


def conv_net():
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(12, CLASSES),
    )


def numbers(*shape):
    return lambda count: torch.randn(count, *shape)


def tokens(high):
    return lambda count: torch.randint(0, high, (count, 5))


class UsedTwice(nn.Module):
    """One layer under two names."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.again = self.first
        self.head = nn.Linear(5, CLASSES)

    def forward(self, x):
        return self.head(torch.tanh(self.again(torch.tanh(self.first(x)))))


MODELS = {
    "mlp": (mlp, numbers(5)),
    "used twice": (UsedTwice, numbers(5)),
    "conv": (conv_net, numbers(2, 4, 4)),
    "tied": (TiedText, tokens(CLASSES)),
    "attention": (Attention, tokens(11)),
    "unused": (Unused, numbers(5)),
}


def make(name, count=6):
    model, inputs = MODELS[name][0](), MODELS[name][1](count)
    return model, (inputs, torch.randint(0, CLASSES, (count,)))


def other_weights(model):
    """A state dict unlike the model's own, running figures of BatchNorm included."""
    with torch.no_grad():
        changed = copy.deepcopy(model)
        for name, tensor in changed.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(0.5 + torch.rand_like(tensor) if "var" in name else tensor + 0.3)
    return {name: tensor.clone() for name, tensor in changed.state_dict().items()}


def output_by_hand(logits, label):
    return logits[label] - torch.cat([logits[:label], logits[label + 1 :]]).logsumexp(0)


def loop(model, weights, batch, names=None, output=output_by_hand, dtype=torch.float64):
    """Gradients {name: [B, *shape]} and f [B], one autograd.grad a sample."""
    model = copy.deepcopy(model).to(dtype)
    model.load_state_dict(weights)
    model.eval()
    named = dict(model.named_parameters())
    names = list(named) if names is None else names
    inputs, labels = batch
    inputs = inputs.to(dtype) if inputs.is_floating_point() else inputs
    rows, outputs = [], []
    for x, y in zip(inputs, labels, strict=True):
        f = output(model(x[None])[0], y)
        chosen = [named[name] for name in names]
        rows.append(torch.autograd.grad(f, chosen, allow_unused=True, materialize_grads=True))
        outputs.append(f.detach())
    grads = {name: torch.stack([row[i] for row in rows]) for i, name in enumerate(names)}
    return grads, torch.stack(outputs)


def collect(computer, weights, batch):
    parts = list(computer(weights, batch))
    grads = {name: torch.cat([part.grads[name] for part in parts]) for name in computer.names}
    return grads, torch.cat([part.output for part in parts])


def assert_same(got, expected, tolerance):
    assert list(got) == list(expected)
    largest = max(float(grad.abs().max()) for grad in expected.values() if grad.numel())
    for name, grad in expected.items():
        assert got[name].shape == grad.shape, name
        if grad.numel():
            assert float((got[name] - grad).abs().max()) <= tolerance * largest, name


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
    assert not any(module.training for module in model.modules())
    chunks.close()
    assert all(module.training for module in model.modules())


def test_eval_mode_leaves_a_model_in_eval_in_eval():
    model = conv_net().eval()
    with eval_mode(model):
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


@pytest.mark.parametrize("name", ["conv", "attention"])
@pytest.mark.parametrize("chunk_size", [1, 4, 6, 100])
def test_chunks_do_not_matter(name, chunk_size):
    model, batch = make(name)
    computer = GradientComputer(model, CLASSIFICATION, chunk_size=chunk_size)
    sizes = [len(part.output) for part in computer({}, batch)]
    assert sizes == {1: [1] * 6, 4: [4, 2], 6: [6], 100: [6]}[chunk_size]
    expected, _ = loop(model, model.state_dict(), batch)
    got, _ = collect(computer, {}, batch)
    assert_same(got, expected, 1e-5)


def test_small_models_go_256_at_a_time():
    computer = GradientComputer(mlp(), CLASSIFICATION)
    batch = (torch.randn(300, 5), torch.randint(0, CLASSES, (300,)))
    assert [len(part.output) for part in computer({}, batch)] == [256, 44]


def test_a_sample_is_measured_where_chunks_might_not_fit(monkeypatch):
    model = nn.Sequential(nn.Linear(5, 100), nn.Linear(100, CLASSES))
    batch = (torch.randn(30, 5), torch.randint(0, CLASSES, (30,)))
    sample = GradientComputer(model, CLASSIFICATION).sample_bytes({}, batch)
    assert sample >= 2 * 4 * sum(parameter.numel() for parameter in model.parameters())
    monkeypatch.setattr(trak_ext.gradients.computer, "TINY", 0)
    monkeypatch.setattr(trak_ext.gradients.computer, "free_bytes", lambda device: 2 * 7 * sample)
    computer = GradientComputer(model, CLASSIFICATION)
    assert [len(part.output) for part in computer({}, batch)] == [7, 7, 7, 7, 2]


def test_longer_texts_are_measured_anew():
    class Long(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(9, 50)
            self.head = nn.Linear(50, CLASSES)

        def forward(self, x):
            return self.head(torch.tanh(self.embed(x)).mean(1))

    computer = GradientComputer(Long(), CLASSIFICATION)
    short, long = (
        computer.sample_bytes({}, (torch.zeros(2, length, dtype=int), torch.zeros(2, dtype=int)))
        for length in (10, 1000)
    )
    assert long - short >= 2 * 990 * 50 * 4


class RunsOut(nn.Module):
    """An MLP that runs out of memory with more than three samples at a time, as torch does."""

    def __init__(self, limit=3):
        super().__init__()
        self.layers = mlp()
        self.limit = limit

    def forward(self, x):
        # Under vmap x is one sample; below it is the tensor of the chunk.
        inner = x
        while torch._C._functorch.is_functorch_wrapped_tensor(inner):
            inner = torch._C._functorch.get_unwrapped(inner)
        if inner.shape[0] > self.limit:
            torch.empty(2**60, dtype=torch.int8)
        return self.layers(x)


@pytest.mark.parametrize("chunk_size", [None, 6])
def test_chunks_are_halved_when_memory_runs_out(chunk_size):
    model = RunsOut()
    batch = (torch.randn(7, 5), torch.randint(0, CLASSES, (7,)))
    computer = GradientComputer(model, CLASSIFICATION, chunk_size=chunk_size)
    with pytest.warns(RuntimeWarning, match="ran out of memory with the gradients of") as caught:
        sizes = [len(part.output) for part in computer({}, batch)]
    assert len(caught) == 1
    assert sizes == [3, 3, 1]
    expected, _ = loop(model.layers, model.layers.state_dict(), batch)
    got, _ = collect(computer, {}, batch)  # it remembers: no warning
    assert_same({name[7:]: grad for name, grad in got.items()}, expected, 1e-5)


def test_one_sample_that_does_not_fit_is_an_error():
    computer = GradientComputer(RunsOut(limit=0), CLASSIFICATION)
    with pytest.raises(RuntimeError, match="memory"), pytest.warns(RuntimeWarning):
        collect(computer, {}, (torch.randn(3, 5), torch.zeros(3, dtype=torch.int64)))


def test_no_samples_give_nothing():
    computer = GradientComputer(mlp(), CLASSIFICATION)
    empty = (torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64))
    assert list(computer({}, empty)) == []


class Witness(nn.Module):
    """An MLP that notes the dtype its layers compute in."""

    def __init__(self):
        super().__init__()
        self.layers = mlp()
        self.dtypes = set()

    def forward(self, x):
        logits = self.layers(x)
        self.dtypes.add(logits.dtype)
        return logits


@pytest.mark.parametrize("chunk_size", [2, 6])
@pytest.mark.parametrize("one_by_one", [False, True])
def test_autocast_is_honoured(chunk_size, one_by_one):
    model = Witness()
    batch = (torch.randn(6, 5), torch.randint(0, CLASSES, (6,)))
    states = [model.state_dict(), other_weights(model)]
    computer = GradientComputer(model, CLASSIFICATION, chunk_size=chunk_size)
    computer._one_by_one = one_by_one
    exact = [loop(model, state, batch)[0] for state in states]
    with torch.autocast("cpu", torch.bfloat16):
        # Twice over two checkpoints, so that no cast of other weights may be remembered.
        got = [collect(computer, state, batch)[0] for state in states + states]
    assert model.dtypes == {torch.bfloat16}
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
    assert len(calls) == 1


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
    x = torch.randn(3, 5)
    grads, f = collect(computer, {}, (x, torch.zeros(3)))
    assert all(not grad.any() for grad in grads.values())
    assert all(grad.shape == (3, *computer.shapes[name]) for name, grad in grads.items())
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
