"""How many files and functions of trak_ext one batch goes through, in `fit` and in `attribute`.

    python bench/files_entered.py [--store FOLDER] [--list]

A reader who follows a gradient from the loader to a score opens these files. Counted by
`sys.setprofile` over the whole calls, with one batch of samples and one of targets.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import trak_ext

PACKAGE = str(Path(trak_ext.__file__).parent)


def entered(function: Callable[[], Any]) -> dict[str, set[str]]:
    """Return the functions of trak_ext that a call enters, by file."""
    found: dict[str, set[str]] = {}

    def note(frame: FrameType, event: str, _: Any) -> None:
        path = frame.f_code.co_filename
        if event == "call" and path.startswith(PACKAGE):
            found.setdefault(path[len(PACKAGE) + 1 :], set()).add(frame.f_code.co_qualname)

    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    return found


def calls(store: str | None = None) -> dict[str, dict[str, set[str]]]:
    """Return what `fit`, `attribute` and `attribute(top_k=5)` enter."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    data = TensorDataset(torch.randn(32, 64), torch.randint(10, (32,)))
    loader = DataLoader(data, batch_size=32)
    attributor = trak_ext.Attributor(
        model, "image_classification", proj_dim=64, store=store, progress=False
    )
    return {
        "fit": entered(lambda: attributor.fit(loader)),
        "attribute": entered(lambda: attributor.attribute(loader)),
        "attribute, top_k": entered(lambda: attributor.attribute(loader, top_k=5)),
    }


def main() -> None:
    """Print the counts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", help="an empty folder for the features; None for memory")
    parser.add_argument("--list", action="store_true", help="name the files and functions")
    arguments = parser.parse_args()
    for name, found in calls(arguments.store).items():
        functions = sum(len(names) for names in found.values())
        print(f"{name:18} {len(found):3} files  {functions:4} functions")
        if arguments.list:
            for path, names in sorted(found.items()):
                print(f"    {path:32} {', '.join(sorted(names))}")


if __name__ == "__main__":
    main()
