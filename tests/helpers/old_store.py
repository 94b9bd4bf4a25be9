"""What the store in tests/vectors/store_0_1_0 was fitted on: the same numbers on every machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trak_ext import Attributor

NUM_TRAIN, NUM_ADDED, NUM_TARGETS = 12, 5, 3
# Whatever may be asked of one store.
ESTIMATORS: dict[str, dict[str, Any]] = {
    "auto": {},
    "damping": {"damping": 0.5, "ridge": 0.25},
    "own curvature": {"curvature": "own", "leverage": True},
    "no curvature": {"curvature": None, "damping": 1.0},
}


def numbers(*shape: int, step: int) -> Tensor:
    """Return eighths from -9/8 to 9/8, which are exact in fp32, in an order that looks random."""
    return ((torch.arange(torch.Size(shape).numel()) * step % 19) - 9).float().view(shape) / 8


def state(step: int) -> dict[str, Tensor]:
    return {
        "0.weight": numbers(5, 4, step=step),
        "0.bias": numbers(5, step=step + 1),
        "2.weight": numbers(3, 5, step=step + 2),
        "2.bias": numbers(3, step=step + 3),
    }


def samples(start: int, count: int) -> list[tuple[Tensor, Tensor]]:
    """Return samples by their position, in batches of 5."""
    inputs = numbers(start + count, 4, step=7)[start:]
    labels = torch.arange(start, start + count) * 5 % 3
    return list(zip(inputs.split(5), labels.split(5), strict=True))


def attributor(store: Path | None, **estimator: Any) -> Attributor:
    return Attributor(
        nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)),
        "image_classification",
        checkpoints=[state(3), state(11)],
        proj_dim=6,
        blocks=2,
        kind="rademacher",  # the usual one then
        seed=2**40 + 1,
        store=store,
        device="cpu",
        progress=False,
        **estimator,
    )


def train() -> list[tuple[Tensor, Tensor]]:
    return samples(0, NUM_TRAIN)


def added() -> list[tuple[Tensor, Tensor]]:
    return samples(NUM_TRAIN, NUM_ADDED)


def targets() -> list[tuple[Tensor, Tensor]]:
    return samples(NUM_TRAIN + NUM_ADDED, NUM_TARGETS)
