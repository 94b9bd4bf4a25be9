"""Baselines from gradients alone: what is left of influence when the Hessian is left out.

The loss's gradient is -Q times that of the output f, so everything here comes from the gradients g
of f and from Q, as TRAK does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import _check
from ..gradients import GradientComputer, ParameterChoice
from ..kernels import operators
from ..kernels.projection import MAX_PROJ_DIM, MAX_SEED, check_nnz, project
from ..tasks import Task
from .base import Baseline, Features, State


class GradientBaseline(Baseline):
    """Keeps each sample's gradient, whole or projected.

    Args:
        params: Which parameters are differentiated, as in `Attributor`.
        proj_dim: None for exact gradients, which take M x n x P numbers; or k features per sample,
            gradients times R / sqrt(k), whose dot product is an unbiased estimate of the
            gradients' with a relative error of about 1 / sqrt(k).
        kind, seed, nnz: Of the projection, as in `trak_ext.project`; checkpoint m has model_id m.

    All other arguments are those of `Baseline`; chunk_size is as in `Attributor`.
    """

    def __init__(
        self,
        model: nn.Module,
        task: str | Task,
        *,
        proj_dim: int | None = None,
        kind: str = "rademacher",
        seed: int = 0,
        nnz: int = 1,
        params: ParameterChoice = None,
        **arguments: Any,
    ) -> None:
        super().__init__(model, task, **arguments)
        if proj_dim is not None:
            proj_dim = _check.integer("proj_dim", proj_dim, 1, MAX_PROJ_DIM)
        self.proj_dim = proj_dim
        self.kind = _check.choice("kind", kind, operators.KINDS)
        self.seed = _check.integer("seed", seed, 0, MAX_SEED)
        self.nnz = check_nnz(nnz, self.kind, 0 if proj_dim is None else proj_dim)
        self._gradients = GradientComputer(model, self.task, params, self.chunk_size)

    def _features(
        self, weights: State, m: int, batch: Any, context: State, index: Tensor
    ) -> Iterator[Features]:
        for chunk in self._gradients(weights, batch, context, index):
            grads = {name: grad.detach() for name, grad in chunk.grads.items()}
            if self.proj_dim is None:
                rows = torch.cat(
                    [grad.reshape(len(grad), -1).float() for grad in grads.values()], 1
                )
            else:
                features = project(
                    grads, self.proj_dim, kind=self.kind, seed=self.seed, model_id=m, nnz=self.nnz
                )
                rows = features / math.sqrt(self.proj_dim)
            yield Features(rows, chunk.weight.detach())


class GradientProduct(GradientBaseline):
    """Gradient product: score = 1/M sum_m Q_mi g_mi . g_mz.

    The first-order change of the target's output f(z) when a gradient step is taken on sample i's
    loss (Charpiat et al. 2019, "Input Similarity from the Neural Network Perspective", with Q from
    the loss): TRAK without the inverse kernel.

    Arguments are those of `GradientBaseline`.
    """

    def _pair(self, m: int, train: Features, targets: Features) -> Tensor:
        products = train.rows @ targets.rows.T
        return products * (train.weight / len(self._checkpoints))[:, None]

    def _self(self, m: int, train: Features) -> Tensor:
        return train.rows.square().sum(1) * train.weight / len(self._checkpoints)


class GradientCosine(GradientBaseline):
    """Gradient cosine: score = 1/M sum_m sign(Q_mi) g_mi . g_mz / (|g_mi| |g_mz|).

    As `GradientProduct`, with large gradients brought down to size: the cosine of the step on
    sample i's loss and the gradient of the target's output (Charpiat et al. 2019). 0 where a
    gradient is zero. With `proj_dim` the norms are those of the projected gradients.

    Arguments are those of `GradientProduct`.
    """

    def _pair(self, m: int, train: Features, targets: Features) -> Tensor:
        cosines = nn.functional.normalize(train.rows) @ nn.functional.normalize(targets.rows).T
        return cosines * (train.weight.sign() / len(self._checkpoints))[:, None]


class TracIn(GradientBaseline):
    """TracIn over checkpoints: score = sum_m eta_m grad loss(z_i) . grad loss(z).

    Pruthi et al. 2020, "Estimating Training Data Influence by Tracing Gradient Descent", section
    3.3 (TracInCP): checkpoints are meant to be of one training run, eta_m the learning rate that
    was used around checkpoint m. It measures how much sample i lowered the target's loss, so that
    the target's own Q comes in: eta_m Q_mi Q_mz g_mi . g_mz.

    Args:
        learning_rates: eta_m, one per checkpoint, finite and at least 0; None for ones.

    All other arguments are those of `GradientProduct`.
    """

    def __init__(
        self,
        model: nn.Module,
        task: str | Task,
        *,
        learning_rates: Sequence[float] | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__(model, task, **arguments)
        if learning_rates is None:
            learning_rates = [1.0] * len(self._checkpoints)
        _check.instance("learning_rates", learning_rates, Sequence, "a list of numbers")
        self.learning_rates = [
            _check.nonnegative(f"learning_rates[{i}]", rate)
            for i, rate in enumerate(learning_rates)
        ]
        if len(self.learning_rates) != len(self._checkpoints):
            raise ValueError(
                f"learning_rates: expected one per checkpoint ({len(self._checkpoints)}), got "
                f"{len(self.learning_rates)}"
            )

    def _pair(self, m: int, train: Features, targets: Features) -> Tensor:
        weights = train.weight[:, None] * targets.weight * self.learning_rates[m]
        return (train.rows @ targets.rows.T) * weights

    def _self(self, m: int, train: Features) -> Tensor:
        return train.rows.square().sum(1) * train.weight.square() * self.learning_rates[m]
