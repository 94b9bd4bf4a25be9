"""Settings in which attribution quality is measured: data, networks, checkpoints and the truth."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

import docstrings
import minilm
from trak_ext import project
from trak_ext.demo import digits
from trak_ext.gradients import GradientComputer
from trak_ext.tasks import get_task

Data = tuple[Tensor, Tensor, Tensor, Tensor]  # training inputs and labels, targets' the same
NUM_HIDDEN_TEXT = 32
TEXT_SCALE = 8.0  # of unit embeddings, so that a head trains at the rate of the other settings


class Setting(NamedTuple):
    """A network and how it is trained on what."""

    name: str
    load: Callable[[int], Data]  # of a split's seed
    factory: Callable[[], nn.Module]
    recipe: dict[str, float]  # what train_models is called with beside its defaults


class Projection(NamedTuple):
    """What gradients are projected by, as in `trak_ext.project`."""

    proj_dim: int
    kind: str = "rademacher"
    nnz: int = 1
    precision: str = "high"


class Trained(NamedTuple):
    """Checkpoints, and what networks retrained on m subsets say."""

    setting: Setting
    split: int
    data: Data
    states: dict[bool, list[dict[str, Tensor]]]  # of all data (False), of a half each (True)
    masks: Tensor  # [m, n]
    outputs: Tensor  # [m, t]


class Measured(NamedTuple):
    """Features of M checkpoints, and what retraining on m subsets says."""

    train: Tensor  # [M, n, k]
    targets: Tensor  # [M, t, k]
    q: Tensor  # [M, n]
    f: Tensor  # [M, n]
    r: Tensor  # [M, n]
    masks: Tensor  # [m, n]
    outputs: Tensor  # [m, t]


def load_digits(seed: int) -> Data:
    return tuple(digits.load_digits_split(seed=seed)[:4])  # type: ignore[return-value]


def load_text(seed: int, num_train: int = 1000, num_test: int = 250) -> Data:
    """First sentences of docstrings as MiniLM's mean token embeddings, labelled by package."""
    split = docstrings.load_docstrings_split(num_train, num_test, seed=seed)
    bert, tokenizer = minilm.load_bert()
    sides = []
    for texts, labels in (
        (split.train_texts, split.train_labels),
        (split.test_texts, split.test_labels),
    ):
        encoded = minilm.encode_texts(bert, tokenizer, texts, labels, num_layers=0)
        mask = encoded.attention_mask[:, :, None].to(encoded.hidden.dtype)
        mean = (encoded.hidden * mask).sum(1) / mask.sum(1)
        sides.append((nn.functional.normalize(mean, dim=1) * TEXT_SCALE, encoded.labels))
    (inputs, labels), (test_inputs, test_labels) = sides
    centre = inputs.mean(0)
    return inputs - centre, labels, test_inputs - centre, test_labels


def make_text_head() -> nn.Module:
    num_classes = len(docstrings.PACKAGES)
    return nn.Sequential(
        nn.Linear(384, NUM_HIDDEN_TEXT), nn.ReLU(), nn.Linear(NUM_HIDDEN_TEXT, num_classes)
    )


def make_softmax() -> nn.Module:
    """Softmax regression 64-10: a convex problem, where attribution theory holds best."""
    return nn.Sequential(nn.Linear(64, 10))


def make_mlp3() -> nn.Module:
    """A multilayer perceptron 64-64-64-64-10 with ReLUs."""
    return nn.Sequential(
        nn.Linear(64, 64),
        nn.ReLU(),
        nn.Linear(64, 64),
        nn.ReLU(),
        nn.Linear(64, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def make_cnn() -> nn.Module:
    """Two convolutions (8 and 16 channels, 3 x 3, the second with stride 2) and a linear layer."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 2 * 2, 10),
    )


SETTINGS = {
    setting.name: setting
    for setting in (
        Setting("softmax", load_digits, make_softmax, {}),
        Setting("mlp", load_digits, digits.make_model, {}),
        Setting("mlp3", load_digits, make_mlp3, {}),
        Setting("cnn", load_digits, make_cnn, {}),
        Setting("text", load_text, make_text_head, {"lr": 0.3}),
    )
}


def parse_arguments(
    description: str, splits: Sequence[int], *, quick: list[str]
) -> argparse.Namespace:
    """Return settings, splits, resamples and json; --quick takes a few settings and one split."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--splits", nargs="+", type=int, default=list(splits))
    parser.add_argument("--resamples", type=int, default=200)
    parser.add_argument("--quick", action="store_true", help=f"{' and '.join(quick)}, one split")
    parser.add_argument("--json", help="where to write the rows")
    args = parser.parse_args()
    if args.quick:
        args.settings, args.splits = quick, args.splits[:1]
    return args


def train(
    setting: Setting,
    *,
    split: int,
    halves: tuple[bool, ...] = (False, True),
    num_checkpoints: int = 10,
    num_subsets: int = 50,
    models_a_subset: int = 5,
) -> Trained:
    """Train checkpoints on all data, on random halves, and the networks of the truth.

    The halves that checkpoints are trained on are drawn apart from those of the truth.
    """
    data = setting.load(split)
    inputs, labels = data[:2]
    num_train = len(labels)
    first = split * 10_000
    masks = digits.subset_masks(num_subsets, num_train, seed=split)
    outputs = digits.outputs_after_retraining(
        data, masks, models_a_subset, first + 1_000,
        model_factory=setting.factory, **setting.recipe,
    )  # fmt: skip
    states = {}
    for half in halves:
        subsets, seed = torch.arange(num_train).expand(num_checkpoints, -1), first
        if half:
            chosen = digits.subset_masks(num_checkpoints, num_train, seed=split + 777)
            subsets, seed = chosen.nonzero()[:, 1].view(num_checkpoints, -1), first + 500
        states[half] = list(
            digits.unstack_states(
                digits.train_models(
                    inputs, labels, subsets, range(seed, seed + num_checkpoints),
                    model_factory=setting.factory, **setting.recipe,
                )
            )
        )  # fmt: skip
    return Trained(setting, split, data, states, masks, outputs)


def features(trained: Trained, half: bool, projections: list[Projection]) -> list[Measured]:
    """Return features by each projection of the same gradients."""
    computer = GradientComputer(trained.setting.factory(), get_task("image_classification"))
    inputs, labels, test_inputs, test_labels = trained.data
    sides: list[list[list[Tensor]]] = [[[], []] for _ in projections]
    figures: list[list[Tensor]] = [[], [], []]
    for m, state in enumerate(trained.states[half]):
        for side, batch in enumerate(((inputs, labels), (test_inputs, test_labels))):
            chunks = list(computer(state, batch))
            for found, projection in zip(sides, projections, strict=True):
                how = projection._asdict()
                parts = [project(c.grads, seed=trained.split, model_id=m, **how) for c in chunks]
                found[side].append(torch.cat(parts))
            if side == 0:
                for column, name in zip(figures, ("weight", "output", "curvature"), strict=True):
                    column.append(torch.cat([getattr(c, name) for c in chunks]))
    stacked = [torch.stack(column) for column in figures]
    return [
        Measured(torch.stack(train), torch.stack(targets), *stacked, trained.masks, trained.outputs)
        for train, targets in sides
    ]


def measure(
    setting: Setting,
    *,
    split: int,
    halves: tuple[bool, ...] = (False, True),
    proj_dim: int = 512,
    **options: int,
) -> dict[bool, Measured]:
    """Train everything; return features of checkpoints trained on all data and on random halves.

    Options are those of `train`.
    """
    trained = train(setting, split=split, halves=halves, **options)
    return {half: features(trained, half, [Projection(proj_dim)])[0] for half in halves}
