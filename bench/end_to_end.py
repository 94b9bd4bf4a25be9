"""What attribution costs from model and data to scores, on three models with random weights.

    python bench/end_to_end.py [--samples 128] [--repeats 3] [--models resnet9 bert gpt2]
    python bench/end_to_end.py --tables peers [--peers kronfluence traker dattri] [--samples 512]
                               [--peer-samples 64] [--targets 100] [--batches 8 32 128]

"fit": `fit` and `attribute` beside the per-sample gradients alone. "gradients" computes what `fit`
does by `vmap(grad)`, in sample chunks of each size, and drops them; the ratios are to the best of
those sizes. Memory is what a process's peak grew by, after a warm-up of two samples.

"peers": the whole way to scores of targets, `fit` and `attribute` with their defaults beside other
libraries (end_to_end_peers.py says how each is called). kronfluence gets --samples, and the batch
size of --batches that was fastest in one run of each. traker and dattri make their matrix anew for
every batch: they get --peer-samples and --peer-batch, as large as memory allows. Each ratio is of
the same samples and targets, in turn. A peer that is not installed is left out, with a word.

Data from fixed seeds, one thread. Every measurement is a process of its own, in turn; medians.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader

import end_to_end_compare
from end_to_end_models import MODELS, make
from end_to_end_peers import PEERS, version
from measure import medians, pin_to_one_core, print_table, spent, write_json
from trak_ext import Attributor
from trak_ext.gradients import GradientComputer
from trak_ext.tasks import get_task

CHUNKS = (1, 2, 4, 8, 16, 32)
KINDS = ("rademacher", "sjlt")
PROJ_DIM = 2048
NUM_TARGETS = 20


def run(model_name: str, what: str, samples: int) -> dict[str, float]:
    """Do one thing, and return what it took."""
    torch.set_num_threads(1)
    model, task, rows = make(model_name, samples)
    train = DataLoader(rows, batch_size=64)
    targets = DataLoader(rows[:NUM_TARGETS], batch_size=NUM_TARGETS)
    few = DataLoader(rows[:2], batch_size=2)
    work: Callable[[], object]
    if what in KINDS or what.startswith("attribute"):
        kind = what.removeprefix("attribute ")
        options: dict[str, Any] = {"proj_dim": PROJ_DIM, "kind": kind, "progress": False}
        Attributor(model, task, **options).fit(few)  # what is done once a process
        attributor = Attributor(model, task, **options)
        if what.startswith("attribute"):
            attributor.fit(train)
            work = partial(attributor.attribute, targets)
        else:
            work = partial(attributor.fit, train)
    else:
        computer = GradientComputer(model, get_task(task), None, int(what))
        weights = dict(model.state_dict())

        def work() -> None:
            for batch in train:
                for _ in computer(weights, batch):
                    pass

        for batch in few:
            for _ in computer(weights, batch):
                pass
    _, took = spent(work)
    return {**took, "params": sum(parameter.numel() for parameter in model.parameters())}


def measure(model: str, samples: int, repeats: int) -> dict[str, dict[str, float]]:
    """Return medians of several processes for each thing that is done."""
    things = [*map(str, CHUNKS), *KINDS, *(f"attribute {kind}" for kind in KINDS)]
    found: dict[str, list[dict[str, float]]] = {thing: [] for thing in things}
    for _ in range(repeats):
        for thing in things:
            command = [sys.executable, __file__, "--run", model, thing, str(samples)]
            said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found[thing].append(json.loads(said.splitlines()[-1]))
    return {thing: medians(runs) for thing, runs in found.items()}


def table(measured: dict[str, dict[str, dict[str, float]]]) -> list[list[str]]:
    lines = []
    for model, things in measured.items():
        best = min(things[str(chunk)]["wall"] for chunk in CHUNKS)
        for thing, took in things.items():
            name = thing if thing.startswith("attribute") else f"fit, {thing}"
            name = f"gradients, chunks of {thing}" if thing.isdigit() else name
            lines.append(
                [
                    f"{model}: {name}",
                    f"{took['wall']:.2f}",
                    f"{took['wall'] / best:.2f}",
                    f"{took['user']:.2f}",
                    f"{took['system']:.2f}",
                    f"{took['peak_mib']:.0f}",
                ]
            )
    return lines


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tables", nargs="+", choices=["fit", "peers"], default=["fit"])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    names = list(PEERS)
    parser.add_argument("--peers", nargs="+", choices=names, default=names)
    parser.add_argument("--targets", type=int, default=100, help="of the table of peers")
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--peer-samples", type=int, default=64, help="of traker and dattri")
    parser.add_argument("--peer-batch", type=int, default=128, help="of traker and dattri")
    parser.add_argument("--json", help="where to write the figures")
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> None:
    args = parse()
    if args.run:
        print(json.dumps(run(args.run[0], args.run[1], int(args.run[2]))))
        return
    pin_to_one_core()
    rows: dict[str, Any] = {}
    if "fit" in args.tables:
        rows["fit"] = {model: measure(model, args.samples, args.repeats) for model in args.models}
        print_table(
            f"{args.samples} samples, proj_dim {PROJ_DIM}, one thread",
            ["", "s", "/ best gradients", "user s", "system s", "grew by MiB"],
            table(rows["fit"]),
        )
    if "peers" in args.tables:
        rows["peers"] = end_to_end_compare.measure(args, PROJ_DIM)
    settings = {key: value for key, value in vars(args).items() if key not in ("json", "run")}
    settings["proj_dim"] = PROJ_DIM
    settings["versions"] = {name: version(name) for name in args.peers}
    write_json(args.json, "end_to_end", settings, rows)


if __name__ == "__main__":
    main()
