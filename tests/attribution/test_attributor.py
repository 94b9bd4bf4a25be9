"""Attributor from end to end against brute force: every gradient by a loop, the matrix written out.

The reference shares nothing with the package but `trak_ext.reference`, the NumPy oracle.
"""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import trak_ext
from trak_ext import Attributor, StoreError, reference
from trak_ext.tasks import Task

PROJ_DIM = 12
CLASSES = 3


def conv_net():
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(48, CLASSES),
    )


def mlp(outputs=CLASSES):
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, outputs))


class Text(nn.Module):
    """Called with keywords; its output has logits. The embedding is the output layer too."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(CLASSES, 8)
        self.body = nn.Linear(8, 8)
        self.head = nn.Linear(8, CLASSES, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, input_ids, attention_mask):
        hidden = (self.body(self.embed(input_ids)) * attention_mask[:, :, None]).mean(1)
        return SimpleNamespace(logits=self.head(hidden), loss=None)


def images(count):
    return torch.randn(count, 1, 4, 4), torch.randint(0, CLASSES, (count,))


def vectors(count):
    return torch.randn(count, 4), torch.randint(0, CLASSES, (count,))


def vectors_of_seed(seed):
    torch.manual_seed(seed)
    return vectors(9)


def values(count):
    return torch.randn(count, 4), torch.randn(count)


def texts(count):
    return {
        "input_ids": torch.randint(0, CLASSES, (count, 5)),
        "attention_mask": torch.randint(0, 2, (count, 5)),
        "labels": torch.randint(0, CLASSES, (count,)),
    }


CASES = {
    "image_classification": (conv_net, images),
    "text_classification": (Text, texts),
    "regression": (lambda: mlp(1), values),
}


def states_of(model, count=2):
    """State dicts of `count` checkpoints, running figures of BatchNorm included."""
    states = []
    for _ in range(count):
        changed = copy.deepcopy(model)
        with torch.no_grad():
            for name, tensor in changed.state_dict().items():
                if "var" in name:
                    tensor.uniform_(0.5, 1.5)
                elif tensor.is_floating_point():
                    tensor.add_(0.2 * torch.randn_like(tensor))
        states.append({name: tensor.clone() for name, tensor in changed.state_dict().items()})
    return states


def batches(data, size):
    """The samples in batches: tuples or mappings, as they came."""
    if isinstance(data, dict):
        pieces = {key: tensor.split(size) for key, tensor in data.items()}
        return [dict(zip(pieces, part, strict=True)) for part in zip(*pieces.values(), strict=True)]
    return list(zip(*(tensor.split(size) for tensor in data), strict=True))


def double(tensor):
    return tensor.double() if tensor.is_floating_point() else tensor


def by_hand(task, model, sample):
    """f and Q of a batch of one sample, from p itself."""
    if isinstance(sample, dict):
        inputs = {key: double(value) for key, value in sample.items() if key != "labels"}
        prediction, label = model(**inputs).logits[0], sample["labels"][0]
    else:
        prediction, label = model(double(sample[0]))[0], double(sample[1])[0]
    if task == "regression":
        return prediction[0], label - prediction[0]
    p = prediction.softmax(0)[label]
    return (p / (1 - p)).log(), 1 - p


def brute_force(task, model, states, train, test, *, damping=1.0, kind="rademacher", seed=0,
                names=None, nnz=1):  # fmt: skip
    """Scores [n, t] in fp64, and the training features [M, n, k]."""

    def features(state, m, data):
        copied = copy.deepcopy(model).double()
        copied.load_state_dict(state)
        copied.eval()
        chosen = [p for name, p in copied.named_parameters() if names is None or name in names]
        rows, weights = [], []
        for sample in batches(data, 1):
            f, q = by_hand(task, copied, sample)
            rows.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(f, chosen)]))
            weights.append(float(q.detach()))
        matrix = reference.projection_matrix(
            sum(parameter.numel() for parameter in chosen), PROJ_DIM, kind=kind, seed=seed,
            model_id=m, nnz=nnz,
        )  # fmt: skip
        return torch.stack(rows).numpy() @ matrix.astype(np.float64), weights

    phi, q = zip(*(features(state, m, train) for m, state in enumerate(states)), strict=True)
    targets = np.stack([features(state, m, test)[0] for m, state in enumerate(states)])
    phi = np.stack(phi)
    return reference.score(phi, targets, np.array(q), damping=damping), phi


def attributor(model, task="image_classification", **options):
    return Attributor(
        model,
        task,
        **{"proj_dim": PROJ_DIM, "damping": 1.0, "curvature": None, "progress": False, **options},
    )


def assert_scores(got, expected, tolerance=1e-4):
    """Per target, the largest difference against the largest score."""
    assert got.dtype == torch.float32
    assert got.shape == expected.shape
    difference = np.abs(got.double().numpy() - expected).max(0)
    assert (difference <= tolerance * np.abs(expected).max(0)).all(), difference


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(trak_ext.store.base, "shard_rows", lambda proj_dim: 8)


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("task", CASES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kind": "normal", "seed": 2**64 - 1, "damping": 0.1},
        {"kind": "sjlt", "nnz": 2, "seed": 3},
    ],
    ids=["defaults", "options", "sparse"],
)
def test_equals_brute_force(task, options):
    model, make = CASES[task][0](), CASES[task][1]
    train, test = make(29), make(5)
    states = states_of(model)
    expected, phi = brute_force(task, model, states, train, test, **options)
    fitted = attributor(model, task, checkpoints=states, **options)
    fitted.fit(batches(train, 10))
    assert_scores(fitted.attribute(batches(test, 3)), expected)
    # And the features themselves: those of the tasks and matrices of both checkpoints.
    got = torch.stack([
        torch.cat([fitted._store.read(m, start).features for start in range(0, 29, 8)])
        for m in range(2)
    ])  # fmt: skip
    np.testing.assert_allclose(got, phi, rtol=0, atol=1e-5 * np.abs(phi).max())


@pytest.mark.parametrize(
    ("params", "names"),
    [("5.*", ["5.weight", "5.bias"]), (["*.bias"], ["0.bias", "1.bias", "5.bias"])],
)
def test_chosen_parameters_alone(params, names):
    model, train, test = conv_net(), images(20), images(4)
    states = states_of(model)
    expected, _ = brute_force(
        "image_classification", model, states, train, test, names=names
    )  # fmt: skip
    fitted = attributor(model, checkpoints=states, params=params)
    fitted.fit(batches(train, 20))
    assert_scores(fitted.attribute(batches(test, 4)), expected)


def test_the_models_own_weights_by_default():
    model, train, test = mlp(), vectors(20), vectors(3)
    expected, _ = brute_force("any", model, [model.state_dict()], train, test)
    fitted = attributor(model)
    fitted.fit(batches(train, 7))
    assert_scores(fitted.attribute(batches(test, 3)), expected)


@pytest.mark.parametrize("form", ["tuples", "lists", "loader", "generator"])
def test_forms_of_loaders(form):
    model, train, test = mlp(), vectors(20), vectors(3)

    def loader(data):
        return {
            "tuples": batches(data, 6),
            "lists": [list(batch) for batch in batches(data, 6)],
            "loader": DataLoader(TensorDataset(*data), batch_size=6),
            "generator": (batch for batch in batches(data, 6)),
        }[form]

    whole, fitted = attributor(model), attributor(model)
    whole.fit([train])
    fitted.fit(loader(train))
    expected = whole.attribute([test]).numpy()
    assert_scores(fitted.attribute(loader(test)), expected, 1e-5)


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("size", [1, 8, 11, 29])
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_batches_and_chunks_do_not_matter(size, chunk_size):
    model, train, test = conv_net(), images(29), images(4)
    plain, cut = attributor(model), attributor(model, chunk_size=chunk_size)
    plain.fit([train])
    cut.fit(batches(train, size))
    assert_scores(cut.attribute(batches(test, 1)), plain.attribute([test]).numpy(), 1e-5)


@pytest.mark.parametrize("num_train", [1, 7, 8, 9, 16, 29])
@pytest.mark.parametrize("rows", [1, 8, 1000])
def test_shards_do_not_matter(num_train, rows, monkeypatch):
    model, train, test = mlp(), vectors(num_train), vectors(3)
    whole, sharded = attributor(model), attributor(model)
    whole.fit([train])
    expected = whole.attribute([test]).numpy()
    monkeypatch.setattr(trak_ext.store.base, "shard_rows", lambda proj_dim: rows)
    sharded.fit(batches(train, 5))
    assert_scores(sharded.attribute([test]), expected, 1e-5)
    assert sum("features-" in name for _, name in sharded._store._records) == -(-num_train // rows)


def weighted(model, batch):
    return model(batch["x"])[:, 0], batch["q"]


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("top_k", [0, 1, 5, 8, 9, 29])
def test_top_k_is_the_sorted_scores(top_k):
    model = mlp()
    # Weights of zero make many exact ties, across shards too.
    train = {"x": torch.randn(29, 4), "q": torch.randint(0, 2, (29,)).float()}
    test = {"x": torch.randn(6, 4), "q": torch.ones(6)}
    fitted = attributor(model, Task("weighted", weighted), checkpoints=states_of(model))
    fitted.fit([train])
    ordered = fitted.attribute([test]).T.sort(dim=1, descending=True, stable=True)
    best = fitted.attribute([test], top_k=top_k)
    assert torch.equal(best.values, ordered.values[:, :top_k])
    assert torch.equal(best.indices, ordered.indices[:, :top_k])
    assert best.values.dtype == torch.float32
    assert best.indices.dtype == torch.int64


@pytest.mark.usefixtures("small_shards")
def test_self_influence_is_the_diagonal():
    model, train = conv_net(), images(29)
    states = states_of(model)
    fitted = attributor(model, checkpoints=states)
    fitted.fit(batches(train, 10))
    got = fitted.self_influence()
    assert got.dtype == torch.float32
    expected, _ = brute_force("image_classification", model, states, train, train)
    for diagonal in (fitted.attribute([train]).diagonal().numpy(), expected.diagonal()):
        assert np.abs(got.numpy() - diagonal).max() <= 1e-5 * np.abs(diagonal).max()


@pytest.mark.usefixtures("small_shards")
def test_a_store_opened_again_gives_the_same_bits(tmp_path):
    model, train, test = conv_net(), images(29), images(5)
    states = states_of(model)
    memory = attributor(model, checkpoints=states)
    first = attributor(model, checkpoints=states, store=tmp_path / "s")
    for fitted in (memory, first):
        fitted.fit(batches(train, 10))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    again = attributor(copy.deepcopy(model), checkpoints=states, store=str(tmp_path / "s"))
    scores = first.attribute([test])
    best = first.attribute([test], top_k=7)
    for other in (memory, again):
        assert torch.equal(other.attribute([test]), scores)
        assert torch.equal(other.attribute([test], top_k=7).indices, best.indices)
        assert torch.equal(other.self_influence(), first.self_influence())
    # Attributing reads only, and damping is no part of a store.
    damped = attributor(model, checkpoints=states, store=tmp_path / "s", damping=5.0)
    assert not torch.equal(damped.attribute([test]), scores)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_paths_are_as_good_as_state_dicts(tmp_path):
    model, train, test = conv_net(), images(15), images(3)
    states = states_of(model)
    save_file(states[0], tmp_path / "m.safetensors")
    torch.save(states[1], tmp_path / "m.pt")
    dicts = attributor(model, checkpoints=states, store=tmp_path / "s")
    dicts.fit([train])
    paths = [tmp_path / "m.safetensors", str(tmp_path / "m.pt")]
    files = attributor(model, checkpoints=paths, store=tmp_path / "s")  # the store is theirs too
    files.fit([train])
    assert torch.equal(files.attribute([test]), dicts.attribute([test]))


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("train", [[], [(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))]])
def test_no_training_samples(train, in_memory, tmp_path):
    model = mlp()
    options = {"checkpoints": states_of(model), "store": None if in_memory else tmp_path}
    fitted = attributor(model, **options)
    fitted.fit(train)
    if not in_memory:
        fitted = attributor(model, **options)
    assert fitted.attribute([vectors(3)]).shape == (0, 3)
    best = fitted.attribute([vectors(3)], top_k=0)
    assert best.values.shape == best.indices.shape == (3, 0)
    assert fitted.self_influence().shape == (0,)
    with pytest.raises(ValueError, match="top_k: expected an integer from 0 to 0, got 1"):
        fitted.attribute([vectors(3)], top_k=1)


def test_no_targets():
    fitted = attributor(mlp())
    fitted.fit([vectors(9)])
    assert fitted.attribute([]).shape == (9, 0)
    assert fitted.attribute([vectors(0)]).shape == (9, 0)
    best = fitted.attribute([], top_k=2)
    assert best.values.shape == best.indices.shape == (0, 2)


class Counted(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = mlp()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.layers(x)


@pytest.mark.usefixtures("small_shards")
def test_a_fitted_store_is_compared_and_not_computed_again(tmp_path):
    model, train = Counted(), vectors(20)
    first = attributor(model, store=tmp_path)
    first.fit([train])
    assert model.calls == 3
    again = attributor(model, store=tmp_path)
    again.fit([train])
    assert model.calls == 3


def test_gradients_meet_the_matrix_a_parameter_at_a_time_without_a_copy(monkeypatch):
    made, projected, order = [], [], []
    compute = trak_ext.attribution.features.GradientComputer.__call__
    project = trak_ext.attribution.features.operators.project

    def noted_compute(self, weights, batch, *context):
        for part in compute(self, weights, batch, *context):
            made.append([grad.data_ptr() for grad in part.grads.values()])
            order.append(list(part.grads))
            yield part

    def noted_project(grads, *args):
        projected.append([grad.data_ptr() for grad in grads])
        assert not any(grad.requires_grad for grad in grads)
        return project(grads, *args)

    monkeypatch.setattr(trak_ext.attribution.features.GradientComputer, "__call__", noted_compute)
    monkeypatch.setattr(trak_ext.attribution.features.operators, "project", noted_project)
    model = conv_net()
    attributor(model, chunk_size=4).fit([images(9)])
    assert len(projected) == 3
    assert projected == made
    names = [name for name, _ in model.named_parameters()]
    assert all(list(grads) == names for grads in order)


def test_the_model_is_as_it_was():
    model = conv_net()
    model[1].eval()
    before = copy.deepcopy(model.state_dict())
    fitted = attributor(model, checkpoints=states_of(model))
    fitted.fit([images(9)])
    fitted.attribute([images(2)])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model] == [True, False, True, True, True, True]
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_models_of_other_dtypes(dtype):
    model = mlp().to(dtype)
    (x, y), (x_test, y_test) = vectors(20), vectors(3)
    x, x_test = x.to(dtype), x_test.to(dtype)
    fitted = attributor(model)
    fitted.fit([(x, y)])
    expected, _ = brute_force("any", model, [model.state_dict()], (x, y), (x_test, y_test))
    got = fitted.attribute([(x_test, y_test)])
    assert_scores(got, expected, {torch.float64: 1e-5, torch.bfloat16: 0.1}[dtype])


def test_results_are_fp32_under_another_default_dtype(tmp_path):
    model, train, test = mlp(), vectors(9), vectors(3)
    attributor(model, store=tmp_path).fit([train])
    torch.set_default_dtype(torch.float64)
    try:
        fitted = attributor(model)
        fitted.fit([train])
        results = [
            fitted._store.read(0, 0).features,
            fitted.attribute([test]),
            fitted.attribute([test], top_k=2).values,
            fitted.attribute([test], top_k=0).values,
            fitted.self_influence(),
        ]
    finally:
        torch.set_default_dtype(torch.float32)
    assert [result.dtype for result in results] == [torch.float32] * 5
    expected = attributor(model, store=tmp_path).attribute([test])
    assert torch.equal(results[1].float(), expected)


def test_autocast_is_honoured_and_part_of_a_store(tmp_path):
    model, train, test = mlp(), vectors(20), vectors(3)
    plain = attributor(model)
    plain.fit([train])
    with torch.autocast("cpu", torch.bfloat16):
        fitted = attributor(model, store=tmp_path)
        fitted.fit([train])
        scores = fitted.attribute([test])
    exact = plain.attribute([test])
    assert 1e-4 < float((scores - exact).abs().max() / exact.abs().max()) < 0.1
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for use in (fitted.attribute, fitted.fit, attributor(model, store=tmp_path).fit):
        with pytest.raises(StoreError, match=r'autocast = null, got "torch\.bfloat16"'):
            use([train])
    with (
        torch.autocast("cpu", torch.float16),
        pytest.raises(StoreError, match=r'autocast = "torch\.float16", got "torch\.bfloat16"'),
    ):
        fitted.attribute([test])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attributor(model, store=tmp_path).attribute([test]), scores)
    assert {path: path.read_bytes() for path in before} == before


def test_autocast_at_fit_alone_is_refused_in_memory_as_well():
    fitted = attributor(mlp())
    with torch.autocast("cpu", torch.bfloat16):
        fitted.fit([vectors(9)])
    with pytest.raises(StoreError, match="autocast"):
        fitted.attribute([vectors(2)])


class Shuffled:
    """Another order at every pass, in a form that no look at the loader tells."""

    def __init__(self, data):
        self.data = data

    def __iter__(self):
        order = torch.randperm(len(self.data[0]))
        return iter([tuple(tensor[order] for tensor in self.data)])


def test_a_train_loader_that_changes_between_passes_is_refused():
    model = mlp()
    fitted = attributor(model, checkpoints=states_of(model))
    with pytest.raises(ValueError, match=r"^train_loader: expected the same samples in the same"):
        fitted.fit(Shuffled(vectors(20)))


def test_a_test_loader_that_changes_between_passes_is_refused():
    model = mlp()
    fitted = attributor(model, checkpoints=states_of(model))
    fitted.fit([vectors(20)])
    with pytest.raises(ValueError, match=r"^test_loader: expected the same samples in the same"):
        fitted.attribute(Shuffled(vectors(20)))


def test_a_test_loader_of_changing_length_is_refused():
    class Growing(list):
        def __iter__(self):
            self.append(vectors(2))
            return super().__iter__()

    model = mlp()
    fitted = attributor(model, checkpoints=states_of(model))
    fitted.fit([vectors(20)])
    with pytest.raises(ValueError, match=r"^test_loader: expected (?!.*None).*, got"):
        fitted.attribute(Growing())


def test_parameters_in_another_order_are_another_store(tmp_path):
    # The same names and shapes, but the rows of the matrix that they meet are exchanged.
    class Scaled(nn.Module):
        def __init__(self, names):
            super().__init__()
            for name in names:
                self.register_parameter(name, nn.Parameter(torch.ones(4)))
            self.layers = mlp()

        def forward(self, x):
            return self.layers(x * self.a * self.b.square())

    first, turned = Scaled("ab"), Scaled("ba")
    turned.load_state_dict(first.state_dict())
    attributor(first, store=tmp_path).fit([vectors(9)])
    with pytest.raises(StoreError, match="params"):
        attributor(turned, store=tmp_path).attribute([vectors(2)])


class Applies(nn.Module):
    """A module whose repr shows a function, hence an address, as repr does."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def extra_repr(self):
        return f"function={self.function}"

    def forward(self, x):
        return self.function(x)


def test_a_store_does_not_depend_on_addresses(tmp_path):
    state = mlp().state_dict()
    for _ in range(2):
        model = nn.Sequential(*mlp(), Applies(lambda x: 2 * x))
        fitted = attributor(model, checkpoints=[state], store=tmp_path)
        fitted.fit([vectors_of_seed(3)])
    assert fitted.attribute([vectors(2)]).shape == (9, 2)


def test_progress_goes_to_stderr_and_can_be_silent(capsys):
    for progress in (False, True):
        fitted = attributor(mlp(), progress=progress)
        fitted.fit([vectors(9)])
        fitted.attribute([vectors(2)])
        captured = capsys.readouterr()
        assert captured.out == ""
        assert ("fit" in captured.err and "9 samples" in captured.err) == progress
        assert ("targets" in captured.err) == progress


def test_blocks_of_the_sparse_kind_see_every_parameter():
    # Each block is a projection of nnz repetitions of its own.
    made = attributor(mlp(), kind="sjlt", nnz=2, blocks=3)
    rows, width = [], 3 * PROJ_DIM
    made.fit([vectors(9)])
    features = made._store.read(0, 0).features
    assert features.shape == (9, width)
    params = sum(parameter.numel() for parameter in mlp().parameters())
    matrix = trak_ext.projection_matrix(params, width, kind="sjlt", nnz=6)
    for block in matrix.split(PROJ_DIM, 1):
        assert ((block != 0).sum(1) == 2).all()
        rows.append(block.abs().max().item() ** 2)
    assert rows == pytest.approx([PROJ_DIM / 2] * 3)


def test_stores_of_the_sparse_kind_say_their_nnz_and_others_say_nothing(tmp_path):
    model = mlp()
    attributor(model, store=tmp_path / "dense").fit([vectors(9)])
    assert "nnz" not in json.loads((tmp_path / "dense" / "manifest.json").read_text())
    sparse = {"kind": "sjlt", "store": tmp_path / "sparse"}
    attributor(model, nnz=2, **sparse).fit([vectors(9)])
    assert json.loads((tmp_path / "sparse" / "manifest.json").read_text())["nnz"] == 2
    attributor(model, nnz=2, **sparse).attribute([vectors(2)])
    with pytest.raises(trak_ext.StoreError, match="nnz"):
        attributor(model, nnz=4, **sparse).attribute([vectors(2)])
    with pytest.raises(ValueError, match=f"nnz: expected a positive divisor .* {PROJ_DIM}"):
        attributor(model, kind="sjlt", nnz=7)
    with pytest.raises(ValueError, match="nnz: expected 1 with kind 'rademacher'"):
        attributor(model, nnz=2)


def test_the_manifest_says_what_made_the_store(tmp_path):
    attributor(mlp(), seed=7, kind="normal", store=tmp_path).fit([vectors(9)])
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    expected = {"seed": 7, "kind": "normal", "proj_dim": PROJ_DIM, "task": "image_classification",
                "law_version": reference.LAW_VERSION, "autocast": None}  # fmt: skip
    assert {key: manifest[key] for key in expected} == expected
