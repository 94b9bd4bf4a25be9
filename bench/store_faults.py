"""What happens to a store that is damaged, mixed, fought over or killed: nothing may pass unseen.

    python bench/store_faults.py sweep     every file of a finished store, damaged in every way
    python bench/store_faults.py races     two runs that fit one store at the same moment, 25 times
    python bench/store_faults.py kills     60 runs that are killed and go on, byte for byte

Each prints a table and exits 1 where something passed unseen. tests/store/test_faults.py runs
shorter forms.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import trak_ext
from trak_ext import Attributor, StoreError
from trak_ext.attribution import fitting
from trak_ext.store import base

ROWS, NUM_TRAIN, NUM_ADDED = 4, 10, 6
OUTCOMES = ("refused by name", "right all the same", "unnamed", "SILENT")


class Towers(nn.Module):
    """Image and text embeddings for clip, a task that prepares a context."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(5, 3), nn.Linear(4, 3)
        self.logit_scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Return both embeddings."""
        return self.image(image), self.text(text)


def pairs(seed: int, start: int, stop: int) -> list[tuple[Tensor, Tensor]]:
    """Return samples start .. stop - 1 of some data, in batches of 3."""
    generator = torch.Generator().manual_seed(seed)
    images, texts = (torch.randn(40, n, generator=generator)[start:stop] for n in (5, 4))
    return list(zip(images.split(3), texts.split(3), strict=True))


def attributor(store: Path | None, seed: int = 0, **options: Any) -> Attributor:
    torch.manual_seed(0)
    model = Towers()
    states = [
        {name: tensor + 0.1 * m for name, tensor in model.state_dict().items()} for m in range(3)
    ]
    return Attributor(
        model,
        "clip",
        checkpoints=states,
        store=store,
        seed=seed,
        proj_dim=4,
        damping=1.0,
        progress=False,
        **options,
    )


def fit_both(store: Path, data: int = 0, seed: int = 0) -> None:
    """Fit the training set and an addition to it."""
    made = attributor(store, seed)
    made.fit(pairs(data, 0, NUM_TRAIN))
    made.fit(pairs(data, NUM_TRAIN, NUM_TRAIN + NUM_ADDED), addition=1)


def contents(store: Path) -> dict[str, bytes]:
    files = (path for path in sorted(store.rglob("*")) if path.is_file())
    return {path.relative_to(store).as_posix(): path.read_bytes() for path in files}


# --- damage ---------------------------------------------------------------------------------------


class Fault(NamedTuple):
    """One way to damage a store."""

    kind: str
    files: tuple[str, ...]  # that an error may name
    apply: Callable[[Path], None]


class Stores(NamedTuple):
    """Stores to damage and to copy from."""

    good: Path
    other_data: Path
    other_settings: Path
    before: Path  # the good one before its addition
    under_way: Path  # the good one, stopped in checkpoint 1 between two shards


def make_stores(folder: Path) -> Stores:
    stores = Stores(*(folder / name for name in Stores._fields))
    fit_both(stores.good)
    fit_both(stores.other_data, data=1)
    fit_both(stores.other_settings, seed=1)
    attributor(stores.before).fit(pairs(0, 0, NUM_TRAIN))
    passes = 2 * len(pairs(0, 0, NUM_TRAIN))  # of checkpoint 0: its context, and its features
    try:
        attributor(stores.under_way).fit(Stopped(pairs(0, 0, NUM_TRAIN), passes + passes // 2 + 2))
    except KeyboardInterrupt:
        assert list(stores.under_way.rglob("journal-*"))
    return stores


def faults(
    stores: Stores, good: Path, files: list[str], positions: int, swaps: int
) -> Iterator[Fault]:
    """Yield the faults of a store's files.

    Args:
        good: The store.
        positions: Where each file is cut, and flipped.
        swaps: Other files that each one is exchanged with.
    """
    every = list(contents(good))
    chosen = random.Random(0)
    for name in files:
        data = (good / name).read_bytes()

        def write(store: Path, changed: bytes, name: str = name) -> None:
            (store / name).write_bytes(changed)

        for at in {len(data) * i // positions for i in range(positions)} | {len(data) - 1}:
            cut = data[:at]
            kind = "emptied" if at == 0 else "truncated"
            yield Fault(kind, (name,), lambda store, cut=cut, write=write: write(store, cut))
        for _ in range(positions):
            flipped = bytearray(data)
            flipped[chosen.randrange(len(data))] ^= 1 << chosen.randrange(8)
            yield Fault(
                "flipped", (name,), lambda store, new=bytes(flipped), w=write: w(store, new)
            )
        yield Fault("deleted", (name,), lambda store, name=name: (store / name).unlink())
        others = [other for other in every if other != name]
        for other in chosen.sample(others, min(swaps, len(others))):
            yield Fault("swapped", (name, other), lambda s, a=name, b=other: _swap(s / a, s / b))
        for source in ("other_data", "other_settings", "before"):
            path = getattr(stores, source) / name
            if path.exists() and path.read_bytes() != data:
                kind = f"copied from {source.replace('_', ' ')}"
                new = path.read_bytes()
                yield Fault(kind, (name,), lambda store, new=new, w=write: w(store, new))


def copied_folders(stores: Stores) -> Iterator[Fault]:
    """Yield whole folders copied from other stores: a checkpoint, and an addition of all."""
    files = [name for name in contents(stores.good) if "/" in name]
    groups = {name.split("/")[0] for name in files} | {"part-0001"}
    for source in ("other_data", "other_settings"):
        for group in sorted(groups):
            names = tuple(name for name in files if group in name.split("/"))

            def copy(store: Path, names: tuple[str, ...] = names, source: str = source) -> None:
                for name in names:
                    shutil.copy(getattr(stores, source) / name, store / name)

            yield Fault("folder copied", names, copy)


def _swap(a: Path, b: Path) -> None:
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)


class Stopped:
    """A loader that is stopped after some batches, over all its passes."""

    def __init__(self, batches: list[Any], after: int) -> None:
        self.batches, self.left = batches, after + 2  # the first one is looked at twice before

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            if self.left == 0:
                raise KeyboardInterrupt
            self.left -= 1
            yield batch


def unfinished(stores: Stores, step: int = 1) -> Iterator[Fault]:
    """Yield additions that were stopped at every batch, and one that nothing vouches for."""
    added = pairs(0, NUM_TRAIN, NUM_TRAIN + NUM_ADDED)

    def stop(store: Path, after: int) -> None:
        shutil.rmtree(store)
        shutil.copytree(stores.before, store)
        try:
            attributor(store).fit(Stopped(added, after), addition=1)
        except KeyboardInterrupt:
            return
        raise AssertionError("it was not stopped")

    for after in range(1, 3 * len(added), step):
        yield Fault("addition unfinished", ("",), lambda store, after=after: stop(store, after))


# --- what comes of it -----------------------------------------------------------------------------


class Expected(NamedTuple):
    """What an undamaged store gives."""

    scores: Tensor
    self_influence: Tensor
    files: dict[str, bytes]


def expected_of(store: Path) -> Expected:
    made = attributor(store)
    return Expected(made.attribute(pairs(2, 0, 3)), made.self_influence(), contents(store))


def outcome(store: Path, fault: Fault, expected: Expected, *, finished: bool) -> tuple[str, str]:
    """Return what came of a damaged store, the worst of reading and fitting it, and a sentence.

    One that is not finished is fitted first.
    """
    calls = [
        lambda: torch.equal(attributor(store).attribute(pairs(2, 0, 3)), expected.scores),
        lambda: torch.equal(attributor(store).self_influence(), expected.self_influence),
    ]
    found = [_outcome(call, store, fault) for call in calls if finished]

    def fit() -> bool:
        fit_both(store)
        return contents(store) == expected.files

    found.append(_outcome(fit, store, fault))
    for worst in ("SILENT", "unnamed", "refused by name"):
        for result, said in found:
            if result == worst:
                return worst, said
    return "right all the same", ""


def _outcome(call: Callable[[], bool], store: Path, fault: Fault) -> tuple[str, str]:
    try:
        right = call()
    except Exception as error:
        said = str(error)
        named = any(str(store / name) in said for name in fault.files) and "\n" not in said
        return "refused by name" if named else "unnamed", f"{type(error).__name__}: {said}"
    return ("right all the same", "") if right else ("SILENT", "no word")


Table = dict[str, Counter[str]]


def sweep(
    stores: Stores, all_faults: Iterable[Fault], folder: Path, good: Path | None = None
) -> tuple[Table, list[tuple[str, tuple[str, ...], str]]]:
    """Return outcomes by kind of fault, and what was unnamed or silent.

    Args:
        good: What is damaged; None for the finished store.
    """
    good = stores.good if good is None else good
    expected = expected_of(stores.good)
    table: Table = {}
    bad = []
    for number, fault in enumerate(all_faults):
        store = folder / f"store-{number}"
        shutil.copytree(good, store)
        fault.apply(store)
        result, said = outcome(store, fault, expected, finished=good == stores.good)
        table.setdefault(fault.kind, Counter())[result] += 1
        if result in OUTCOMES[2:]:
            bad.append((f"{result}: {fault.kind}", fault.files, said))
        shutil.rmtree(store)
    return table, bad


def print_table(table: Table) -> None:
    print(f"{'':28}" + "".join(f"{name:>20}" for name in ("tried", *OUTCOMES)))
    for kind, counts in table.items():
        numbers = (sum(counts.values()), *(counts[name] for name in OUTCOMES))
        print(f"{kind:28}" + "".join(f"{number:20}" for number in numbers))


# --- two writers ----------------------------------------------------------------------------------


def _writer(store: Path, data: int, barrier: Any, results: Any, delay: float) -> None:
    torch.set_num_threads(1)
    made = attributor(store)
    barrier.wait()
    time.sleep(delay)
    try:
        made.fit(pairs(data, 0, NUM_TRAIN))
        results.put((data, ""))
    except StoreError as error:
        results.put((data, str(error)))


def races(folder: Path, count: int) -> Counter[str]:
    """Let two runs of different data fit one store at once; return what came of it."""
    context = multiprocessing.get_context("fork")
    alone = []
    for data in (0, 1):
        attributor(folder / f"alone-{data}").fit(pairs(data, 0, NUM_TRAIN))
        alone.append(contents(folder / f"alone-{data}"))
    found: Counter[str] = Counter()
    for number in range(count):
        store = folder / f"race-{number}"
        barrier, results = context.Barrier(2), context.Queue()
        delays = (0.0, 0.002 * (number % 5))
        runs = [
            context.Process(target=_writer, args=(store, data, barrier, results, delays[data]))
            for data in (0, 1)
        ]
        for run in runs:
            run.start()
        said = dict(results.get(timeout=120) for _ in runs)
        for run in runs:
            run.join()
        winners = [data for data in (0, 1) if not said[data]]
        right = len(winners) == 1 and contents(store) == alone[winners[0]]
        named = all(str(store) in text for text in said.values() if text)
        found["right, the other run refused by name" if right and named else "WRONG"] += 1
    return found


# --- kills ----------------------------------------------------------------------------------------


def _run(store: Path, seconds: float) -> None:
    torch.set_num_threads(1)
    fitting.JOURNAL_SECONDS = seconds
    fit_both(store)


def kills(folder: Path, count: int, seed: int = 0) -> Counter[str]:
    """Kill a fit at `count` random moments, going on after each; return what came of it.

    A store that is finished is compared and a new one begun.
    """
    context = multiprocessing.get_context("fork")
    chosen = random.Random(seed)
    torch.set_num_threads(1)
    fit_both(folder / "first")  # whatever takes long once
    begun = time.monotonic()
    fit_both(folder / "whole")
    length = time.monotonic() - begun
    expected = contents(folder / "whole")
    found: Counter[str] = Counter()
    killed = number = 0
    while True:
        store = folder / f"killed-{number}"
        run = context.Process(target=_run, args=(store, chosen.choice((0, 0.01))))
        run.start()
        if killed < count:
            run.join(chosen.random() * length)
            if run.is_alive():
                os.kill(run.pid or 0, signal.SIGKILL)
        run.join()
        if run.exitcode == -signal.SIGKILL:
            killed += 1
            found["killed"] += 1
            continue
        same = run.exitcode == 0 and contents(store) == expected
        found["finished, byte for byte the same" if same else "WRONG"] += 1
        number += 1
        if killed >= count:
            return found


# --- the command ----------------------------------------------------------------------------------


def short_form(folder: Path) -> list[tuple[str, tuple[str, ...], str]]:
    """Return what passes unseen of a few faults of each kind, on the files of one checkpoint."""
    stores = make_stores(folder / "stores")
    folders = ("manifest.json", "checkpoint-0001")
    names = [name for name in contents(stores.good) if name.split("/")[0] in folders]
    few = itertools.chain(
        faults(stores, stores.good, names, 1, 1), copied_folders(stores), unfinished(stores, 2)
    )
    table, bad = sweep(stores, few, folder)
    assert len(table) >= 8
    some = faults(stores, stores.under_way, list(contents(stores.under_way)), 1, 1)
    return bad + sweep(stores, some, folder, stores.under_way)[1]


def small_shards() -> None:
    base.shard_rows = lambda width: ROWS


def main() -> int:
    """Run a long form and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("sweep", "races", "kills"))
    parser.add_argument("--count", type=int, help="races, kills, or positions in each file")
    options = parser.parse_args()
    small_shards()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.what == "sweep":
            stores = make_stores(folder / "stores")
            positions, wrong = options.count or 8, 0
            print(f"trak_ext {trak_ext.__version__}, torch {torch.__version__}")
            for good in (stores.good, stores.under_way):
                files = list(contents(good))
                all_faults = faults(stores, good, files, positions, 8)
                if good == stores.good:
                    others = (copied_folders(stores), unfinished(stores))
                    all_faults = itertools.chain(all_faults, *others)
                table, bad = sweep(stores, all_faults, folder, good)
                print(f"\n{good.name.replace('_', ' ')}: {len(files)} files")
                print_table(table)
                for line in bad:
                    print(*line)
                wrong += len(bad)
        else:
            run = races if options.what == "races" else kills
            found = run(folder, options.count or (25 if run is races else 60))
            for result, number in sorted(found.items()):
                print(f"{number:6} {result}")
            wrong = found["WRONG"]
    print(f"{time.monotonic() - begun:.0f} s")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
