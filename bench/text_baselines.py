"""TRAK beside its baselines on real text: MiniLM fine-tuned to tell packages by their docstrings.

Texts are first sentences of docstrings, six packages, names masked (examples/docstrings.py). The
last encoder layer and a linear head are fine-tuned; the five layers below are frozen and their
activations computed once. Every method sees exactly the fine-tuned parameters, and the same M
checkpoints, which were trained on all training texts. The truth is retraining on random halves.

    python bench/text_baselines.py --json bench/results/text_baselines.json

takes under 25 minutes on one core. `--truth FILE` keeps the retrained models' outputs, so that
other settings of the methods need no retraining.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from comparison import compare, print_rows
from measure import machine_name, write_json
from text_truth import TextTask, make_task, retrain_on_halves, train_checkpoints
from trak_ext import Attributor, baselines

TASK = "text_classification"


def make_methods(
    task: TextTask, states: Sequence[dict[str, Tensor]], dampings: Sequence[float], proj_dim: int
) -> dict[str, Any]:
    """Return methods by name; those of TRAK share one fitted attributor."""
    common: dict[str, Any] = {"checkpoints": states, "progress": False}
    projected = common | {"proj_dim": proj_dim}
    trak = Attributor(task.model, TASK, **projected)
    methods: dict[str, Any] = {"TRAK": (trak, trak.estimator)}
    for damping in dampings:
        plain = replace(trak.estimator, damping=damping, curvature=None)
        methods[f"TRAK, damping {damping:g}, no curvature"] = (trak, plain)
    return methods | {
        "gradient product": baselines.GradientProduct(task.model, TASK, **projected),
        "gradient cosine": baselines.GradientCosine(task.model, TASK, **projected),
        "TracIn, equal rates": baselines.TracIn(task.model, TASK, **projected),
        "representation, cosine": baselines.RepresentationSimilarity(task.model, TASK, **common),
        "representation, dot": baselines.RepresentationSimilarity(
            task.model, TASK, similarity="dot", **common
        ),
        "representation, -distance": baselines.RepresentationSimilarity(
            task.model, TASK, similarity="negative_distance", **common
        ),
        "random": baselines.Random(task.model, TASK, **common),
    }


def score(task: TextTask, methods: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return each method's scores [n, t] and the seconds it took (TRAK's fit in the first)."""
    train, test = task.train.loader(), task.test.loader()
    scores, seconds = {}, {}
    fitted: set[int] = set()
    for name, method in methods.items():
        begin = time.perf_counter()
        if isinstance(method, tuple):
            method, method.estimator = method
        if id(method) not in fitted:
            method.fit(train)
            fitted.add(id(method))
        scores[name] = method.attribute(test)
        seconds[name] = round(time.perf_counter() - begin, 1)
        print(f"{name}: {seconds[name]} s", flush=True)
    return scores, seconds


def accuracy(task: TextTask, state: dict[str, Tensor]) -> float:
    right = 0
    with torch.no_grad():
        for batch in task.test.loader():
            labels = batch.pop("labels")
            logits = torch.func.functional_call(task.model, state, (), batch)
            right += int((logits.argmax(1) == labels).sum())
    return right / len(task.test.labels)


def half_to_half(outputs: Tensor) -> float | None:
    """Return the rank correlation of one model per subset with another: what noise leaves."""
    if outputs.shape[1] < 2:
        return None
    ranks = [outputs[:, r].argsort(0).argsort(0).double() for r in range(2)]
    centred = [(rank - rank.mean(0)) / rank.std(0, correction=0) for rank in ranks]
    return (centred[0] * centred[1]).mean(0).mean().item()


def run(settings: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    task = make_task(settings.num_train, settings.num_test, settings.seed)
    begin = time.perf_counter()
    states = train_checkpoints(task, settings.checkpoints, settings.seed)
    training = round(time.perf_counter() - begin)
    masks, outputs = retrain_on_halves(
        task, settings.subsets, settings.models_a_subset, settings.seed, settings.truth
    )
    methods = make_methods(task, states, settings.dampings, settings.proj_dim)
    scores, seconds = score(task, methods)
    ours = "TRAK"  # the defaults; other dampings are there to be seen
    rows = compare(scores, masks, outputs.mean(1), ours)
    extra = {
        "num_params": sum(p.numel() for p in task.model.parameters()),
        "test_accuracy": accuracy(task, states[0]),
        "seed_to_seed_correlation": half_to_half(outputs),
        "checkpoint_seconds": training,
        "seconds": seconds,
    }
    print_rows("LDS on docstrings, MiniLM fine-tuned", rows, ours)
    print(extra, machine_name())
    return {"rows": rows, **extra}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-train", type=int, default=400)
    parser.add_argument("--num-test", type=int, default=150)
    parser.add_argument("--subsets", type=int, default=40)
    parser.add_argument("--models-a-subset", type=int, default=3)
    parser.add_argument("--checkpoints", type=int, default=5)
    parser.add_argument("--proj-dim", type=int, default=1024)
    parser.add_argument("--dampings", type=float, nargs="*", default=[0.1, 1.0, 10.0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--truth", help="file that keeps the retrained models' outputs")
    parser.add_argument("--json")
    return parser.parse_args(arguments)


def main() -> None:
    settings = parse()
    torch.set_num_threads(settings.threads)
    results = run(settings)
    chosen = {k: v for k, v in vars(settings).items() if k not in ("json", "truth")}
    write_json(settings.json, "text_baselines", chosen, results)


if __name__ == "__main__":
    main()
