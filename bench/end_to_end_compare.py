"""Contenders of bench/end_to_end.py in turn: what each took, and how its scores rank samples."""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from end_to_end_models import make
from end_to_end_peers import CONTENDERS, OURS, PEERS, Setting, gradient_norm, version
from measure import median_ratio, medians, print_table, spent

OUR_BATCH = 64
HEADER = ["", "samples", "batch", "s", "/ trak_ext", "user s", "system s", "grew by MiB", "rank"]


def run(
    contender: str, model_name: str, samples: int, targets: int, batch: int, proj_dim: int
) -> tuple[Tensor, dict[str, float]]:
    """Return a contender's scores [samples, targets], and what they took."""
    torch.set_num_threads(1)
    model, task, rows = make(model_name, samples + targets)
    norm = gradient_norm(model, rows[:2])
    setting = Setting(model, task, rows[:samples], rows[samples:], batch, proj_dim, norm)
    module = PEERS.get(contender.split(",")[0])
    if module is not None:
        importlib.import_module(module)
    scores, took = spent(partial(CONTENDERS[contender], setting))
    assert scores.shape == (samples, targets), (contender, scores.shape)
    return scores, took


def run_apart(*arguments: str | int) -> tuple[Tensor, dict[str, float]]:
    """As `run`, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "scores.pt")
        command = [sys.executable, __file__, path, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{arguments}: {done.stderr}")
        return torch.load(path), json.loads(done.stdout.splitlines()[-1])


def spearman(a: Tensor, b: Tensor) -> float:
    """Return the rank correlation over samples of scores [n, t], its mean over targets."""
    ranks = [scores.argsort(0).argsort(0).double() for scores in (a, b)]
    centred = [rank - rank.mean(0) for rank in ranks]
    cosines = (centred[0] * centred[1]).sum(0) / (centred[0].norm(dim=0) * centred[1].norm(dim=0))
    return float(cosines.mean())


def compare(
    contenders: dict[str, int], model: str, samples: int, targets: int, repeats: int, proj_dim: int
) -> list[dict[str, Any]]:
    """Return medians for contenders, each with its batch size, in turn on the same samples."""
    scores: dict[str, Tensor] = {}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, batch in contenders.items():
            scores[name], took = run_apart(name, model, samples, targets, batch, proj_dim)
            runs[name].append(took)
    walls = {name: [took["wall"] for took in these] for name, these in runs.items()}
    return [
        {
            "name": name,
            "samples": samples,
            "batch": contenders[name],
            **medians(these),
            "ratio": median_ratio(walls[name], walls[OURS]),
            "spearman": spearman(scores[name], scores[OURS]),
            "runs": these,
        }
        for name, these in runs.items()
    ]


def fastest_batch(
    contender: str, model: str, samples: int, targets: int, batches: Sequence[int], proj_dim: int
) -> tuple[int, dict[int, float]]:
    """Return the batch size of the fastest of one run of each, and the seconds of each."""
    sizes = sorted({min(batch, samples) for batch in batches})
    if len(sizes) == 1:
        return sizes[0], {}
    seconds = {
        size: run_apart(contender, model, samples, targets, size, proj_dim)[1]["wall"]
        for size in sizes
    }
    return min(seconds, key=lambda size: seconds[size]), seconds


def measure(args: argparse.Namespace, proj_dim: int) -> dict[str, Any]:
    """Measure and print the contenders on each model."""
    installed = []
    for peer in args.peers:
        if version(peer) is None:
            print(f"{peer} is left out: it is not installed")
        else:
            installed.append(peer)
    rows: dict[str, Any] = {}
    for model in args.models:
        # By the number of samples: peers of one group are compared in the same turns.
        groups: dict[int, dict[str, int]] = {args.samples: {}}
        tried: dict[str, dict[int, float]] = {}
        for name in contenders(installed, model):
            if name.startswith("kronfluence"):
                batch, tried[name] = fastest_batch(
                    name, model, args.samples, args.targets, args.batches, proj_dim
                )
                groups[args.samples][name] = batch
            else:
                batch = min(args.peer_batch, max(args.peer_samples, args.targets))
                groups.setdefault(args.peer_samples, {})[name] = batch
        found = []
        for samples, group in groups.items():
            ours = {name: OUR_BATCH for name in CONTENDERS if name.startswith(OURS)}
            found += compare(
                {**ours, **group}, model, samples, args.targets, args.repeats, proj_dim
            )
        rows[model] = {"contenders": found, "batches_tried": tried}
        print_table(
            f"{model}: to scores of {args.targets} targets, proj_dim {proj_dim}, one thread",
            HEADER,
            table(found),
        )
    print("\nrank: mean over targets of the rank correlation with trak_ext's scores")
    return rows


def contenders(installed: Sequence[str], model: str) -> list[str]:
    """Return what of the installed peers is run on a model."""
    found = [name for name in CONTENDERS if name.split(",")[0] in installed]
    return [name for name in found if "," not in name or model == "gpt2"]


def table(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    return [
        [
            row["name"],
            str(row["samples"]),
            str(row["batch"]),
            f"{row['wall']:.2f}",
            f"{row['ratio']:.2f}",
            f"{row['user']:.2f}",
            f"{row['system']:.2f}",
            f"{row['peak_mib']:.0f}",
            f"{row['spearman']:.3f}",
        ]
        for row in rows
    ]


def _main() -> None:
    path, contender, model, *numbers = sys.argv[1:]
    scores, took = run(contender, model, *map(int, numbers))
    torch.save(scores, path)
    print(json.dumps(took))


if __name__ == "__main__":
    _main()
