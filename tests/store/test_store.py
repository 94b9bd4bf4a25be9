"""Stores: what is written comes back, what is damaged or another's is rejected by name."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil

import pytest
import safetensors.torch
import torch

from trak_ext.store import (
    CheckpointSummary,
    Context,
    DirectoryStore,
    MemoryStore,
    Shard,
    StoreError,
    open_store,
    shard_rows,
)
from trak_ext.store.records import Record

SETTINGS = {"seed": 0, "params": {"a": [2, 3]}, "autocast": None, "checkpoints": ["x", "y"]}
KERNEL = torch.eye(2, dtype=torch.float64)[None]
SUMMARY = CheckpointSummary(
    5,
    ["a", "b"],
    0.25,
    torch.rand(5),
    torch.rand(5),
    torch.arange(5, dtype=torch.float64)[None],
    ["of a", "of b"],
    None,
    "of the probe",
)
FACTS = {
    name: getattr(SUMMARY, name)
    for name in ("num_samples", "data_digests", "fitted_above", "shards", "context", "probe")
}


def shard(rows=3, k=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Shard(
        torch.randn(rows, k, generator=generator),
        torch.rand(rows, generator=generator),
        torch.rand(rows, generator=generator),
        torch.randn(rows, generator=generator),
        f"digest of {seed}",
    )


def opened(path, settings=SETTINGS, create=False):
    store = DirectoryStore(path)
    store.open(settings, create=create)
    return store


@pytest.fixture
def filled(tmp_path):
    """Two shards, the summary and a kernel of checkpoint 0, and a shard of checkpoint 1."""
    store = opened(tmp_path / "store", create=True)
    store.write(0, 0, shard())
    store.write(0, 3, shard(2, seed=1))
    store.write_summary(0, SUMMARY)
    store.write_kernel(0, "plain", 0, "data", KERNEL)
    store.write(1, 0, shard(seed=2))
    return store


def contents(path):
    return {str(file.relative_to(path)): file.read_bytes() for file in files(path)}


def files(path):
    return sorted(file for file in path.rglob("*") if file.is_file())


def one(path, pattern):
    (file,) = path.glob(pattern)
    return file


def assert_shard(got, expected):
    for a, b in zip(got[:-1], expected[:-1], strict=True):  # all but the record's digest
        if isinstance(b, torch.Tensor):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)
        else:
            assert a == b


@pytest.mark.parametrize("where", ["memory", "folder"])
def test_what_is_written_comes_back(where, tmp_path):
    store = open_store(None if where == "memory" else tmp_path / "a" / "b")
    assert isinstance(store, MemoryStore if where == "memory" else DirectoryStore)
    store.open(SETTINGS, create=True)
    assert store.read(0, 0) is None
    assert store.read_kernel(0, "plain", 0, "data") is None
    assert store.read_summary(0) is None
    store.write(0, 0, shard())
    store.write(1, 2**40, shard(1, seed=1))
    kernel = torch.tensor([[[2.0, 1.0], [1.0, 3.0]]], dtype=torch.float64)
    store.write_kernel(1, "plain", 0, "data", kernel)
    store.write_summary(1, SUMMARY)
    if where == "folder":
        store = opened(tmp_path / "a" / "b")
    assert_shard(store.read(0, 0, 3), shard())
    assert_shard(store.read(1, 2**40), shard(1, seed=1))
    assert store.read(0, 2**40) is None
    assert store.read(1, 0) is None
    assert store.read_kernel(0, "plain", 0, "data") is None
    found = store.read_kernel(1, "plain", 0, "data")
    assert torch.equal(found, kernel)
    assert found.dtype == torch.float64
    assert_summary(store.read_summary(1), SUMMARY)


assert_summary = assert_shard


@pytest.mark.parametrize("where", ["memory", "folder"])
def test_parts_kernels_and_contexts_are_kept_apart(where, tmp_path):
    store = open_store(None if where == "memory" else tmp_path)
    store.open(SETTINGS, create=True)
    with_ids = shard(seed=1)._replace(ids=["ä", "b", 3])
    store.write(0, 0, shard(), 0)
    store.write(0, 0, with_ids, 2)
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    for part in (0, 2):
        store.write_summary(1, SUMMARY._replace(num_samples=part), part)
        for i, weighting in enumerate(("plain", "own", "mean-0002")):
            store.write_kernel(1, weighting, part, "data", one * (10 * part + i))
    context = Context({"a": torch.arange(3), "b": torch.ones(2, 2)}, "digest")
    store.write_context(1, context)
    if where == "folder":
        store = opened(tmp_path)
    assert_shard(store.read(0, 0), shard())
    assert_shard(store.read(0, 0, addition=2), with_ids)
    assert store.read(0, 0, addition=1) is None
    for part in (0, 2):
        assert store.read_summary(1, part).num_samples == part
        for i, weighting in enumerate(("plain", "own", "mean-0002")):
            assert float(store.read_kernel(1, weighting, part, "data")) == 10 * part + i
            with pytest.raises(StoreError, match="kernel matrices of the features"):
                store.read_kernel(1, weighting, part, "other data")
    assert store.read_kernel(1, "plain", 1, "data") is None
    assert store.read_kernel(1, "mean-0001", 0, "data") is None
    assert store.read_summary(1, 1) is None
    assert store.read_context(0) is None
    found = store.read_context(1)
    assert found.data_digest == "digest"
    assert set(found.tensors) == {"a", "b"}
    assert all(torch.equal(found.tensors[key], context.tensors[key]) for key in context.tensors)


def test_checkpoints_may_continue_or_be_some_of_the_manifests(filled):
    fewer, more = ({**SETTINGS, "checkpoints": names} for names in (["x"], ["x", "y", "z"]))
    before = contents(filled.path)
    assert_shard(opened(filled.path, fewer).read(0, 0), shard())
    assert_shard(opened(filled.path, more).read(1, 0), shard(seed=2))
    opened(filled.path, fewer).write(0, 3, shard(2, seed=1))  # what is there already
    assert contents(filled.path) == before
    opened(filled.path, more).write(2, 0, shard(seed=3))
    manifest = json.loads((filled.path / "manifest.json").read_text())
    assert manifest["checkpoints"] == ["x", "y", "z"]
    assert_shard(opened(filled.path).read(0, 0), shard())


def test_features_of_any_stride_and_no_rows(tmp_path):
    store = opened(tmp_path, create=True)
    wide = torch.randn(4, 3)
    written = Shard(wide.T[:2], wide[0, :2], wide[1, :2], wide[2, :2], "d")
    store.write(0, 0, written)
    store.write(0, 9, shard(0))
    assert_shard(opened(tmp_path).read(0, 0), written)
    assert_shard(opened(tmp_path).read(0, 9), shard(0))


def test_a_memory_store_begins_anew_and_keeps_what_it_has():
    store = MemoryStore()
    store.open(SETTINGS, create=True)
    store.write(0, 0, shard())
    store.open(SETTINGS, create=False)
    assert store.read(0, 0) is not None
    store.open(SETTINGS, create=True)
    assert store.read(0, 0) is None


def test_opening_writes_nothing(tmp_path):
    path = tmp_path / "store"
    opened(path, create=True)
    assert not path.exists()
    with pytest.raises(StoreError, match=re.escape(f"there is no store at '{path}")):
        opened(path)
    assert not path.exists()


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    path = tmp_path / "file"
    path.write_text("mine")
    with pytest.raises(StoreError, match=r"^store: expected a folder, got the file '.*file'$"):
        DirectoryStore(path)
    assert path.read_text() == "mine"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", 1),
        ("seed", "0"),
        ("params", {"a": [3, 2]}),
        ("params", {"a": [2, 3], "b": [1]}),
        ("autocast", "torch.bfloat16"),
        ("checkpoints", ["y", "x"]),
        ("checkpoints", ["y"]),
        ("checkpoints", ["x", "z", "y"]),
        ("new_setting", 1),
    ],
)
@pytest.mark.parametrize("create", [False, True])
def test_other_settings_are_refused_by_key(filled, key, value, create):
    (filled.path / "features.tmp").write_text("")
    before = contents(filled.path)
    with pytest.raises(StoreError, match=rf"^store: expected one made with {key} = .*, got ") as e:
        opened(filled.path, {**SETTINGS, key: value}, create=create)
    assert str(filled.path / "manifest.json") in str(e.value)
    assert "\n" not in str(e.value)
    assert contents(filled.path) == before


def test_a_missing_setting_and_another_format_are_refused(filled):
    with pytest.raises(StoreError, match="expected one made with seed = null, got 0"):
        opened(filled.path, {key: SETTINGS[key] for key in SETTINGS if key != "seed"})
    manifest = filled.path / "manifest.json"
    found = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**found, "format_version": found["format_version"] + 1}))
    with pytest.raises(StoreError, match=r"expected one of format 3, got format 4 .*fit again"):
        opened(filled.path)


def test_a_long_setting_is_shortened_in_the_sentence(filled):
    with pytest.raises(StoreError, match=r"checkpoints = .*\.\.\.") as error:
        opened(filled.path, {**SETTINGS, "checkpoints": ["0" * 32] * 1000})
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("text", [b"", b"{", b"[1]", b"\xff\xfe\x00", b"null"])
def test_a_damaged_manifest_is_refused_by_name(filled, text):
    manifest = filled.path / "manifest.json"
    manifest.write_bytes(text)
    with pytest.raises(StoreError, match=r"manifest\.json") as error:
        opened(filled.path, create=True)
    assert str(manifest) in str(error.value)
    assert manifest.read_bytes() == text


@pytest.mark.parametrize("create", [False, True])
def test_features_without_a_manifest_are_refused(filled, create):
    (filled.path / "manifest.json").unlink()
    with pytest.raises(StoreError, match=r"manifest\.json"):
        opened(filled.path, create=create)


READERS = {
    "checkpoint-0000/features-000000000000.*": lambda store: store.read(0, 0, 3),
    "checkpoint-0000/kernel-plain.*": lambda store: store.read_kernel(0, "plain", 0, "data"),
    "checkpoint-0000/finished.*": lambda store: store.read_summary(0),
}


@pytest.mark.parametrize("pattern", READERS)
def test_a_file_cut_short_or_long_is_rejected_by_name(filled, pattern):
    file = one(filled.path, pattern)
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        with pytest.raises(StoreError, match=re.escape(str(file))):
            READERS[pattern](opened(filled.path))
    file.write_bytes(whole + b"\0")
    with pytest.raises(StoreError, match=re.escape(str(file))):
        READERS[pattern](opened(filled.path))


def outcome(reader, path):
    try:
        return f"read: {reader(opened(path))}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("pattern", READERS)
@pytest.mark.parametrize("flip", [1, 0x0F, 0xFF])
def test_any_byte_flipped_is_rejected_by_name(filled, pattern, flip):
    file = one(filled.path, pattern)
    whole = file.read_bytes()
    taken = {}
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= flip
        file.write_bytes(damaged)
        fate = outcome(READERS[pattern], filled.path)
        if not (fate.startswith("StoreError") and str(file) in fate):
            taken[position] = fate
    assert taken == {}


def test_a_file_of_another_store_is_rejected_by_name(filled, tmp_path):
    other = opened(tmp_path / "other", {**SETTINGS, "seed": 5}, create=True)
    other.write(0, 0, shard())
    other.write_summary(0, SUMMARY)
    other.write_kernel(0, "plain", 0, "data", KERNEL)
    for pattern, reader in READERS.items():
        file = one(filled.path, pattern)
        shutil.copy(one(other.path, pattern), file)
        with pytest.raises(StoreError, match="another configuration") as error:
            reader(opened(filled.path))
        assert str(file) in str(error.value)


@pytest.mark.parametrize(
    ("source", "target", "read"),
    [
        ((0, 0), (0, 3), lambda store: store.read(0, 3)),
        ((0, 0), (1, 0), lambda store: store.read(1, 0)),
    ],
    ids=["other samples", "other checkpoint"],
)
def test_a_shard_in_the_place_of_another_is_rejected_by_name(filled, source, target, read):
    def path(checkpoint, start):
        return filled.path / f"checkpoint-{checkpoint:04d}" / f"features-{start:012d}.safetensors"

    assert path(*source).exists()
    assert path(*target).exists()
    shutil.copy(path(*source), path(*target))
    with pytest.raises(StoreError, match=re.escape(str(path(*target)))):
        read(opened(filled.path))


def test_a_kernel_of_another_checkpoint_is_rejected_by_name(filled):
    file = filled.path / "checkpoint-0001" / "kernel-plain.safetensors"
    shutil.copy(filled.path / "checkpoint-0000" / "kernel-plain.safetensors", file)
    with pytest.raises(StoreError, match=re.escape(str(file))):
        opened(filled.path).read_kernel(1, "plain", 0, "data")


def test_a_shard_of_another_length_is_rejected_by_name(filled):
    file = one(filled.path, "checkpoint-0000/features-000000000003.*")
    assert opened(filled.path).read(0, 3, 5) is not None
    with pytest.raises(StoreError, match=r"expected 3 samples in .*, got 2") as error:
        opened(filled.path).read(0, 3, 6)
    assert str(file) in str(error.value)


def test_leftover_temporary_files_are_cleared_by_the_next_fit_alone(filled):
    file = one(filled.path, "checkpoint-0000/kernel-plain.*")
    end = f"{0:016x}.tmp"
    leftovers = [
        file.with_name(f"{file.name}.{end}"),
        filled.path / f"manifest.json.{end}",
        filled.path / "checkpoint-0001" / f"features-000000000003.safetensors.{end}",
        filled.path / "checkpoint-0001" / f"journal-000000000003.safetensors.{end}",
    ]
    before = contents(filled.path)
    for leftover in leftovers:
        leftover.write_bytes(b"half")
    opened(filled.path, create=False)
    assert all(leftover.exists() for leftover in leftovers)
    opened(filled.path, create=True)
    assert contents(filled.path) == before


def test_temporary_files_of_others_are_left_alone(filled):
    end, checkpoint = f"{0:016x}.tmp", filled.path / "checkpoint-0000"
    theirs = [
        filled.path / "notes.tmp",
        filled.path / "plots" / "draft.tmp",
        checkpoint / f"mine.safetensors.{end}",
        checkpoint / "features-000000000000.safetensors.tmp",
        checkpoint / f"features-0.safetensors.{end}",
        filled.path / "checkpoint-mine" / f"finished.safetensors.{end}",
    ]
    for path in theirs:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    # Links are neither followed nor deleted.
    elsewhere = filled.path.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / f"finished.safetensors.{end}").write_text("theirs")
    (filled.path / "checkpoint-0007").symlink_to(elsewhere, target_is_directory=True)
    link = checkpoint / f"finished.safetensors.{end}"
    link.symlink_to(theirs[0])
    opened(filled.path, create=True)
    assert all(path.exists() for path in theirs)
    assert link.is_symlink()
    assert (elsewhere / f"finished.safetensors.{end}").exists()


@pytest.mark.parametrize("step", ["open", "fsync", "replace"])
def test_a_write_that_fails_names_the_file_and_leaves_nothing(filled, monkeypatch, step):
    before = contents(filled.path)

    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, step, fail)
    for m, start, name in ((1, 3, "0001/features-000000000003"), (0, 0, "0000/features-0")):
        with pytest.raises(
            OSError, match=rf"^store: expected to write .*{name}.*, got No space l"
        ) as e:
            filled.write(m, start, shard(2, seed=9))  # where there is none, and over a whole one
        assert e.value.errno == errno.ENOSPC
    monkeypatch.undo()
    assert contents(filled.path) == before
    opened(filled.path, create=True).write(1, 3, shard(2))
    assert_shard(opened(filled.path).read(1, 3), shard(2))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_a_full_disk_is_named(filled, monkeypatch):
    original = os.open
    monkeypatch.setattr(os, "open", lambda path, *args: original("/dev/full", os.O_WRONLY))
    with pytest.raises(
        OSError, match=r"^store: expected to write '.*features.*', got No space left"
    ):
        filled.write(1, 3, shard(2))


def test_temporaries_are_new_unpredictable_and_follow_no_link(filled, monkeypatch):
    names, original = [], os.open

    def noted(path, flags, *args):
        if str(path).endswith(".tmp"):
            names.append(str(path))
            assert flags & os.O_EXCL
            assert flags & os.O_NOFOLLOW
        return original(path, flags, *args)

    monkeypatch.setattr(os, "open", noted)
    for _ in range(3):
        filled.write(1, 3, shard(2))
    assert len(set(names)) == 3
    victim = filled.path.parent / "victim"
    victim.write_text("mine")
    monkeypatch.setattr("trak_ext.store.files.secrets.token_hex", lambda n: "0" * 2 * n)
    target = filled.path / "checkpoint-0001" / "features-000000000003.safetensors"
    target.with_name(f"{target.name}.{'0' * 16}.tmp").symlink_to(victim)
    with pytest.raises(OSError, match="File exists"):
        filled.write(1, 3, shard(2))
    assert victim.read_text() == "mine"


def test_a_relative_path_is_resolved_once(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    store = DirectoryStore("store")
    monkeypatch.chdir(tmp_path / "elsewhere")
    store.open(SETTINGS, create=True)
    store.write(0, 0, shard())
    assert (tmp_path / "store" / "manifest.json").exists()
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_file_that_cannot_be_read_is_named(filled, monkeypatch):
    file = one(filled.path, "checkpoint-0000/features-000000000000.*")
    file.unlink()
    file.mkdir()
    with pytest.raises(
        StoreError, match=r"^store: expected a file that can be read in .*, got Is a"
    ):
        opened(filled.path).read(0, 0)


def test_the_same_records_are_the_same_bytes_and_any_reader_reads_them(tmp_path):
    for name in "ab":
        store = opened(tmp_path / name, create=True)
        store.write(0, 0, shard()._replace(ids=["ä", 2, "c"]))
        store.write_summary(0, SUMMARY)
        context = {
            "z": torch.ones(2, dtype=torch.bfloat16),
            "a": torch.arange(3),
            "e": torch.zeros(0),
        }
        store.write_context(0, Context(context, "d"))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    for path in files(tmp_path / "a"):
        if path.suffix == ".safetensors":
            found = safetensors.torch.load_file(path)
            record = opened(tmp_path / "a").get(0, path.stem)
            assert set(found) == set(record.tensors)
            for key, tensor in found.items():
                assert tensor.dtype == record.tensors[key].dtype
                assert torch.equal(tensor, record.tensors[key])


# --- what vouches for what ------------------------------------------------------------------------


def test_a_record_is_compared_with_the_digest_that_vouches_for_it(filled):
    digest = filled.read(0, 0).digest
    assert_shard(filled.read(0, 0, vouched=digest), shard())
    file = one(filled.path, "checkpoint-0000/features-000000000000.*")
    filled.write(0, 0, shard(seed=9))  # whole, and not the one
    with pytest.raises(
        StoreError, match=r"as .*0000/finished.safetensors. vouches for it"
    ) as error:
        filled.read(0, 0, vouched=digest)
    assert str(file) in str(error.value)
    kept = one(filled.path, "checkpoint-0000/finished.*").read_bytes()
    tensors = {name: getattr(SUMMARY, name) for name in ("weight", "curvature", "implied")}
    filled.put(0, "finished", Record(tensors, {**FACTS, "fitted_above": 1.0}))
    with pytest.raises(StoreError, match=r"finished.* as .*manifest.json. vouches for it"):
        opened(filled.path).read_summary(0)
    one(filled.path, "checkpoint-0000/finished.*").write_bytes(kept)
    assert_summary(opened(filled.path).read_summary(0), SUMMARY)


def test_a_summary_that_nothing_vouches_for_is_not_there(filled):
    finished = one(filled.path, "checkpoint-0000/finished.*")
    manifest = filled.path / "manifest.json"
    vouching = manifest.read_bytes()
    filled.put(1, "finished", Record({}, {}))  # a run was killed before it could vouch
    assert opened(filled.path).read_summary(1) is None
    assert manifest.read_bytes() == vouching
    finished.unlink()
    with pytest.raises(StoreError, match="got none") as error:
        opened(filled.path).read_summary(0)
    assert str(finished) in str(error.value)
    assert opened(filled.path).read_summary(0, missing_ok=True) is None


def test_a_summary_of_other_data_is_not_vouched_for(filled):
    with pytest.raises(StoreError, match=r"expected the data that .* vouches for, got other data"):
        filled.write_summary(1, SUMMARY._replace(data_digests=["a", "c"]))
    filled.write_summary(1, SUMMARY)
    assert filled.known_data(0) == (5, ["a", "b"])


def test_every_bit_of_a_manifest_is_looked_at(filled):
    manifest = filled.path / "manifest.json"
    whole = manifest.read_bytes()
    for position in range(len(whole)):
        for flip in (0x01, 0x2A):
            damaged = bytearray(whole)
            damaged[position] ^= flip
            manifest.write_bytes(damaged)
            with pytest.raises(StoreError) as error:
                opened(filled.path)
            assert str(manifest) in str(error.value), damaged


def test_a_change_of_versions_alone_is_warned_of_once(filled, tmp_path):
    store = DirectoryStore(tmp_path / "versions")
    store.open(SETTINGS, create=True, versions={"torch": "1", "numpy": "2"})
    store.write(0, 0, shard())
    same = DirectoryStore(tmp_path / "versions")
    same.open(SETTINGS, create=False, versions={"torch": "1", "numpy": "2", "new": "3"})
    other = DirectoryStore(tmp_path / "versions")
    now = {"torch": "1.1", "numpy": "2"}
    with pytest.warns(RuntimeWarning, match=r"versions' was made with torch 1, now 1\.1: its fe"):
        other.open(SETTINGS, create=True, versions=now)
    other.open(SETTINGS, create=True, versions=now)  # said once
    assert_shard(other.read(0, 0), shard())


def test_files_are_synced_before_they_are_named(tmp_path, monkeypatch):
    steps = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor):
        steps.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def noted_replace(source, target):
        steps.append(("replace", str(source), str(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    opened(tmp_path, create=True).write(0, 0, shard())
    names = [step[2] for step in steps if step[0] == "replace"]
    # The manifest first: features without one are refused.
    assert names == list(map(str, [tmp_path / "manifest.json", files(tmp_path)[0]]))
    for i, step in enumerate(steps):
        if step[0] == "replace":
            assert steps[i - 1] == ("fsync", step[1])
            assert steps[i + 1] == ("fsync", os.path.dirname(step[2]))


@pytest.mark.parametrize(
    ("proj_dim", "rows"), [(1, 4096), (512, 4096), (2048, 1024), (2**21, 1), (2**32, 1)]
)
def test_shards_are_of_about_one_size(proj_dim, rows):
    assert shard_rows(proj_dim) == rows
