"""Damage, two writers and kills, in a short form; bench/store_faults.py has the long one."""

from __future__ import annotations

import pytest
import torch

import store_faults
import trak_ext


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
    monkeypatch.setattr(trak_ext.store.base, "shard_rows", lambda width: store_faults.ROWS)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_no_damage_passes_unseen(tmp_path):
    assert store_faults.short_form(tmp_path) == []


def test_damage_that_is_not_seen_would_be_counted(tmp_path, monkeypatch):
    """The sweep finds a store that looks at nothing."""
    monkeypatch.setattr(
        trak_ext.store.base.Store, "_get", lambda self, m, name, *_: self.get(m, name)
    )
    stores = store_faults.make_stores(tmp_path / "stores")
    name = "checkpoint-0000/features-000000000000.safetensors"
    copied = [
        f
        for f in store_faults.faults(stores, stores.good, [name], 1, 0)
        if f.kind.endswith("other data")
    ]
    _, bad = store_faults.sweep(stores, copied, tmp_path)
    assert len(bad) == len(copied) == 1
    assert bad[0][0] == "SILENT: copied from other data"


def test_two_writers(tmp_path):
    assert store_faults.races(tmp_path, 3) == {"right, the other run refused by name": 3}


def test_kills(tmp_path):
    found = store_faults.kills(tmp_path, 6)
    assert found["killed"] == 6
    assert found["WRONG"] == 0
    assert found["finished, byte for byte the same"] >= 1
