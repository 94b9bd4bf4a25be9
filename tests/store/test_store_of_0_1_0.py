"""A store that version 0.1.0 wrote is read, gives the scores it gave then, and grows.

The store and its scores are in tests/vectors/store_0_1_0 (made by make_store.py beside it).
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import old_store
from folders import VECTORS

FOLDER = VECTORS / "store_0_1_0"
SCORES = json.loads((FOLDER / "scores.json").read_text())


@pytest.fixture
def store(tmp_path) -> Path:
    shutil.copytree(FOLDER / "store", tmp_path / "store")
    return tmp_path / "store"


def contents(store: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}


def close(got: torch.Tensor, expected: list) -> bool:
    # The targets' gradients are made by today's torch on this machine.
    return torch.allclose(got, torch.tensor(expected), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", old_store.ESTIMATORS)
def test_scores_are_those_of_then(store, name):
    attributor = old_store.attributor(store, **old_store.ESTIMATORS[name])
    expected = SCORES[name]
    assert close(attributor.attribute(old_store.targets()), expected["attribute"])
    assert close(attributor.self_influence(), expected["self_influence"])
    top = attributor.attribute(old_store.targets(), top_k=4)
    assert top.indices.tolist() == expected["top_k"]
    assert attributor.fingerprint == expected["fingerprint"]


def test_fit_finds_everything_there(store):
    before = contents(store)
    attributor = old_store.attributor(store)
    calls = []
    attributor._model.register_forward_hook(lambda *_: calls.append(1))
    attributor.fit(old_store.train())
    assert calls == []
    assert contents(store) == before


def test_samples_are_added_and_nothing_old_is_written_again(store):
    before = contents(store)
    grown = old_store.attributor(store)
    grown.fit(old_store.added(), addition=1)
    after = contents(store)
    assert {path: after[path] for path in before} == before
    assert len(after) > len(before)

    fresh = old_store.attributor(None)
    fresh.fit(old_store.train())
    fresh.fit(old_store.added(), addition=1)
    scores = grown.attribute(old_store.targets())
    assert scores.shape == (old_store.NUM_TRAIN + old_store.NUM_ADDED, old_store.NUM_TARGETS)
    assert close(scores, fresh.attribute(old_store.targets()).tolist())
    assert grown.fingerprint == fresh.fingerprint
    assert torch.allclose(grown.damping_, fresh.damping_, rtol=1e-4)
