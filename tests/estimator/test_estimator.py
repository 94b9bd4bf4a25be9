"""The estimator's options in Attributor, against the reference on its own features."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from torch import nn

import trak_ext
from small_setting import NUM_TRAIN, PROJ_DIM, fitted, setting
from trak_ext import Attributor, reference
from trak_ext.estimator.damping import (
    USUAL,
    ImpliedRidge,
    choose_damping,
    fitted_above,
    ridge_of_sums,
)
from trak_ext.estimator.formula import Estimator
from trak_ext.tasks import TASKS, Task


def features_of(attributor, start=0):
    """Return features [M, n, width], Q and R [M, n] as the store has them."""
    shards = [attributor._store.read(m, start) for m in range(2)]
    return [torch.stack([getattr(s, key) for s in shards]).numpy()
            for key in ("features", "weight", "curvature")]  # fmt: skip


def targets_of(attributor):
    """Return the features of the targets, by fitting them as if they were training samples."""
    model, states, _, test = setting()
    own = {key: attributor.settings[key] for key in ("proj_dim", "blocks", "seed")}
    other = Attributor(
        model, "image_classification", checkpoints=states, progress=False, **own
    )  # fmt: skip
    other.fit([test])
    return features_of(other)[0]


OPTIONS = {
    "plain": {},
    "ridge": {"damping": 0.0, "ridge": 3.0},
    "own curvature": {"curvature": "own"},
    "mean curvature": {"curvature": "mean"},
    "leverage": {"leverage": True, "damping": 0.5},
    "all": {"curvature": "mean", "leverage": True, "damping": 0.25, "ridge": 0.5},
}


def expected_scores(attributor, options, blocks):
    phi, q, r = features_of(attributor)
    targets = targets_of(attributor)
    weights = {"own": r, "mean": np.broadcast_to(r.mean(0), r.shape)}
    options = {**options, "curvature": weights.get(options.get("curvature"))}
    parts = []
    for b in range(blocks):
        columns = slice(b * PROJ_DIM, (b + 1) * PROJ_DIM)
        own = reference.score(phi[..., columns], targets[..., columns], q, **options)
        parts.append(own)
    return np.mean(parts, 0)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("rows", [8, 1000])
def test_scores_equal_the_reference(name, blocks, rows, monkeypatch):
    options = OPTIONS[name]
    made = fitted(blocks=blocks, **options)
    expected = expected_scores(made, options, blocks)
    monkeypatch.setattr("trak_ext.store.base.shard_rows", lambda width: rows)
    made = fitted(blocks=blocks, **options)
    test = setting()[3]
    scores = made.attribute([test])
    assert np.abs(scores.numpy() - expected).max() <= 1e-4 * np.abs(expected).max()
    best = made.attribute([test], top_k=4)
    assert torch.equal(
        best.values, scores.T.sort(dim=1, descending=True, stable=True).values[:, :4]
    )


@pytest.mark.parametrize("name", OPTIONS)
def test_self_influence_is_the_diagonal(name):
    made = fitted(blocks=2, **OPTIONS[name])
    diagonal = made.attribute([setting()[2]]).diagonal()
    difference = (made.self_influence() - diagonal).abs().max()
    assert float(difference) <= 1e-5 * float(diagonal.abs().max())


@pytest.mark.parametrize("curvature", [None, "own", "mean"])
@pytest.mark.parametrize("ends", [(29,), (7, 29)])
def test_auto_is_what_the_rule_says_of_each_kernel_and_fit(curvature, ends):
    model, states, train, test = setting()
    auto = Attributor(
        model, "image_classification", checkpoints=states, proj_dim=PROJ_DIM, blocks=2,
        curvature=curvature, progress=False,
    )  # fmt: skip
    assert auto.settings["damping"] == "auto"
    start = 0
    for part, stop in enumerate(ends):
        auto.fit([tuple(t[start:stop] for t in train)], addition=part)
        start = stop
    phi, q, r = features_of(fitted(blocks=2))
    targets = targets_of(fitted(blocks=2))
    f = np.stack([fitted(blocks=2)._store.read(m, 0).output.numpy() for m in range(2)])
    assert np.allclose(q, 1 / (1 + np.exp(f)), atol=1e-6)
    weights = {None: np.ones_like(r), "own": r, "mean": np.broadcast_to(r.mean(0), r.shape)}
    sums = []
    for m, b in product(range(2), range(2)):
        # The first part says what counts as fitted.
        ridge = ImpliedRidge(PROJ_DIM, fitted_above(torch.tensor(f[m, : ends[0]])))
        block = torch.tensor(phi[m, :, b * PROJ_DIM : (b + 1) * PROJ_DIM])
        ridge.add(block, *(torch.tensor(figure[m]) for figure in (q, f, r)))
        sums.append(ridge.sums)
    implied = ridge_of_sums(torch.stack(sums), curvature=curvature is not None)
    parts = []
    for m, b in product(range(2), range(2)):
        columns = slice(b * PROJ_DIM, (b + 1) * PROJ_DIM)
        own = weights[curvature][m]
        kernel = trak_ext.kernel_matrix(torch.tensor(phi[m, :, columns]), torch.tensor(own))
        part = reference.score(
            phi[m : m + 1, :, columns], targets[m : m + 1, :, columns], np.ones((1, NUM_TRAIN)),
            damping=choose_damping(kernel, NUM_TRAIN, implied), curvature=own[None],
        )  # fmt: skip
        parts.append(part)
    expected = np.mean(parts, 0) * q.mean(0)[:, None]
    got = auto.attribute([test]).numpy()
    assert np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("log_odds", [False, True])
def test_only_a_task_of_log_odds_implies_a_ridge(log_odds):
    model, states, train, test = setting()
    task = Task("mine", TASKS["image_classification"].function, log_odds=log_odds)
    common = {"checkpoints": states, "proj_dim": PROJ_DIM, "progress": False, "curvature": None}
    auto = Attributor(model, task, **common)
    auto.fit([train])
    known = Attributor(model, "image_classification", **common)
    known.fit([train])
    usual = Attributor(model, task, damping=USUAL * PROJ_DIM / NUM_TRAIN, **common)
    usual.fit([train])
    expected = known if log_odds else usual
    torch.testing.assert_close(auto.attribute([test]), expected.attribute([test]))
    assert not torch.allclose(known.attribute([test]), usual.attribute([test]))


@pytest.mark.parametrize(("kind", "nnz"), [("rademacher", 1), ("normal", 1), ("sjlt", 3)])
def test_blocks_are_columns_of_one_matrix(kind, nnz):
    """Of a sparse one each block has entries of its own: as many blocks as it has repetitions."""
    wide = fitted(proj_dim=3 * PROJ_DIM, kind=kind, nnz=nnz)
    blocks = fitted(blocks=3, kind=kind)
    assert np.array_equal(features_of(wide)[0], features_of(blocks)[0])


@pytest.mark.parametrize("first", OPTIONS)
def test_a_store_serves_any_estimator(first, tmp_path):
    """Kernels that the store lacks are made from its features; fit adds the one asked for."""
    fitted(tmp_path, **OPTIONS[first])
    model, states, train, test = setting()
    for options in OPTIONS.values():
        fresh = fitted(**options)
        for fit_again in (False, True):
            again = Attributor(
                model, "image_classification", checkpoints=states, proj_dim=PROJ_DIM,
                store=tmp_path, progress=False, **{"damping": 1.0, "curvature": None, **options},
            )  # fmt: skip
            if fit_again:
                again.fit([train])
            assert torch.equal(again.attribute([test]), fresh.attribute([test]))
    names = {path.name for path in (tmp_path / "checkpoint-0001").iterdir()}
    assert names == {
        "features-000000000000.safetensors", "finished.safetensors", "kernel-plain.safetensors",
        "kernel-own.safetensors", "kernel-mean-0002.safetensors", "probe.safetensors",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"damping": "best"}, r"^damping: expected a number or 'auto', got 'best'"),
        ({"damping": -1.0}, r"^damping: expected .*, got -1"),
        ({"ridge": float("nan")}, r"^ridge: expected .*, got nan"),
        ({"curvature": True}, r"^curvature: expected one of 'own', 'mean', got True"),
        ({"curvature": "best"}, r"^curvature: expected one of 'own', 'mean', got 'best'"),
        ({"leverage": "yes"}, r"^leverage: expected True or False, got 'yes'"),
        ({"blocks": 0}, r"^blocks: expected an integer from 1 to \d+, got 0"),
        ({"blocks": 2**32}, r"^blocks: expected an integer from 1 to \d+, got 4294967296"),
    ],
)
def test_bad_options(options, sentence):
    with pytest.raises((ValueError, TypeError), match=sentence):
        fitted(**options)


def test_settings_and_fingerprint_tell_estimators_apart(tmp_path):
    plain, other = fitted(tmp_path), fitted(tmp_path, leverage=True)
    assert plain.settings["leverage"] is False
    assert other.settings == {**plain.settings, "leverage": True}
    assert plain.fingerprint != other.fingerprint
    assert plain.fingerprint == fitted().fingerprint
    assert Estimator(1.0, curvature=None).settings().items() <= plain.settings.items()


def test_a_leverage_near_one_is_named_by_its_number(monkeypatch):
    monkeypatch.setattr("trak_ext.store.base.shard_rows", lambda width: 8)
    x = 1e-4 * torch.randn(NUM_TRAIN, 4)
    x[23] = 1e4
    made = Attributor(
        nn.Linear(4, 1), "regression", proj_dim=PROJ_DIM, damping=1e-9, curvature=None,
        leverage=True, progress=False,
    )  # fmt: skip
    made.fit([(x, torch.zeros(NUM_TRAIN))])
    with pytest.raises(ValueError, match=r"for sample 23 \(raise damping or ridge\)"):
        made.attribute([(x[:2], torch.zeros(2))])
