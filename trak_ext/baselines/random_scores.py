"""Scores that know nothing: what any attribution must beat."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import _check
from ..gradients import ParameterChoice
from ..inputs.batches import batch_size
from ..inputs.checkpoints import Checkpoint
from ..projector import MAX_SEED, projection_matrix
from ..tasks import Task
from .base import Baseline, Features

_FINER = 2.0**-8  # entries of the law are rounded to bf16; a second, smaller one keeps ties rare


class Random(Baseline):
    """Independent normal scores: a function of the seed and both samples' positions alone.

    Args:
        model, task, checkpoints, params, device, chunk_size, progress: Taken, so that it can stand
            in another method's place; the model is never run.
        seed: Of the scores, 0 to 2**64 - 1.
    """

    def __init__(
        self,
        model: nn.Module,
        task: str | Task,
        *,
        checkpoints: Sequence[Checkpoint] | None = None,
        params: ParameterChoice = None,
        seed: int = 0,
        device: str | torch.device | None = None,
        chunk_size: int | None = None,
        progress: bool = True,
    ) -> None:
        super().__init__(
            model,
            task,
            checkpoints=checkpoints,
            device=device,
            chunk_size=chunk_size,
            progress=progress,
        )
        self.seed = _check.integer("seed", seed, 0, MAX_SEED)

    def _features(self, weights: dict[str, Tensor], m: int, batch: Any) -> Iterator[Features]:
        size = batch_size(batch)
        yield Features(torch.zeros((size, 0)), torch.ones(size))

    def _all_features(self, name: str, loader: Any, label: str) -> Iterator[Features]:
        # A sample's only feature is its position.
        for features in super()._all_features(name, loader, label):
            count = len(features.rows)
            yield Features(torch.arange(count, dtype=torch.float64)[:, None], features.weight)

    def _pair(self, m: int, train: Features, targets: Features) -> Tensor:
        rows, columns = len(train.rows), len(targets.rows)
        if m > 0 or rows == 0:
            return torch.zeros((rows, columns))
        coarse, fine = (
            projection_matrix(
                rows,
                columns,
                kind="normal",
                seed=self.seed,
                model_id=model_id,
                param_offset=int(train.rows[0, 0]),
            )
            for model_id in (0, 1)
        )
        return coarse + _FINER * fine
