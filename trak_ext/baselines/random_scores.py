"""Scores that know nothing: what any attribution must beat."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import _check
from ..gradients import ParameterChoice
from ..inputs.loaders import batch_size
from ..kernels.projection import MAX_SEED, projection_matrix
from ..tasks import Task
from .base import Baseline, Features, Samples

_FINER = 2.0**-8  # entries of the law are rounded to bf16; a second, smaller one keeps ties rare


class Random(Baseline):
    """Independent normal scores: a function of the seed and both samples' positions alone.

    Args:
        seed: Of the scores, 0 to 2**64 - 1.
        params: As in other methods, and all their other arguments: taken, so that it can stand in
            another's place; the model is never run.
    """

    _runs_task = False

    def __init__(
        self,
        model: nn.Module,
        task: str | Task,
        *,
        seed: int = 0,
        params: ParameterChoice = None,
        **arguments: Any,
    ) -> None:
        super().__init__(model, task, **arguments)
        self.seed = _check.integer("seed", seed, 0, MAX_SEED)

    def _features(
        self,
        weights: dict[str, Tensor],
        m: int,
        batch: Any,
        context: Mapping[str, Tensor],
        index: Tensor,
    ) -> Iterator[Features]:
        ones = torch.ones(batch_size(batch), dtype=torch.float32, device="cpu")
        yield Features(ones[:, None], ones)

    def _samples(self, name: str, loader: Iterable[Any], label: str, *, training: bool) -> Samples:
        # A sample's only feature is its position, in fp64, which holds it exactly.
        samples = super()._samples(name, loader, label, training=training)
        features = []
        for _, weight in samples.features:
            positions = torch.arange(len(weight), dtype=torch.float64, device="cpu")
            features.append(Features(positions[:, None], weight))
        return Samples(features, samples.ids)

    def _pair(self, m: int, train: Features, targets: Features) -> Tensor:
        rows, columns = len(train.rows), len(targets.rows)
        if m > 0 or rows == 0:
            return torch.zeros((rows, columns), dtype=torch.float32, device="cpu")
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
