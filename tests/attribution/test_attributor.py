"""Attributor from end to end against brute force: every gradient by a loop, the matrix written out.

The reference shares nothing with the package but `trak_ext.reference`, the NumPy oracle.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.utils.data import DataLoader, TensorDataset

import trak_ext
from attributor_cases import (
    CASES,
    PROJ_DIM,
    assert_scores,
    attributor,
    batches,
    brute_force,
    conv_net,
    images,
    mlp,
    states_of,
    vectors,
)
from trak_ext.tasks import Task


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
        {"kind": "rademacher", "seed": 2},
    ],
    ids=["defaults", "options", "sparse", "rademacher"],
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
    options = {"checkpoints": states_of(model), "store": None if in_memory else tmp_path / "s"}
    fitted = attributor(model, **options)
    with pytest.raises(ValueError, match="train_loader: expected at least one sample, got none"):
        fitted.fit(train)


def test_no_targets():
    fitted = attributor(mlp())
    fitted.fit([vectors(9)])
    assert fitted.attribute([]).shape == (9, 0)
    assert fitted.attribute([vectors(0)]).shape == (9, 0)
    best = fitted.attribute([], top_k=2)
    assert best.values.shape == best.indices.shape == (0, 2)


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
