"""Scores of a fitted store's samples, in one pass over its features."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..estimator.options import Estimator
from ..kernels.score_pass import SolvedTargets, TopK, merge_top_k
from ..kernels.streaming import score_streamed, top_k_streamed
from ..store import SampleId
from .fitted import FittedFeatures


class FittedScores:
    """What an estimator makes of fitted features.

    Args:
        fitted: The training samples' features, M checkpoints with b projection blocks each.
        estimator: Its options.
        device: Where scores are made: the CPU, or a CUDA device that features are streamed to.
            Kernel matrices and their factors, in fp64, are the CPU's.
    """

    def __init__(self, fitted: FittedFeatures, estimator: Estimator, device: torch.device) -> None:
        self._fitted = fitted
        self._estimator = estimator
        self._streamed = device.type == "cuda"
        self._device = device if self._streamed else torch.device("cpu")

    @property
    def num_samples(self) -> int:
        """Training samples."""
        return self._fitted.num_samples

    def score(self, solved: Tensor) -> Tensor:
        """Return scores fp32 [n, t] of targets K^-1 phi(z) / (M b), [M b, t, k]."""
        targets = SolvedTargets(solved.to(self._device), torch.float32)
        coefficients = self._coefficients()
        scores = torch.empty(
            (self._fitted.num_samples, solved.shape[1]), dtype=torch.float32, device="cpu"
        )
        for block in self._fitted.samples():
            rows = slice(block.start, block.start + len(block.weight))
            part = None if coefficients is None else coefficients[:, rows]
            arguments = (block.features, block.weight, part)
            if self._streamed:
                scores[rows] = score_streamed(targets, *arguments)
            else:
                scores[rows] = targets.score(*arguments)
        return scores

    def top_k(self, solved: Tensor, k: int, largest: bool) -> TopK:
        """Return the best k of the same scores for each target, with ids if there are any."""
        targets = SolvedTargets(solved.to(self._device), torch.float32)
        coefficients = self._coefficients()
        best = TopK(
            torch.empty((solved.shape[1], 0), dtype=torch.float32, device="cpu"),
            torch.empty((solved.shape[1], 0), dtype=torch.int64, device="cpu"),
        )
        ids: list[SampleId] = []
        for block in self._fitted.samples():
            rows = slice(block.start, block.start + len(block.weight))
            part = None if coefficients is None else coefficients[:, rows]
            count = min(k, len(block.weight))
            arguments = (block.features, block.weight, count, largest, part)
            if self._streamed:
                found = top_k_streamed(targets, *arguments)
            else:
                found = targets.top_k(*arguments)
            found = TopK(found.values.cpu(), found.indices.cpu() + block.start)
            best = merge_top_k(best, found, k, largest)
            ids.extend(block.ids or [])
        if ids and len(ids) == self._fitted.num_samples:
            best.ids = [[ids[i] for i in row] for row in best.indices.tolist()]
        return best

    def self_influence(self) -> Tensor:
        """Return each sample's score for itself: fp32 [n]."""
        fitted = self._fitted
        total = torch.zeros(fitted.num_samples, dtype=torch.float64, device="cpu")
        if fitted.num_samples == 0:
            return total.float()
        for m in range(fitted.num_checkpoints):
            for _, rows, plain, c in self._leverages(m):
                total[rows] += plain * c
        num_terms = fitted.num_checkpoints * fitted.blocks
        return (total / num_terms * fitted.weight()).float()

    def factors(self, m: int) -> list[Tensor]:
        """Return the damped Cholesky factor of each of checkpoint m's blocks: fp64 [k, k]."""
        kernels = self._fitted.kernels(m, self._estimator.curvature)
        implied = self._fitted.implied()
        return self._estimator.factors(kernels, self._fitted.num_samples, implied)

    def _coefficients(self) -> Tensor | None:
        """Return the leverage correction of every checkpoint, block and sample: fp32 [M b, n]."""
        if not self._estimator.leverage:
            return None
        fitted = self._fitted
        shape = (fitted.num_checkpoints * fitted.blocks, fitted.num_samples)
        coefficients = torch.empty(shape, dtype=torch.float32, device="cpu")
        for m in range(fitted.num_checkpoints):
            for b, rows, _, c in self._leverages(m):
                coefficients[m * fitted.blocks + b, rows] = c.float()
        return coefficients

    def _leverages(self, m: int) -> Iterator[tuple[int, slice, Tensor, Tensor]]:
        """Yield block b, rows, and phi_i^T K^-1 phi_i and c_i of them for checkpoint m."""
        curvature = self._fitted.curvature(m, self._estimator.curvature)
        factors = self.factors(m)
        for block in self._fitted.samples([m]):
            rows = slice(block.start, block.start + len(block.weight))
            own = None if curvature is None else curvature[rows]
            for b, (factor, features) in enumerate(zip(factors, block.features, strict=True)):
                yield (
                    b,
                    rows,
                    *self._estimator.leverage_and_coefficients(factor, features, own, block.start),
                )
