"""One run owns a store: any other one is refused by name, whatever the disk."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import re
import time

import pytest
import torch
from torch import nn

from trak_ext import Attributor, StoreError
from trak_ext.store import owner
from trak_ext.store.owner import TOKEN_VARIABLE, Owner


def data(start=0, stop=20):
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(40, 4, generator=generator)
    return [(x[a : a + 5], torch.arange(a, a + 5) % 3) for a in range(start, stop, 5)]


def attributor(store):
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    return Attributor(model, "image_classification", store=store, proj_dim=4, progress=False)


class During:
    """A loader that calls a function after its first batch."""

    def __init__(self, batches, call):
        self.batches, self.call = batches, call

    def __iter__(self):
        for i, batch in enumerate(self.batches):
            if i == 1:
                self.call()
            yield batch


REFUSED = (
    r"^store: expected no other run that fits the store in .*, got process \d+ of host .* begun "
)


def test_another_run_is_refused_by_name_and_readers_are_not(tmp_path):
    store = tmp_path / "store"
    attributor(store).fit(data())
    other, seen = attributor(store), []

    def during():
        with pytest.raises(StoreError, match=REFUSED) as error:
            other.fit(data(20, 40), addition=2)
        seen.append(str(error.value))
        seen.append(json.loads((store / "owner.json").read_text())["pid"])
        seen.append(other.attribute(data(0, 5)))

    attributor(store).fit(During(data(), during))
    assert str(store / "owner.json") in seen[0]
    assert TOKEN_VARIABLE in seen[0]
    assert "\n" not in seen[0]
    assert seen[1] == os.getpid()
    assert seen[2].shape == (20, 5)
    assert not (store / "owner.json").exists()
    other.fit(data(20, 40), addition=1)


@pytest.mark.parametrize("error", [RuntimeError("gone"), KeyboardInterrupt()])
def test_the_store_is_given_back_after_an_error(tmp_path, error):
    def fail():
        raise error

    with pytest.raises(type(error)):
        attributor(tmp_path / "a" / "store").fit(During(data(), fail))
    attributor(tmp_path / "a" / "store").fit(data())
    assert not (tmp_path / "a" / "store" / "owner.json").exists()


def test_folders_that_nothing_was_written_to_go_again(tmp_path):
    with pytest.raises(ValueError, match="NaN"):
        attributor(tmp_path / "a" / "b").fit([(torch.full((3, 4), float("nan")), torch.arange(3))])
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="NaN"):
        attributor(tmp_path).fit([(torch.full((3, 4), float("nan")), torch.arange(3))])
    assert tmp_path.exists()  # it was there before


def left_behind(folder, **changes):
    """The owner's file of a run that has ended."""
    made = Owner(folder)
    said = {**json.loads(made._text()), **changes}
    (folder / "owner.json").write_text(json.dumps(said))
    return said


def test_a_killed_run_of_this_machine_is_taken_over(tmp_path):
    child = os.fork()
    if child == 0:
        with Owner(tmp_path).hold():
            os._exit(0)
    os.waitpid(child, 0)
    assert json.loads((tmp_path / "owner.json").read_text())["pid"] == child
    attributor(tmp_path).fit(data())
    # Another process has got its number by now.
    left_behind(tmp_path, pid=os.getpid(), process="1")
    attributor(tmp_path).fit(data())
    assert not list(tmp_path.glob("owner*"))


@pytest.mark.parametrize("change", [{"machine": "another"}, {"machine": None}, {"process": None}])
def test_a_run_of_which_nothing_is_known_is_not_taken_over(tmp_path, change):
    left_behind(tmp_path, pid=2**22 + 5, process="1", host="elsewhere", **change) if (
        "process" not in change
    ) else left_behind(tmp_path, pid=2**22 + 5, host="elsewhere", **change)
    with pytest.raises(StoreError, match=r"of host elsewhere.* last sign of life \d+ s ago"):
        attributor(tmp_path).fit(data())
    (tmp_path / "owner.json").unlink()  # as the error says
    attributor(tmp_path).fit(data())


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_an_owner_that_says_nothing_is_refused_by_name(tmp_path, monkeypatch, text):
    monkeypatch.setattr(owner.time, "sleep", lambda _: None)
    (tmp_path / "owner.json").write_text(text)
    with pytest.raises(StoreError, match=re.escape(str(tmp_path / "owner.json"))):
        attributor(tmp_path).fit(data())


def test_runs_of_one_token_share_a_store(tmp_path, monkeypatch):
    monkeypatch.setenv(TOKEN_VARIABLE, "job 7")
    said = left_behind(tmp_path, machine="another", mark="first")
    attributor(tmp_path).fit(data())
    assert json.loads((tmp_path / "owner.json").read_text()) == said  # the first one's to delete
    (tmp_path / "owner.json").unlink()
    scores = []
    attributor(tmp_path).fit(
        During(data(), lambda: scores.append(attributor(tmp_path).fit(data())))
    )
    assert scores == [None]
    monkeypatch.setenv(TOKEN_VARIABLE, "job 8")
    left_behind(tmp_path, machine="another", token="job 7")
    with pytest.raises(StoreError, match=REFUSED):
        attributor(tmp_path).fit(data())


def test_the_first_of_a_token_may_end_before_the_others(tmp_path, monkeypatch):
    monkeypatch.setenv(TOKEN_VARIABLE, "job 7")
    left_behind(tmp_path, machine="another")
    attributor(tmp_path).fit(During(data(), (tmp_path / "owner.json").unlink))
    assert not (tmp_path / "owner.json").exists()
    expected = attributor(None)
    expected.fit(data())
    assert torch.equal(attributor(tmp_path).attribute(data()), expected.attribute(data()))


@pytest.mark.parametrize("taken", [False, True])
def test_a_run_whose_store_was_taken_stops_before_it_writes(tmp_path, taken):
    def take():
        (tmp_path / "owner.json").unlink()
        if taken:
            left_behind(tmp_path, machine="another")

    before = {}

    def during():
        take()
        before.update({path: path.read_bytes() for path in tmp_path.rglob("*.*")})

    got = "that process" if taken else "no file"
    with pytest.raises(StoreError, match=rf"owner.json' to say that this run owns.*, got {got}"):
        attributor(tmp_path).fit(During(data(), during))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.*")} == before


def test_a_fork_that_ends_within_does_not_give_the_store_back(tmp_path):
    store = tmp_path / "store"
    held = Owner(store).hold()
    held.__enter__()
    child = os.fork()
    if child == 0:
        try:
            held.__exit__(None, None, None)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert (store / "owner.json").exists()
    held.__exit__(None, None, None)
    assert not store.exists()


def test_signs_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(owner, "HEARTBEAT", 0.02)
    with Owner(tmp_path).hold():
        file = tmp_path / "owner.json"
        os.utime(file, (0, 0))
        limit = time.monotonic() + 20
        while file.stat().st_mtime == 0 and time.monotonic() < limit:
            time.sleep(0.01)
        assert file.stat().st_mtime > 0


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("replaced", [False, True])
def test_a_run_killed_while_it_took_over_is_taken_over_from(tmp_path, depth, replaced):
    gone = {"pid": 2**22 + 5, "process": "1"}
    said = left_behind(tmp_path, **gone)
    for _ in range(depth):
        claim = tmp_path / f"owner.json.{said['mark']}.taken"
        said = {**json.loads(Owner(tmp_path)._text()), **gone}
        claim.write_text(json.dumps(said))
    if replaced:
        (tmp_path / "owner.json").write_text(json.dumps(said))
    attributor(tmp_path).fit(data())
    assert not list(tmp_path.glob("owner*"))
    left_behind(tmp_path, **gone, mark="m")
    living = left_behind(tmp_path, mark="living")
    (tmp_path / "owner.json.m.taken").write_text(json.dumps(living))
    left_behind(tmp_path, **gone, mark="m")
    with pytest.raises(StoreError, match=r"owner\.json\.m\.taken. if it is gone"):
        attributor(tmp_path).fit(data())


def test_a_disk_without_links_will_do(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    attributor(tmp_path).fit(data())
    with Owner(tmp_path).hold(), pytest.raises(StoreError, match=REFUSED):
        attributor(tmp_path).fit(data())
    assert not list(tmp_path.glob("owner*"))


def test_a_disk_that_is_full_is_named(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", refuse)
    with pytest.raises(OSError, match=r"^store: expected to write .*owner\.json.*, got No space"):
        attributor(tmp_path / "store").fit(data())
    assert not list(tmp_path.iterdir())


def _fit_with_others(folder, barrier, results):
    torch.set_num_threads(1)
    made = attributor(folder)
    barrier.wait()
    try:
        results.put(made.fit(data()))
    except Exception as error:
        results.put(f"{type(error).__name__}: {error}")


def test_runs_of_one_token_at_the_same_time(tmp_path, monkeypatch):
    monkeypatch.setattr("trak_ext.store.base.shard_rows", lambda width: 4)
    monkeypatch.setattr("trak_ext.attribution.fitting.JOURNAL_SECONDS", 0)
    torch.set_num_threads(1)
    attributor(tmp_path / "alone").fit(data())
    monkeypatch.setenv(TOKEN_VARIABLE, "job 7")
    context = multiprocessing.get_context("fork")
    for attempt in range(4):
        folder = tmp_path / str(attempt)
        barrier, results = context.Barrier(3), context.Queue()
        arguments = (folder, barrier, results)
        runs = [context.Process(target=_fit_with_others, args=arguments) for _ in range(3)]
        for run in runs:
            run.start()
        assert [results.get(timeout=60) for _ in runs] == [None] * 3
        for run in runs:
            run.join()
        files = {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*.*") if p.is_file()}
        alone = tmp_path / "alone"
        assert files == {
            p.relative_to(alone): p.read_bytes() for p in alone.rglob("*.*") if p.is_file()
        }


def _contend(folder, barrier, results):
    made = Owner(folder)
    barrier.wait()
    try:
        with made.hold():
            results.put("owns")
            barrier.wait()  # nobody leaves before all have tried
    except StoreError as error:
        results.put(str(error))
        barrier.wait()


@pytest.mark.parametrize("stale", [False, True])
def test_of_many_one_wins(tmp_path, stale):
    context, count = multiprocessing.get_context("fork"), 6
    for attempt in range(5):
        folder = tmp_path / str(attempt)
        folder.mkdir()
        if stale:
            left_behind(folder, pid=2**22 + 5, process="1")
        barrier, results = context.Barrier(count), context.Queue()
        arguments = (folder, barrier, results)
        runs = [context.Process(target=_contend, args=arguments) for _ in range(count)]
        for run in runs:
            run.start()
        found = [results.get(timeout=60) for _ in runs]
        for run in runs:
            run.join()
        assert found.count("owns") == 1, found
        assert all(str(folder) in text for text in found if text != "owns")
        assert not list(folder.iterdir())
