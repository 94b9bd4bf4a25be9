"""Models and tasks that do more than compute: right as their plain twins are, or refused by name.

Each is held against a module of the same weights that does the same mathematics without the side
effect, through fit and attribute at two checkpoints.
"""

from __future__ import annotations

import copy
import functools
import random
import threading
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import trak_ext
from trak_ext.tasks import Task

X, Y = torch.rand(40, 6), torch.randint(0, 3, (40,), generator=torch.Generator().manual_seed(1))
LOADER = [(X[:25], Y[:25]), (X[25:], Y[25:])]
TARGETS = [(X[:4].flip(0), Y[:4])]


class Plain(nn.Module):
    """Layers that every model below has, computed plainly."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def body(self, x):
        return self.b(self.a(x).tanh()).tanh()

    def forward(self, x):
        return self.c(self.body(x))


def states(make, count=2):
    torch.manual_seed(5)
    return [make().state_dict() for _ in range(count)]


def scores(model, checkpoints, task="image_classification", loader=None, **options):
    """Fit and attribute on copies; what was handed over must be as it was."""
    given = copy.deepcopy(checkpoints)
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    loader = [(x.clone(), y.clone()) for x, y in LOADER] if loader is None else loader
    kept = copy.deepcopy(loader)
    try:
        attributor = trak_ext.Attributor(
            model, task, checkpoints=given, proj_dim=16, damping=1.0, progress=False, **options
        )
        attributor.fit(loader)
        return attributor.attribute([tuple(part.clone() for part in b) for b in TARGETS])
    finally:
        for mine, theirs in [*zip(given, checkpoints, strict=True), (model.state_dict(), before)]:
            for name, tensor in theirs.items():
                assert torch.equal(mine[name], tensor), name
        assert [module.training for module in model.modules()] == modes
        for (x, y), (was_x, was_y) in zip(loader, kept, strict=True):
            assert torch.equal(x, was_x)
            assert torch.equal(y, was_y)


def assert_as_plain(model, plain=None, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # one sample at a time
        got = scores(model, states(Plain), **options)
    expected = scores(plain or Plain(), states(Plain))
    torch.testing.assert_close(got, expected, rtol=2e-4, atol=2e-4 * float(expected.abs().max()))


# --- Backward runs the module again ---------------------------------------------------------------


class Checkpointed(Plain):
    reentrant = False

    def body(self, x):
        return checkpoint(super().body, x, use_reentrant=self.reentrant)


class CheckpointedInTheMiddle(Plain):
    def body(self, x):
        x = self.a(x).tanh()
        return checkpoint(lambda h: self.b(h).tanh(), x, use_reentrant=True)


class Sequential(Plain):
    def body(self, x):
        layers = nn.Sequential(self.a, nn.Tanh(), self.b, nn.Tanh())
        return checkpoint_sequential(layers, 2, x, use_reentrant=False)


class Recompute(torch.autograd.Function):
    """Keeps the input alone, and runs a module again for its gradients."""

    @staticmethod
    def forward(ctx, module, x, *weights):
        ctx.module = module
        ctx.save_for_backward(x)
        return module(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            weights = list(ctx.module.parameters())
            found = torch.autograd.grad(ctx.module(x), [x, *weights], grad)
        return None, found[0], *found[1:]


class OwnFunction(Plain):
    def body(self, x):
        x = Recompute.apply(self.a, x, *self.a.parameters()).tanh()
        return Recompute.apply(self.b, x, *self.b.parameters()).tanh()


@pytest.mark.parametrize("make", [Checkpointed, CheckpointedInTheMiddle, Sequential, OwnFunction])
def test_a_backward_pass_that_runs_layers_again_sees_the_checkpoints_weights(make):
    assert_as_plain(make())


def test_reentrant_checkpointing_that_leaves_gradients_out_is_refused():
    model = Checkpointed()
    model.reentrant = True
    with pytest.raises(RuntimeError, match=r"expected activation checkpointing that gives grad"):
        scores(model, states(Plain))


# --- Writes to its batch --------------------------------------------------------------------------


class Shifted(Plain):
    def forward(self, x):
        return super().forward((x - 0.7) / 0.5)


class ShiftsInPlace(Plain):
    def forward(self, x):
        x -= 0.7
        x /= 0.5
        return super().forward(x)


class RunsOutOfMemory(ShiftsInPlace):
    """Takes six samples at a time, after it has written to all of them."""

    def forward(self, x):
        out = super().forward(x)
        unwrapped = x
        while torch._C._functorch.is_functorch_wrapped_tensor(unwrapped):
            unwrapped = torch._C._functorch.get_unwrapped(unwrapped)
        if unwrapped.shape[0] > 6:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return out


class NeedsTheLoop(ShiftsInPlace):
    def forward(self, x):
        out = super().forward(x)
        return out if float(x.sum()) < 1e9 else out * 2  # vmap cannot take the question


@pytest.mark.parametrize("make", [ShiftsInPlace, RunsOutOfMemory, NeedsTheLoop])
def test_a_model_that_writes_to_its_batch(make):
    assert_as_plain(make(), Shifted())


def test_a_task_that_writes_to_inputs_and_labels():
    def greedy(model, batch):
        inputs, labels = batch
        inputs.sub_(0.7).div_(0.5)
        labels.mul_(0).add_(1)
        logits = model(inputs)
        return logits.gather(1, labels[:, None])[:, 0] - logits.logsumexp(1)

    def modest(model, batch):
        logits = model((batch[0] - 0.7) / 0.5)
        labels = torch.ones_like(batch[1])
        return logits.gather(1, labels[:, None])[:, 0] - logits.logsumexp(1)

    got = scores(Plain(), states(Plain), Task("margin", greedy))
    assert torch.equal(got, scores(Plain(), states(Plain), Task("margin", modest)))


def test_a_task_that_takes_entries_out_of_its_batch():
    def pops(model, batch):
        labels = batch.pop("labels")
        batch["x"].mul_(2)
        return model(**batch).gather(1, labels[:, None])[:, 0]

    def reads(model, batch):
        return model(batch["x"] * 2).gather(1, batch["labels"][:, None])[:, 0]

    found = []
    for task in (pops, reads):
        batches = [{"x": x.clone(), "labels": y.clone()} for x, y in LOADER]
        attributor = trak_ext.Attributor(
            Plain(), Task("logit", task), checkpoints=states(Plain), proj_dim=16, progress=False
        )
        attributor.fit(batches)
        found.append(attributor.attribute(batches[:1]))
        assert all(set(batch) == {"x", "labels"} for batch in batches)
        assert torch.equal(batches[0]["x"], LOADER[0][0])
    assert torch.equal(*found)


# --- Writes to its weights, or eval() does --------------------------------------------------------


class Counts(Plain):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class Observes(Plain):
    """Widens a range that it has seen, and a plain attribute; neither changes the output."""

    def __init__(self):
        super().__init__()
        self.register_buffer("largest", torch.zeros(8))
        self.seen = []

    def body(self, x):
        hidden = super().body(x)
        self.seen.append(hidden)
        self.largest.copy_(torch.maximum(self.largest, hidden.detach().abs().amax(0)))
        return hidden


@pytest.mark.parametrize("make", [Counts, Observes])
def test_a_forward_that_writes_to_buffers(make):
    model = make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        got = scores(model, states(make))
    torch.testing.assert_close(got, scores(Plain(), states(Plain)), rtol=2e-4, atol=1e-5)
    assert getattr(model, "seen", []) == []


def test_a_forward_that_writes_to_a_parameter():
    class Bag(nn.Module):
        def __init__(self, max_norm):
            super().__init__()
            self.e, self.c = nn.Embedding(20, 6, max_norm=max_norm), nn.Linear(6, 3)

        def forward(self, x):
            return self.c(self.e(x).mean(1))

    words = torch.randint(0, 20, (30, 5))
    torch.manual_seed(0)
    state = {name: t * 2 for name, t in Bag(None).state_dict().items()}
    clipped = dict(state)
    norms = state["e.weight"].norm(dim=1, keepdim=True)
    clipped["e.weight"] = state["e.weight"] * (1.0 / (norms + 1e-7)).clamp(max=1)
    found = []
    for model, given in ((Bag(1.0), state), (Bag(None), clipped)):
        kept = copy.deepcopy(given)
        attributor = trak_ext.Attributor(
            model, "image_classification", checkpoints=[given], proj_dim=16, progress=False
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            attributor.fit([(words, Y[:30])])
            found.append(attributor.attribute([(words[:4], Y[:4])]))
        assert all(torch.equal(given[name], tensor) for name, tensor in kept.items())
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


class Merges(Plain):
    """As adapters do: eval() adds a low-rank product to a weight, train() takes it off."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Parameter(torch.ones(8, 1)), nn.Parameter(torch.ones(1, 8))

    def train(self, mode=True):
        if self.training != mode:
            with torch.no_grad():
                self.b.weight += (self.down @ self.up) * (-1 if mode else 1)
        return super().train(mode)


class Replaces(Plain):
    """eval() puts a fused weight in a plain attribute."""

    def eval(self):
        self.fused = self.b.weight @ self.a.weight
        return super().eval()


@pytest.mark.parametrize(("make", "what"), [(Merges, "weight of b"), (Replaces, "fused of ")])
def test_an_eval_that_changes_weights_is_refused_by_name(make, what):
    message = f"expected an eval.. that sets modes alone, got one that changes {what}"
    with pytest.raises(ValueError, match=message):
        scores(make(), states(make))


# --- Reads its weights past their names -----------------------------------------------------------


class Lists(Plain):
    def __init__(self):
        super().__init__()
        self.kept = {"b": [self.b.weight]}

    def body(self, x):
        return (self.a(x).tanh() @ self.kept["b"][0].T + self.b.bias).tanh()


class Closes(Plain):
    def __init__(self):
        super().__init__()
        weight, bias = self.b.weight, self.b.bias
        self.step = lambda h: h @ weight.T + bias

    def body(self, x):
        return self.step(self.a(x).tanh()).tanh()


class Partial(Plain):
    def __init__(self):
        super().__init__()
        self.step = functools.partial(nn.functional.linear, weight=self.b.weight, bias=self.b.bias)

    def body(self, x):
        return self.step(self.a(x).tanh()).tanh()


class Holder:
    def __init__(self, weight):
        self.weight = weight

    def apply(self, x):
        return x @ self.weight.T


class Elsewhere(Plain):
    def __init__(self):
        super().__init__()
        self.step = Holder(self.b.weight).apply

    def body(self, x):
        return (self.step(self.a(x).tanh()) + self.b.bias).tanh()


@pytest.mark.parametrize("make", [Lists, Closes, Partial, Elsewhere])
@pytest.mark.parametrize("own", [False, True])
def test_a_model_that_reads_a_weight_past_its_name_is_refused(make, own):
    torch.manual_seed(5)
    model = make()
    checkpoints = [copy.deepcopy(model.state_dict())] if own else states(Plain)
    with pytest.raises(ValueError, match=r"read by their names alone, got some that (kept|step) "):
        scores(model, checkpoints)


class ListsOnly(Plain):
    """Keeps a list of its weights that forward does not read, as optimizers' helpers do."""

    def __init__(self):
        super().__init__()
        self.mine = list(self.parameters())


class Lstm(Plain):
    """torch's recurrent layers keep a flat list of their weights, and make it anew."""

    def __init__(self):
        super().__init__()
        self.b = nn.LSTM(8, 8, batch_first=True)

    def body(self, x):
        return self.b(self.a(x).tanh()[:, None])[0][:, -1]


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_lists_of_weights_that_do_no_harm_are_taken():
    assert_as_plain(ListsOnly())
    torch.manual_seed(5)
    checkpoints = [Lstm().state_dict() for _ in range(2)]
    single = [scores(Lstm(), [state]) for state in checkpoints]
    torch.manual_seed(9)
    both = scores(Lstm(), checkpoints)
    assert both.shape == single[0].shape
    for state, expected in zip(checkpoints, single, strict=True):
        model = Lstm()
        model.load_state_dict(state)
        torch.testing.assert_close(scores(model, [state]), expected)


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("error", [KeyboardInterrupt, StoppedError])
@pytest.mark.parametrize("make", [Counts, ShiftsInPlace])
def test_an_error_in_the_middle_leaves_everything_as_it_was(make, error):
    model = make().train()
    model.c.eval()
    calls = iter(range(10**6))

    def task(model, batch):
        logits = model(batch[0])
        if next(calls) > 6:
            raise error
        return logits.gather(1, batch[1][:, None])[:, 0]

    with pytest.raises(error):
        scores(model, states(make), Task("logit", task), chunk_size=5)


# --- Noise ----------------------------------------------------------------------------------------


class Noisy(Plain):
    def __init__(self, draw):
        super().__init__()
        self.draw = draw

    def forward(self, x):
        return super().forward(x) * (1 + 0.1 * self.draw())


GENERATOR = torch.Generator().manual_seed(3)
CLOCK = iter(range(10**6))
NOISE = {
    "torch": lambda: torch.rand(()),
    "NumPy": np.random.default_rng(1).random,
    "NumPy's global": lambda: np.random.random(),
    "random": lambda: random.Random().random(),
    "an own generator": lambda: torch.rand((), generator=GENERATOR),
    "a counter": lambda: next(CLOCK) / 7,
}


@pytest.mark.parametrize("source", NOISE)
@pytest.mark.parametrize("where", ["model", "task"])
def test_an_output_that_differs_on_a_second_call_is_refused(source, where):
    draw = NOISE[source]
    task = "image_classification"
    if where == "task":
        task = Task("noisy", lambda model, batch: model(batch[0])[:, 0] + draw())
    with pytest.raises(RuntimeError, match="expected an output that is not random in eval mode"):
        scores(Noisy(draw) if where == "model" else Plain(), states(Plain), task)


# --- Threads, and modes around the call -----------------------------------------------------------


def test_threads_that_share_a_module_take_turns():
    checkpoints = states(Plain, 4)
    alone = [scores(Plain(), [state]) for state in checkpoints]
    model, found = Plain(), [None] * 4
    before = copy.deepcopy(model.state_dict())

    def work(i):
        attributor = trak_ext.Attributor(
            model,
            "image_classification",
            checkpoints=[checkpoints[i]],
            proj_dim=16,
            damping=1.0,
            progress=False,
            chunk_size=3,
        )
        attributor.fit(LOADER)
        found[i] = attributor.attribute(TARGETS)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got, expected in zip(found, alone, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_modes_around_the_call_change_nothing(mode):
    expected = scores(Plain(), states(Plain))
    checkpoints = states(Plain)
    with mode():
        got = scores(Plain(), checkpoints)
        inside = scores(Plain(), states(Plain))  # made in that mode
    assert torch.equal(got, expected)
    assert torch.equal(inside, expected)


def test_warnings_point_at_the_callers_line():
    for model, said in ((NeedsTheLoop(), "one sample at a time"), (RunsOutOfMemory(), "ran out")):
        attributor = trak_ext.Attributor(
            model, "image_classification", proj_dim=16, progress=False, damping=1.0
        )
        with pytest.warns(RuntimeWarning, match=said) as caught:
            attributor.fit(LOADER)
        assert {warning.filename for warning in caught} == {__file__}
