"""Cost per sample over B, k and P of `project`, and over n of `Attributor.fit`.

    python bench/cost_per_sample.py [--params 10000 1000000 10000000] [--proj-dims 64 256 ...]
                                    [--batches 1 2 4 ...] [--tables projection fit] [--json FILE]

"projection": microseconds per sample of fp32 gradients on one core and, in brackets, the share of
what the core can do at best, measured in the same turns. For rademacher and normal that is its
multiply-add peak (2 B P k operations; above 1 where signs are applied without multiplying), for
sjlt the reading of the gradients once, from memory or from the cache that they fit in. What
takes long is left out: dense products of more than --most-work multiply-adds, and normal but for
--normal-params and --normal-proj-dims.

"fit": microseconds per sample of `fit` of a small perceptron, whose batches are there already.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import trak_ext
from ceilings import Ceilings
from measure import alternate, machine_name, median_ratio, pin_to_one_core, print_table, write_json
from trak_ext import Attributor

KINDS = ("rademacher", "sjlt", "normal")
SHORTEST = 0.005  # seconds of one measurement, for which calls are repeated


class Repeated:
    """A call, as many times as take `SHORTEST` seconds."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.call = call
        call()  # what is done once
        begin = time.perf_counter()
        call()
        self.count = max(1, math.ceil(SHORTEST / max(time.perf_counter() - begin, 1e-7)))

    def __call__(self) -> None:
        """Call it."""
        for _ in range(self.count):
            self.call()


def kinds(batch: int, params: int, proj_dim: int, args: argparse.Namespace) -> list[str]:
    """Return the kinds that are measured at a size."""
    dense = batch * params * proj_dim <= args.most_work
    few = params in args.normal_params and proj_dim in args.normal_proj_dims
    wanted = {"rademacher": dense, "sjlt": True, "normal": dense and few}
    return [kind for kind in args.kinds if wanted[kind]]


def measure_projection(
    grads: Tensor, proj_dim: int, kinds: Sequence[str], ceilings: Ceilings, repeats: int
) -> list[dict[str, Any]]:
    """Return what each kind takes per sample of gradients [B, P], and its share of the best."""
    batch, params = grads.shape
    repeated = {
        kind: Repeated(partial(trak_ext.project, grads, proj_dim, kind=kind)) for kind in kinds
    }
    repeated["read"] = Repeated(partial(ceilings.read, grads.numpy().ravel()))
    peaks: list[float] = []
    found = alternate({**repeated, "peak": lambda: peaks.append(ceilings.multiply_add())}, repeats)
    seconds = {name: [took / call.count for took in found[name]] for name, call in repeated.items()}
    peak = statistics.median(peaks)
    rows = []
    for kind in kinds:
        took = statistics.median(seconds[kind])
        if kind == "sjlt":
            share = median_ratio(seconds["read"], seconds[kind])
        else:
            share = 2.0 * batch * params * proj_dim / took / peak
        rows.append(
            {
                "kind": kind,
                "params": params,
                "proj_dim": proj_dim,
                "batch": batch,
                "seconds": seconds[kind],
                "read_seconds": seconds["read"],
                "peak": peak,
                "microseconds_per_sample": 1e6 * took / batch,
                "share_of_best": share,
            }
        )
    return rows


def measure_projections(args: argparse.Namespace) -> list[dict[str, Any]]:
    ceilings = Ceilings(trak_ext.build_info()["cpu_level"])
    rows = []
    for params in args.params:
        generator = torch.Generator().manual_seed(params)
        grads = torch.randn(max(args.batches), params, generator=generator)
        for proj_dim, batch in itertools.product(args.proj_dims, args.batches):
            chosen = kinds(batch, params, proj_dim, args)
            rows += measure_projection(grads[:batch], proj_dim, chosen, ceilings, args.repeats)
    return rows


def projection_table(rows: Sequence[dict[str, Any]], batches: Sequence[int]) -> list[list[str]]:
    """Return a line a kind, P and k, with a cell a B."""
    cells = {
        (row["kind"], row["params"], row["proj_dim"], row["batch"]): (
            f"{row['microseconds_per_sample']:,.4g} ({row['share_of_best']:.2f})"
        )
        for row in rows
    }
    lines = sorted({key[:3] for key in cells}, key=lambda key: (KINDS.index(key[0]), *key[1:]))
    return [
        [kind, f"{params:,}", str(proj_dim)]
        + [cells.get((kind, params, proj_dim, batch), "") for batch in batches]
        for kind, params, proj_dim in lines
    ]


def fit_batches(samples: int) -> list[tuple[Tensor, Tensor]]:
    """Return (inputs, labels) of a perceptron's samples, 500 at a time."""
    generator = torch.Generator().manual_seed(samples)
    inputs = torch.randn(samples, 64, generator=generator)
    labels = torch.randint(10, (samples,), generator=generator)
    return list(zip(inputs.split(500), labels.split(500), strict=True))


def measure_fit(sizes: Sequence[int], proj_dim: int, repeats: int) -> list[dict[str, Any]]:
    """Return what `fit` takes per sample of training sets of several sizes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def fit(batches: list[tuple[Tensor, Tensor]]) -> None:
        options: dict[str, Any] = {"proj_dim": proj_dim, "progress": False}
        Attributor(model, "image_classification", **options).fit(batches)

    calls: dict[str, Callable[[], object]] = {
        str(size): partial(fit, fit_batches(size)) for size in sizes
    }
    seconds = alternate(calls, repeats, patience=60)
    return [
        {
            "samples": size,
            "seconds": seconds[str(size)],
            "microseconds_per_sample": 1e6 * statistics.median(seconds[str(size)]) / size,
        }
        for size in sizes
    ]


def fit_table(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    last = rows[-1]["microseconds_per_sample"]
    return [
        [
            f"{row['samples']:,}",
            f"{statistics.median(row['seconds']):.3f}",
            f"{row['microseconds_per_sample']:.1f}",
            f"{row['microseconds_per_sample'] / last:.2f}",
        ]
        for row in rows
    ]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    several: dict[str, Any] = {"type": int, "nargs": "+"}
    parser.add_argument(
        "--tables", nargs="+", choices=["projection", "fit"], default=["projection", "fit"]
    )
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--params", **several, default=[10**4, 10**6, 10**7])
    parser.add_argument("--proj-dims", **several, default=[64, 256, 512, 2048, 8192])
    parser.add_argument("--batches", **several, default=[1, 2, 4, 8, 16, 64])
    parser.add_argument("--most-work", type=int, default=2**39)
    parser.add_argument("--normal-params", **several, default=[10**6])
    parser.add_argument("--normal-proj-dims", **several, default=[512, 2048])
    parser.add_argument("--samples", **several, default=[500, 5_000, 50_000], help="n of fit")
    parser.add_argument("--fit-proj-dim", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", help="where to write the figures")
    return parser.parse_args(arguments)


def main() -> None:
    args = parse()
    pin_to_one_core()
    torch.set_num_threads(1)
    rows: dict[str, Any] = {}
    if "projection" in args.tables:
        rows["projection"] = measure_projections(args)
        print_table(
            f"{machine_name()}, level {trak_ext.build_info()['cpu_level']}, one core, fp32: "
            "microseconds per sample (share of the best)",
            ["kind", "P", "k", *(f"B = {batch}" for batch in args.batches)],
            projection_table(rows["projection"], args.batches),
        )
    if "fit" in args.tables:
        rows["fit"] = measure_fit(args.samples, args.fit_proj_dim, args.repeats)
        print_table(
            f"fit of a perceptron of 4,810 parameters, proj_dim {args.fit_proj_dim}, one core",
            ["n", "s", "us per sample", "/ largest n"],
            fit_table(rows["fit"]),
        )
    settings = {key: value for key, value in vars(args).items() if key != "json"}
    settings["level"] = trak_ext.build_info()["cpu_level"]
    write_json(args.json, "cost_per_sample", settings, rows)


if __name__ == "__main__":
    main()
