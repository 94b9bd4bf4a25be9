"""How many files and functions of trak_ext one batch goes through, in `fit` and in `attribute`.

    python bench/files_entered.py [--store FOLDER] [--list]

A reader who follows a gradient from the loader to a feature or a score opens these files: from
where the loader hands a batch over to where it is asked for the next, and in `attribute` on to the
scores. "whole call" counts what comes before and after as well: settings, checkpoints, digests,
the probe, the choice of damping. Counted by `sys.setprofile`, with one batch of samples and one of
targets.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

import trak_ext

PACKAGE = str(Path(trak_ext.__file__).parent)
Entered = dict[str, set[str]]


class Notes:
    """The functions of trak_ext that are entered while noting is on, by file."""

    def __init__(self) -> None:
        self.found: Entered = {}

    def _note(self, frame: FrameType, event: str, _: Any) -> None:
        path = frame.f_code.co_filename
        if event == "call" and path.startswith(PACKAGE):
            code = frame.f_code
            name = getattr(code, "co_qualname", code.co_name)  # Python 3.10 has the name alone
            self.found.setdefault(path[len(PACKAGE) + 1 :], set()).add(name)

    def on(self) -> None:
        """Note from now on."""
        sys.setprofile(self._note)

    def off(self) -> None:
        """Note no more."""
        sys.setprofile(None)


class OneBatch:
    """A loader of one batch, which notes what happens after it has handed the batch over."""

    def __init__(self, batch: Any, notes: Notes, *, on_to_the_end: bool) -> None:
        self._batch, self._notes, self._on = batch, notes, on_to_the_end

    def __iter__(self) -> Iterator[Any]:
        self._notes.found.clear()  # of a pass that only looked at the batch
        self._notes.on()
        yield self._batch
        if not self._on:
            self._notes.off()


def calls(store: str | None = None) -> dict[str, tuple[Entered, Entered]]:
    """Return what a batch enters, and what the call does, by call."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    batch = (torch.randn(32, 64), torch.randint(10, (32,)))
    found = {}
    for name in ("fit", "attribute", "attribute, top_k"):
        both = []
        for whole in (False, True):
            folder = None if store is None else str(Path(store, str(whole)))
            attributor = trak_ext.Attributor(
                model, "image_classification", proj_dim=64, store=folder, progress=False
            )
            if name != "fit":
                attributor.fit([batch])
            call: Callable[[Any], Any] = {
                "fit": attributor.fit,
                "attribute": attributor.attribute,
                "attribute, top_k": lambda loader, a=attributor: a.attribute(loader, top_k=5),
            }[name]
            notes = Notes()
            loader = OneBatch(batch, notes, on_to_the_end=name != "fit")
            if whole:
                notes.on()
            try:
                call([batch] if whole else loader)
            finally:
                notes.off()
            both.append(notes.found)
        found[name] = (both[0], both[1])
    return found


def main() -> None:
    """Print the counts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", help="an empty folder for the features; None for memory")
    parser.add_argument("--list", action="store_true", help="name the files and functions")
    arguments = parser.parse_args()
    for name, both in calls(arguments.store).items():
        for what, found in zip(("batch", "whole call"), both, strict=True):
            functions = sum(len(names) for names in found.values())
            print(f"{name:18} {what:10} {len(found):3} files  {functions:4} functions")
            if arguments.list:
                for path, names in sorted(found.items()):
                    print(f"    {path:32} {', '.join(sorted(names))}")


if __name__ == "__main__":
    main()
