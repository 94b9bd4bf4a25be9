"""trak_ext.demo.digits: the split, the masks, and that training side by side is training alone."""

from __future__ import annotations

import builtins
import sys

import pytest
import torch
from torch import nn
from torch.func import functional_call

from accuracy_settings import make_cnn, make_mlp3, make_softmax
from trak_ext.demo import digits

pytest.importorskip("sklearn")


def make_double_model():
    return digits.make_model().double()


@pytest.fixture(scope="module")
def split():
    return digits.load_digits_split(num_train=300, num_test=100)


def test_split_has_the_stated_shapes_and_is_centred():
    data = digits.load_digits_split()
    assert data.train_inputs.shape == (1200, 64)
    assert data.test_inputs.shape == (300, 64)
    assert data.train_inputs.dtype == torch.float32
    assert data.train_labels.dtype == data.test_labels.dtype == torch.int64
    assert sorted(data.test_labels.unique().tolist()) == list(range(10))
    torch.testing.assert_close(data.train_inputs.mean(0), torch.zeros(64), atol=1e-6, rtol=0)


def test_split_is_seeded_disjoint_and_keeps_the_pictures():
    from sklearn.datasets import load_digits

    data, again = digits.load_digits_split(seed=3), digits.load_digits_split(seed=3)
    assert all(torch.equal(a, b) for a, b in zip(data, again, strict=True))
    assert not torch.equal(data.test_inputs, digits.load_digits_split(seed=4).test_inputs)

    pixels, labels = load_digits(return_X_y=True)
    rows = {(tuple(row), label) for row, label in zip(pixels, labels, strict=True)}
    assert len(rows) == 1797  # no two digits are equal, so pictures identify samples
    inputs = torch.cat([data.train_inputs, data.test_inputs])
    pictures = data.images(inputs).mul(16).round().flatten(1).tolist()
    labels = torch.cat([data.train_labels, data.test_labels]).tolist()
    drawn = {(tuple(row), label) for row, label in zip(pictures, labels, strict=True)}
    assert len(drawn) == 1500
    assert drawn <= rows


@pytest.mark.parametrize("sizes", [(1700, 98), (0, 5), (5, -1)])
def test_split_refuses_sizes_that_do_not_fit(sizes):
    with pytest.raises(ValueError, match=r"num_(train|test): expected an integer from"):
        digits.load_digits_split(*sizes)


def test_a_missing_package_is_named_with_the_extra(monkeypatch):
    real_import = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "sklearn":
            raise ImportError(f"No module named {name!r}")
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"expected scikit-learn.*trak-ext\[demo\]"):
        digits.load_digits_split()


@pytest.mark.parametrize(("alpha", "size"), [(0.0, 0), (0.5, 50), (0.25, 25), (1.0, 100)])
def test_masks_have_equal_rows_of_the_right_size(alpha, size):
    masks = digits.subset_masks(20, 101 if alpha == 0.0 else 100, alpha=alpha, seed=2)
    assert masks.dtype == torch.bool
    assert masks.sum(1).tolist() == [size] * 20


def test_masks_are_seeded_differ_and_use_every_sample_alike():
    masks = digits.subset_masks(400, 60, seed=1)
    assert torch.equal(masks, digits.subset_masks(400, 60, seed=1))
    assert not torch.equal(masks, digits.subset_masks(400, 60, seed=2))
    assert len(masks.unique(dim=0)) == 400
    share = masks.double().mean(0)  # standard error of each: sqrt(.25 / 400) = .025
    assert (share - 0.5).abs().max() < 0.1
    assert digits.subset_masks(0, 5).shape == (0, 5)
    assert digits.subset_masks(5, 0).shape == (5, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 3, 0.5), "num_subsets: expected an integer of at least 0, got -1"),
        ((3, 3, 1.5), r"alpha: expected a number in \[0, 1\], got 1.5"),
    ],
)
def test_masks_refuse_what_they_cannot_draw(arguments, message):
    m, n, alpha = arguments
    with pytest.raises(ValueError, match=message):
        digits.subset_masks(m, n, alpha=alpha)


def train_alone(inputs, labels, subset, seed, *, epochs, batch_size):
    """One model by torch.optim, the way one would write it without vmap."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make_double_model()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    steps = epochs * -(-len(subset) // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = subset[torch.randperm(len(subset), generator=generator)]
        for index in order.split(batch_size):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(inputs[index]), labels[index]).backward()
            optimiser.step()
            schedule.step()
    return {name: value.detach() for name, value in model.named_parameters()}


@pytest.mark.parametrize("models_at_once", [1, 2, 64])
def test_training_side_by_side_is_training_alone(split, models_at_once):
    inputs, labels = split.train_inputs.double(), split.train_labels
    masks = digits.subset_masks(3, len(inputs), seed=5)
    subsets = masks.nonzero()[:, 1].view(3, -1)  # 150 samples: two full batches and one of 22
    seeds = [7, 8, 7]
    states = digits.train_models(
        inputs, labels, subsets, seeds,
        model_factory=make_double_model, epochs=4, models_at_once=models_at_once,
    )  # fmt: skip
    for state, subset, seed in zip(digits.unstack_states(states), subsets, seeds, strict=True):
        alone = train_alone(inputs, labels, subset, seed, epochs=4, batch_size=64)
        assert state.keys() == alone.keys()
        for name, value in alone.items():
            torch.testing.assert_close(state[name], value, atol=1e-10, rtol=1e-10)


def test_training_learns_is_repeatable_and_leaves_torch_state_alone(split, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)  # bars keep out of logs
    subsets = torch.arange(300).expand(2, 300)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    states = digits.train_models(split.train_inputs, split.train_labels, subsets, [0, 1])
    again = digits.train_models(
        split.train_inputs, split.train_labels, subsets, [0, 1], progress=True, description="two"
    )
    outputs = digits.model_outputs(states, split.test_inputs, split.test_labels)
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(states[name], again[name]) for name in states)
    assert not any(value.requires_grad for value in states.values())
    assert not torch.equal(outputs[0], outputs[1])
    assert (outputs > 0).float().mean() > 0.85  # f > 0: the true class has more than half
    assert "two" in capsys.readouterr().err


@pytest.mark.parametrize(("epochs", "size"), [(0, 10), (3, 0)])
def test_no_training_leaves_the_seeded_start(split, epochs, size):
    subsets = torch.zeros(2, size, dtype=torch.int64)
    states = digits.train_models(
        split.train_inputs, split.train_labels, subsets, [4, 9], epochs=epochs
    )
    for state, seed in zip(digits.unstack_states(states), (4, 9), strict=True):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            start = digits.make_model().state_dict()
        assert all(torch.equal(state[name], start[name]) for name in start)


def test_outputs_are_log_odds_and_finite_where_the_probability_is_one(split):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        models = [make_double_model() for _ in range(2)]
    states = {n: torch.stack([m.state_dict()[n] for m in models]) for n in models[0].state_dict()}
    inputs, labels = split.test_inputs.double(), split.test_labels
    got = digits.model_outputs(states, inputs, labels, model_factory=make_double_model)
    for row, model in zip(got, models, strict=True):
        p = model(inputs).softmax(-1)[range(100), labels]
        torch.testing.assert_close(row, (p / (1 - p)).log().detach(), atol=1e-12, rtol=0)

    sure = {name: value * 1000 for name, value in states.items()}
    logits = functional_call(models[0], {n: v[0] for n, v in sure.items()}, (inputs,))
    assert (logits.softmax(-1).amax(-1) == 1).any()
    outputs = digits.model_outputs(sure, inputs, labels, model_factory=make_double_model)
    assert outputs.isfinite().all()


X, Y, S = torch.zeros(4, 64), torch.zeros(4, dtype=torch.int64), torch.tensor([[0, 1], [2, 3]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X[0], Y, S, [0, 1]), r"inputs: expected 2 dimensions, got .*\[64\]"),
        ((X.long(), Y, S, [0, 1]), "inputs: expected a floating-point dtype, got .*int64"),
        ((X, Y[:3], S, [0, 1]), r"labels: expected one per input = \[4\], got .*\[3\]"),
        ((X, Y.float(), S, [0, 1]), "labels: expected an integer dtype, got .*float32"),
        ((X, Y, S.bool(), [0, 1]), "subsets: expected an integer dtype, got .*bool"),
        ((X, Y, S + 1, [0, 1]), r"subsets: expected integers in 0\.\.3, got 1\.\.4"),
        ((X, Y, S, [0]), r"seeds: expected .* one per row of subsets \(2\), got 1"),
        ((X, Y, S[:0], []), r"seeds: expected at least one, .*got 0"),
    ],
)
def test_training_refuses_what_does_not_fit(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        digits.train_models(*arguments)


@pytest.mark.parametrize("name", ["batch_size", "models_at_once"])
def test_training_refuses_empty_steps(name):
    with pytest.raises(ValueError, match=f"{name}: expected an integer of at least 1, got 0"):
        digits.train_models(X, Y, S, [0, 1], **{name: 0})


def test_training_refuses_buffers_which_it_would_not_update():
    factory = lambda: nn.Sequential(nn.BatchNorm1d(64), nn.Linear(64, 10))  # noqa: E731
    with pytest.raises(ValueError, match="model_factory: expected a model without buffers"):
        digits.train_models(X, Y, S, [0, 1], model_factory=factory)


def test_states_of_unequal_lengths_are_refused():
    with pytest.raises(ValueError, match=r"states: expected .* one length, got lengths \[2, 3\]"):
        digits.unstack_states({"a": torch.zeros(2, 1), "b": torch.zeros(3)})


@pytest.mark.parametrize("factory", [make_softmax, make_mlp3, make_cnn])
def test_other_networks_train_side_by_side(split, factory):
    subsets = torch.arange(300).expand(2, -1)
    states = digits.train_models(
        split.train_inputs, split.train_labels, subsets, [0, 1], model_factory=factory, epochs=30
    )
    state = digits.unstack_states(states)[1]
    logits = functional_call(factory(), state, (split.test_inputs,))
    assert logits.shape == (100, 10)
    assert (logits.argmax(1) == split.test_labels).float().mean() > 0.7


def test_outputs_after_retraining_are_means_over_the_networks_of_a_subset(split):
    masks = digits.subset_masks(2, 300, seed=3)
    got = digits.outputs_after_retraining(split, masks, 3, 40, epochs=2)
    for row, mask in zip(got, masks, strict=True):
        members = mask.nonzero()[:, 0].expand(3, -1)
        first = 40 if torch.equal(mask, masks[0]) else 43
        states = digits.train_models(
            split.train_inputs, split.train_labels, members, range(first, first + 3), epochs=2
        )
        outputs = digits.model_outputs(states, split.test_inputs, split.test_labels)
        torch.testing.assert_close(row, outputs.mean(0), atol=1e-4, rtol=1e-4)
