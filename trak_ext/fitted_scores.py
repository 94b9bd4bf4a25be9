"""Scores of a fitted store's samples, in one pass over its features."""

from __future__ import annotations

import torch
from torch import Tensor

from .estimator import Estimator
from .fitted import FittedFeatures
from .solved_targets import SolvedTargets, TopK, merge_top_k
from .store import SampleId


class FittedScores:
    """What an estimator makes of fitted features.

    Args:
        fitted: The training samples' features, M checkpoints with b projection blocks each.
        estimator: Its options.
    """

    def __init__(self, fitted: FittedFeatures, estimator: Estimator) -> None:
        self._fitted = fitted
        self._estimator = estimator

    @property
    def num_samples(self) -> int:
        """Training samples."""
        return self._fitted.num_samples

    def score(self, solved: Tensor) -> Tensor:
        """Return scores fp32 [n, t] of targets K^-1 phi(z) / (M b), [M b, t, k]."""
        targets = SolvedTargets(solved, torch.float32)
        coefficients = self._coefficients()
        scores = torch.empty((self._fitted.num_samples, solved.shape[1]), dtype=torch.float32)
        for block in self._fitted.samples():
            rows = slice(block.start, block.start + len(block.weight))
            part = None if coefficients is None else coefficients[:, rows]
            scores[rows] = targets.score(block.features, block.weight, part)
        return scores

    def top_k(self, solved: Tensor, k: int, largest: bool) -> TopK:
        """Return the best k of the same scores for each target, with ids if there are any."""
        targets = SolvedTargets(solved, torch.float32)
        coefficients = self._coefficients()
        best = TopK(
            torch.empty((solved.shape[1], 0), dtype=torch.float32),
            torch.empty((solved.shape[1], 0), dtype=torch.int64),
        )
        ids: list[SampleId] = []
        for block in self._fitted.samples():
            rows = slice(block.start, block.start + len(block.weight))
            part = None if coefficients is None else coefficients[:, rows]
            count = min(k, len(block.weight))
            found = targets.top_k(block.features, block.weight, count, largest, part)
            best = merge_top_k(best, TopK(found.values, found.indices + block.start), k, largest)
            ids.extend(block.ids or [])
        if ids and len(ids) == self._fitted.num_samples:
            best.ids = [[ids[i] for i in row] for row in best.indices.tolist()]
        return best

    def self_influence(self) -> Tensor:
        """Return each sample's score for itself: fp32 [n]."""
        fitted = self._fitted
        total = torch.zeros(fitted.num_samples, dtype=torch.float64)
        if fitted.num_samples == 0:
            return total.float()
        num_terms = 0
        for m in range(fitted.num_checkpoints):
            factors = self.factors(m)
            num_terms += len(factors)
            for block in fitted.samples([m]):
                for factor, features in zip(factors, block.features, strict=True):
                    plain, c = self._estimator.leverage_and_coefficients(
                        factor, features, block.curvature[0]
                    )
                    total[block.start : block.start + len(plain)] += plain * c
        weight = torch.cat([block.weight for block in fitted.samples()])
        return (total / num_terms * weight).float()

    def factors(self, m: int) -> list[Tensor]:
        """Return the damped Cholesky factor of each of checkpoint m's blocks: fp64 [k, k]."""
        kernels, implied = self._fitted.kernels(m, self._estimator.curvature)
        return self._estimator.factors(kernels, self._fitted.num_samples, implied)

    def _coefficients(self) -> Tensor | None:
        """Return the leverage correction of every checkpoint, block and sample: fp32 [M b, n]."""
        if not self._estimator.leverage:
            return None
        rows = []
        for m in range(self._fitted.num_checkpoints):
            factors = self.factors(m)
            own = torch.empty((len(factors), self._fitted.num_samples), dtype=torch.float32)
            for block in self._fitted.samples([m]):
                for b, (factor, features) in enumerate(zip(factors, block.features, strict=True)):
                    _, c = self._estimator.leverage_and_coefficients(
                        factor, features, block.curvature[0]
                    )
                    own[b, block.start : block.start + len(c)] = c
            rows.append(own)
        return torch.cat(rows)
