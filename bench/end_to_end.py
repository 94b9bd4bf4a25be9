"""What `fit` and `attribute` cost beside the per-sample gradients alone, on three models.

    python bench/end_to_end.py [--samples 128] [--repeats 3] [--models resnet9 bert gpt2]

Random weights and data from fixed seeds, one thread. "gradients" computes what `fit` does by
`vmap(grad)`, in sample chunks of each size, and drops them; the ratios are to the best of those
sizes. Every measurement is a process of its own, in turn; medians. Memory is what a process's peak
grew by, after a warm-up of two samples.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from measure import pin_to_one_core, print_table, write_json
from trak_ext import Attributor
from trak_ext.gradients import GradientComputer
from trak_ext.tasks import get_task

CHUNKS = (1, 2, 4, 8, 16, 32)
KINDS = ("rademacher", "sjlt")
PROJ_DIM = 2048
NUM_TARGETS = 20
TOKENS = 64


class Residual(nn.Sequential):
    """Layers whose input is added to their output."""

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return x + super().forward(x)


def convolution(inputs: int, outputs: int, *pool: nn.Module) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
        *pool,
    )


def resnet9(generator: torch.Generator, samples: int) -> tuple[nn.Module, str, Any]:
    """Return a ResNet of nine layers and 1.06 million parameters, its task and a batch."""
    w = 36
    model = nn.Sequential(
        convolution(3, w),
        convolution(w, 2 * w, nn.MaxPool2d(2)),
        Residual(convolution(2 * w, 2 * w), convolution(2 * w, 2 * w)),
        convolution(2 * w, 4 * w, nn.MaxPool2d(2)),
        convolution(4 * w, 5 * w, nn.MaxPool2d(2)),
        Residual(convolution(5 * w, 5 * w), convolution(5 * w, 5 * w)),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(5 * w, 10),
    )
    images = torch.randn(samples, 3, 32, 32, generator=generator)
    labels = torch.randint(10, (samples,), generator=generator)
    rows = list(zip(images, labels, strict=True))
    return model, "image_classification", rows


def bert(generator: torch.Generator, samples: int) -> tuple[nn.Module, str, Any]:
    """Return a BERT of four layers and 5.4 million parameters, its task and a batch."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=8192, hidden_size=256, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=1024, max_position_embeddings=128, num_labels=2,
    )  # fmt: skip
    ids = torch.randint(8192, (samples, TOKENS), generator=generator)
    labels = torch.randint(2, (samples,), generator=generator)
    rows = [
        {"input_ids": one, "attention_mask": torch.ones_like(one), "labels": label}
        for one, label in zip(ids, labels, strict=True)
    ]
    return BertForSequenceClassification(config), "text_classification", rows


def gpt2(generator: torch.Generator, samples: int) -> tuple[nn.Module, str, Any]:
    """Return a GPT-2 of three layers and 2.1 million parameters, its task and a batch."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=4096, n_positions=TOKENS, n_embd=192, n_layer=3, n_head=4,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    ids = torch.randint(4096, (samples, TOKENS), generator=generator)
    rows = [
        {"input_ids": one, "attention_mask": torch.ones_like(one), "labels": one} for one in ids
    ]
    return GPT2LMHeadModel(config), "causal_lm", rows


MODELS: dict[str, Callable[[torch.Generator, int], tuple[nn.Module, str, Any]]] = {
    "resnet9": resnet9,
    "bert": bert,
    "gpt2": gpt2,
}


def run(model_name: str, what: str, samples: int) -> dict[str, float]:
    """Do one thing, and return what it took."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, task, rows = MODELS[model_name](torch.Generator().manual_seed(1), samples)
    model.eval()
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
    before, begin = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    work()
    wall, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_SELF)
    return {
        "wall": wall,
        "user": after.ru_utime - before.ru_utime,
        "system": after.ru_stime - before.ru_stime,
        "peak_mib": (after.ru_maxrss - before.ru_maxrss) / 1024,
        "params": sum(parameter.numel() for parameter in model.parameters()),
    }


def measure(model: str, samples: int, repeats: int) -> dict[str, dict[str, float]]:
    """Return medians of several processes for each thing that is done."""
    things = [*map(str, CHUNKS), *KINDS, *(f"attribute {kind}" for kind in KINDS)]
    found: dict[str, list[dict[str, float]]] = {thing: [] for thing in things}
    for _ in range(repeats):
        for thing in things:
            command = [sys.executable, __file__, "--run", model, thing, str(samples)]
            said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found[thing].append(json.loads(said.splitlines()[-1]))
    return {
        thing: {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        for thing, runs in found.items()
    }


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", help="where to write the figures")
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        print(json.dumps(run(args.run[0], args.run[1], int(args.run[2]))))
        return
    pin_to_one_core()
    measured = {model: measure(model, args.samples, args.repeats) for model in args.models}
    print_table(
        f"{args.samples} samples, proj_dim {PROJ_DIM}, one thread",
        ["", "s", "/ best gradients", "user s", "system s", "grew by MiB"],
        table(measured),
    )
    settings = {"samples": args.samples, "repeats": args.repeats, "proj_dim": PROJ_DIM}
    write_json(args.json, "end_to_end", settings, measured)


if __name__ == "__main__":
    main()
