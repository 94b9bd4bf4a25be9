"""trak_ext.baselines against loops over samples, and the interface they share with Attributor."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from baseline_methods import CLASSES, GRADIENT_METHODS, METHODS, RATES, make, make_model
from trak_ext.baselines import (
    GradientCosine,
    GradientProduct,
    Random,
    RepresentationSimilarity,
    TracIn,
)
from trak_ext.baselines import base as base_module


def load(inputs, labels, batch_size=4):
    return DataLoader(TensorDataset(inputs, labels), batch_size=batch_size)


@pytest.fixture
def case():
    model = make_model()
    states = [copy.deepcopy(make_model().state_dict()) for _ in RATES]
    train = (torch.randn(11, 4), torch.randint(0, CLASSES, (11,)))
    test = (torch.randn(5, 4), torch.randint(0, CLASSES, (5,)))
    return model, states, train, test


def loss_gradients(model, state, data):
    """The gradient of each sample's cross-entropy, by a loop in fp64: [n, P]; and Q [n]."""
    model = copy.deepcopy(model).double().eval()
    model.load_state_dict(state)
    rows, weights = [], []
    for x, y in zip(*data, strict=True):
        logits = model(x.double()[None])
        loss = nn.functional.cross_entropy(logits, y[None])
        grads = torch.autograd.grad(loss, list(model.parameters()))
        rows.append(torch.cat([grad.reshape(-1) for grad in grads]))
        weights.append(1 - logits.softmax(1)[0, y].detach())
    return torch.stack(rows), torch.stack(weights)


def expected_scores(method, model, states, train, test):
    total = 0
    for state, rate in zip(states, RATES, strict=True):
        (g, _), (h, q) = (loss_gradients(model, state, data) for data in (train, test))
        if method is GradientProduct:  # -loss gradient of i along f's gradient -h / q of z
            total = total + (g @ (h / q[:, None]).T) / len(states)
        elif method is GradientCosine:
            total = total + nn.functional.cosine_similarity(g[:, None], h[None], 2) / len(states)
        else:
            total = total + rate * g @ h.T
    return total.float()


@pytest.mark.parametrize("method", GRADIENT_METHODS)
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_gradient_methods_equal_loops_over_loss_gradients(case, method, chunk_size):
    model, states, train, test = case
    baseline = make(method, model, states, chunk_size=chunk_size)
    baseline.fit(load(*train))
    got = baseline.attribute(load(*test))
    expected = expected_scores(method, model, states, train, test)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, atol=1e-5 * expected.abs().max().item(), rtol=0)


@pytest.mark.parametrize("method", GRADIENT_METHODS)
def test_projected_gradients_estimate_the_exact_ones(case, method):
    model, states, train, test = case
    exact = make(method, model, states)
    exact.fit(load(*train))
    close = make(method, model, states, proj_dim=16384)
    close.fit(load(*train))
    a, b = exact.attribute(load(*test)), close.attribute(load(*test))
    # k = 16384: a product of unit vectors errs by 1 / sqrt(k) = .008 of 1.
    assert (a - b).abs().max() < 0.05 * a.abs().max()
    assert not torch.equal(a, b)


def test_projected_product_is_unbiased(case):
    model, states, train, test = case
    exact = make(GradientProduct, model, states[:1])
    exact.fit(load(*train))
    expected = exact.attribute(load(*test))
    total = torch.zeros_like(expected)
    for seed in range(200):
        baseline = make(GradientProduct, model, states[:1], proj_dim=32, seed=seed)
        baseline.fit(load(*train))
        total += baseline.attribute(load(*test)) / 200
    # Each estimate errs by about 1/sqrt(32), the mean of 200 by .0125 of |g||h|.
    assert (total - expected).abs().max() < 0.06 * expected.abs().max()


@pytest.mark.parametrize("method", [GradientProduct, TracIn])
@pytest.mark.parametrize("proj_dim", [None, 64])
def test_self_influence_is_the_diagonal(case, method, proj_dim):
    model, states, train, _ = case
    baseline = make(method, model, states, proj_dim=proj_dim)
    baseline.fit(load(*train))
    torch.testing.assert_close(
        baseline.self_influence(), baseline.attribute(load(*train)).diagonal()
    )


@pytest.mark.parametrize("method", [GradientCosine, RepresentationSimilarity, Random])
def test_self_influence_that_tells_nothing_is_refused(case, method):
    model, states, train, _ = case
    baseline = make(method, model, states)
    baseline.fit(load(*train))
    with pytest.raises(NotImplementedError, match=f"self_influence: .* got {method.__name__}"):
        baseline.self_influence()


def test_params_choose_what_is_differentiated(case):
    model, states, train, test = case
    baseline = make(GradientProduct, model, states, params="5.*")
    baseline.fit(load(*train))
    names = [name for name, _ in model.named_parameters()]
    sizes = [parameter.numel() for parameter in model.parameters()]
    start = sum(sizes[: names.index("5.weight")])
    total = 0
    for state in states:
        (g, _), (h, q) = (loss_gradients(model, state, data) for data in (train, test))
        total = total + g[:, start:] @ (h / q[:, None])[:, start:].T / len(states)
    torch.testing.assert_close(baseline.attribute(load(*test)), total.float())


def hidden(model, state, inputs, depth):
    model = copy.deepcopy(model).eval()
    model.load_state_dict(state)
    with torch.no_grad():
        return model[:depth](inputs)


@pytest.mark.parametrize("similarity", ["cosine", "dot", "negative_distance"])
@pytest.mark.parametrize(
    ("module", "side", "depth"),
    [(None, "input", 5), ("5", "output", 6), ("3", "input", 3), ("1", "output", 2)],
)
def test_representation_similarity(case, similarity, module, side, depth):
    model, states, train, test = case
    baseline = RepresentationSimilarity(
        model, "image_classification", checkpoints=states, module=module, side=side,
        similarity=similarity, progress=False, chunk_size=3,
    )  # fmt: skip
    baseline.fit(load(*train))
    total = torch.zeros(11, 5)
    for state in states:
        a, b = (hidden(model, state, data[0], depth) for data in (train, test))
        if similarity == "dot":
            part = a @ b.T
        elif similarity == "cosine":
            part = nn.functional.cosine_similarity(a[:, None], b[None], 2)
        else:
            part = -(a[:, None] - b[None]).norm(dim=2)
        total += part / len(states)
    torch.testing.assert_close(baseline.attribute(load(*test)), total, atol=1e-5, rtol=1e-5)
    assert not model[5]._forward_hooks
    assert model.training  # as it was


def test_random_scores_depend_on_seed_and_positions_alone(case, monkeypatch):
    model, states, train, test = case
    first, again, other = (
        Random(model, "image_classification", checkpoints=c, seed=s, progress=False)
        for c, s in ((states, 1), (states[:1], 1), (states, 2))
    )
    for baseline, size in ((first, 4), (again, 11), (other, 4)):
        baseline.fit(load(*train, batch_size=size))
    scores = first.attribute(load(*test))
    monkeypatch.setattr(base_module, "_BLOCK_SCORES", 7)
    assert torch.equal(scores, again.attribute(load(*test, batch_size=2)))
    assert not torch.equal(scores, other.attribute(load(*test)))
    assert len(scores.unique()) == 55


def test_random_scores_are_standard_normal_and_uncorrelated():
    baseline = Random(make_model(), "image_classification", progress=False)
    baseline.fit([(torch.zeros(2000, 4), torch.zeros(2000, dtype=torch.int64))])
    scores = baseline.attribute([(torch.zeros(50, 4), torch.zeros(50, dtype=torch.int64))])
    assert abs(scores.mean().item()) < 4 / 100_000**0.5
    assert abs(scores.std().item() - 1) < 4 / 200_000**0.5
    off_diagonal = scores.T.corrcoef() - torch.eye(50)
    assert off_diagonal.abs().max() < 5 / 2000**0.5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("block", [1, 13, 2**22])
def test_top_k_is_that_of_all_scores(case, method, largest, block, monkeypatch):
    model, states, train, test = case
    train = tuple(tensor[[*range(11), 2, 7]] for tensor in train)  # two ties
    baseline = make(method, model, states)
    baseline.fit(load(*train))
    scores = baseline.attribute(load(*test))
    monkeypatch.setattr(base_module, "_BLOCK_SCORES", block)
    best = baseline.attribute(load(*test), top_k=4, largest=largest)
    expected, order = scores.sort(dim=0, descending=largest, stable=True)
    torch.testing.assert_close(best.values, expected[:4].T)
    if block > 13 * 5 or method is Random:  # else the matrix product's last bits may differ
        assert torch.equal(best.indices, order[:4].T)
    assert baseline.attribute(load(*test), top_k=0).values.shape == (5, 0)


@pytest.mark.parametrize("method", METHODS)
def test_misuse_gets_one_sentence(case, method):
    model, states, train, test = case
    baseline = make(method, model, states)
    with pytest.raises(ValueError, match="fit: expected a call of it before this one"):
        baseline.attribute(load(*test))
    with pytest.raises(ValueError, match="train_loader: expected a loader that keeps the order"):
        baseline.fit(DataLoader(TensorDataset(*train), shuffle=True))
    with pytest.raises(ValueError, match="train_loader: expected the same samples"):
        baseline.fit(Changing())
    baseline.fit(load(*train))
    with pytest.raises(ValueError, match="top_k: expected an integer from 0 to 11, got 12"):
        baseline.attribute(load(*test), top_k=12)
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got 'm'"):
        make(method, "m", states)
    with pytest.raises(ValueError, match="device: expected a torch device of this machine"):
        make(method, model, states, device="nowhere")
    with pytest.raises(ValueError, match="chunk_size: expected an integer from 1"):
        make(method, model, states, chunk_size=0)


class Changing:
    """A loader that brings other data on every pass, from its second batch on."""

    def __iter__(self):
        yield torch.ones(3, 4), torch.zeros(3, dtype=torch.int64)
        yield torch.randn(3, 4), torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize("method", METHODS[:-1])
def test_samples_with_nan_or_inf_are_named(case, method):
    model, states, train, _ = case
    train[0][7] = torch.nan
    baseline = make(method, model, states)
    with pytest.raises(ValueError, match=r"train_loader: .* for 1 of them: 7$"):
        baseline.fit(load(*train))


@pytest.mark.parametrize(
    ("method", "arguments", "error", "message"),
    [
        (GradientProduct, {"proj_dim": 0}, ValueError, "proj_dim: expected an integer from 1"),
        (GradientProduct, {"kind": "dense"}, ValueError, "kind: expected one of"),
        (GradientProduct, {"params": "no.*"}, ValueError, "params: expected patterns"),
        (TracIn, {"learning_rates": [0.1]}, ValueError, r"learning_rates: expected one .*\(2\)"),
        (TracIn, {"learning_rates": 0.1}, TypeError, "learning_rates: expected a list of numbers"),
        (TracIn, {"learning_rates": [1, -1]}, ValueError, r"learning_rates\[1\]: .* got -1"),
        (Random, {"seed": -1}, ValueError, "seed: expected an integer from 0"),
        (
            RepresentationSimilarity,
            {"module": "9"},
            ValueError,
            r"module: expected a name in named_modules\(\) .* got '9'",
        ),
        (RepresentationSimilarity, {"side": "inside"}, ValueError, "side: expected one of"),
        (RepresentationSimilarity, {"similarity": "l1"}, ValueError, "similarity: expected one"),
    ],
)
def test_bad_settings_get_one_sentence(case, method, arguments, error, message):
    model, states, _, _ = case
    with pytest.raises(error, match=message) as caught:
        method(model, "image_classification", checkpoints=states, progress=False, **arguments)
    assert "\n" not in str(caught.value)


def test_a_module_that_a_batch_reaches_twice_or_never_is_refused():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(self.layer(x))

    data = [(torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64))]
    for name in ("layer", "idle"):
        baseline = RepresentationSimilarity(
            Twice(), "image_classification", module=name, progress=False
        )
        with pytest.raises(ValueError, match="module: expected one that sees each batch of 3"):
            baseline.fit(data)


def test_an_empty_training_set_is_refused(case):
    model, states, _, _ = case
    for method in METHODS:
        baseline = make(method, model, states)
        with pytest.raises(ValueError, match="train_loader: expected at least one sample, got no"):
            baseline.fit([])
