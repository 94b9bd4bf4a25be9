"""TRAK beside every baseline on digits: an MLP, a deeper one and a CNN, M = 10.

    python bench/digits_baselines.py --json bench/results/digits_baselines.json

Recipe of the demonstration (trak_ext.demo.run): 1,200 training and 300 held-out digits, 50 random
halves with 5 networks each as the truth, checkpoints trained on all samples, TRAK with its
defaults and proj_dim 512. TracIn takes the same checkpoints with equal rates; it was meant for
checkpoints along one run.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from comparison import compare, print_rows
from measure import write_json
from trak_ext import Attributor, baselines
from trak_ext.demo import digits

TASK = "image_classification"


def mlp3() -> nn.Module:
    """Return a perceptron 64-64-64-10."""
    return nn.Sequential(
        nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
    )


def cnn() -> nn.Module:
    """Return two convolutions (8 and 16 channels, the second of stride 2) and a linear layer."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 10),
    )


NETWORKS: dict[str, Callable[[], nn.Module]] = {"mlp": digits.make_model, "mlp3": mlp3, "cnn": cnn}


def loader(inputs: Tensor, labels: Tensor) -> DataLoader[Any]:
    return DataLoader(TensorDataset(inputs, labels), batch_size=256)


def train_on_all(
    factory: Callable[[], nn.Module], split: digits.DigitsSplit, seeds: Sequence[int], **recipe: Any
) -> list[dict[str, Tensor]]:
    everything = torch.arange(len(split.train_labels)).expand(len(seeds), -1)
    states = digits.train_models(
        split.train_inputs, split.train_labels, everything, seeds, model_factory=factory, **recipe
    )
    return digits.unstack_states(states)


def make_methods(
    factory: Callable[[], nn.Module], states: Sequence[dict[str, Tensor]], proj_dim: int, seed: int
) -> dict[str, Any]:
    model = factory()
    common: dict[str, Any] = {"checkpoints": states, "progress": False}
    return {
        "TRAK": Attributor(model, TASK, proj_dim=proj_dim, seed=seed, **common),
        "gradient product": baselines.GradientProduct(model, TASK, **common),
        "gradient cosine": baselines.GradientCosine(model, TASK, **common),
        "TracIn": baselines.TracIn(model, TASK, **common),
        "representation, cosine": baselines.RepresentationSimilarity(model, TASK, **common),
        "representation, dot": baselines.RepresentationSimilarity(
            model, TASK, similarity="dot", **common
        ),
        "representation, -distance": baselines.RepresentationSimilarity(
            model, TASK, similarity="negative_distance", **common
        ),
        "random": baselines.Random(model, TASK, seed=seed, **common),
    }


def attribute(methods: dict[str, Any], split: digits.DigitsSplit) -> dict[str, Tensor]:
    scores = {}
    for name, method in methods.items():
        method.fit(loader(split.train_inputs, split.train_labels))
        scores[name] = method.attribute(loader(split.test_inputs, split.test_labels))
    return scores


def measure(network: str, settings: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row a method for one network."""
    factory, seed = NETWORKS[network], settings.seed
    split = digits.load_digits_split(settings.num_train, settings.num_test, seed=seed)
    masks = digits.subset_masks(settings.subsets, settings.num_train, seed=seed)
    first = seed * 10_000 + 1_000
    outputs = digits.outputs_after_retraining(
        split, masks, settings.models_a_subset, first, model_factory=factory
    )
    seeds = [seed * 10_000 + i for i in range(settings.checkpoints)]
    states = train_on_all(factory, split, seeds)
    scores = attribute(make_methods(factory, states, settings.proj_dim, seed), split)
    rows = compare(scores, masks, outputs, "TRAK")
    return [{"network": network, **row} for row in rows]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--num-train", type=int, default=1200)
    parser.add_argument("--num-test", type=int, default=300)
    parser.add_argument("--subsets", type=int, default=50)
    parser.add_argument("--models-a-subset", type=int, default=5)
    parser.add_argument("--checkpoints", type=int, default=10)
    parser.add_argument("--proj-dim", type=int, default=512)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json")
    return parser.parse_args(arguments)


def main() -> None:
    settings = parse()
    torch.set_num_threads(settings.threads)
    rows = []
    for network in settings.networks:
        found = measure(network, settings)
        print_rows(f"{network}: LDS on digits, M = {settings.checkpoints}", found, "TRAK")
        rows += found
    chosen = {key: value for key, value in vars(settings).items() if key != "json"}
    write_json(settings.json, "digits_baselines", chosen, rows)


if __name__ == "__main__":
    main()
