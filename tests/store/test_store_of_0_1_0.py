"""A store that version 0.1.0 wrote is refused in one sentence; fitted again, it scores as then.

The store and its scores are in tests/vectors/store_0_1_0 (made by make_store.py beside it). Nothing
vouches for the files of its format, 2.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import old_store
from folders import VECTORS
from trak_ext import StoreError

FOLDER = VECTORS / "store_0_1_0"
SCORES = json.loads((FOLDER / "scores.json").read_text())


@pytest.fixture
def store(tmp_path) -> Path:
    shutil.copytree(FOLDER / "store", tmp_path / "store")
    return tmp_path / "store"


def contents(store: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}


def test_the_format_is_refused_and_nothing_is_written(store):
    before = contents(store)
    attributor = old_store.attributor(store)
    calls = [
        lambda: attributor.fit(old_store.train()),
        lambda: attributor.attribute(old_store.targets()),
        attributor.self_influence,
    ]
    for call in calls:
        with pytest.raises(StoreError, match=r"expected one of format 3, got format 2") as error:
            call()
        assert str(store / "manifest.json") in str(error.value)
        assert "fit again into another folder" in str(error.value)
    assert contents(store) == before


def close(got: torch.Tensor, expected: list) -> bool:
    # Gradients are made by today's torch on this machine.
    return torch.allclose(got, torch.tensor(expected), rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def again(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("again") / "store"
    old_store.attributor(folder).fit(old_store.train())
    return folder


@pytest.mark.parametrize("name", old_store.ESTIMATORS)
def test_a_store_that_is_fitted_again_scores_as_then(again, name):
    attributor = old_store.attributor(again, **old_store.ESTIMATORS[name])
    expected = SCORES[name]
    assert close(attributor.attribute(old_store.targets()), expected["attribute"])
    assert close(attributor.self_influence(), expected["self_influence"])
    top = attributor.attribute(old_store.targets(), top_k=4)
    assert top.indices.tolist() == expected["top_k"]
