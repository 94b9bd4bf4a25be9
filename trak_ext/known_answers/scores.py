"""Scores, and the best of them, with known answers."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels import operators
from .buffers import CPU, Memory, Slot, integers
from .cases import GUARD, describe_difference

SCORED_FEATURES = 83  # of a sample: tails of 16 and of 4
CHECKPOINTS = 2
SAMPLES, TARGETS = 133, 71  # that are drawn: others are the first of them, or these again


class _ScoringValues(NamedTuple):
    features: Tensor  # [M, 133, k]
    targets: Tensor  # [M, 71, k]
    products: Tensor  # their inner products, [M, 133, 71]


@functools.cache
def scoring_values(largest: tuple[int, int], three_parts: tuple[bool, bool]) -> _ScoringValues:
    """Return integers up to the largest feature and target, and some for three parts of either.

    A large number meets a small one, so that sums stay below 2^24.
    """
    shape = (CHECKPOINTS, SAMPLES + TARGETS, SCORED_FEATURES)
    drawn = integers(6, shape, 3)
    features, targets = drawn[:, :SAMPLES].clone(), drawn[:, SAMPLES:].clone()
    large = integers(7, shape, largest[0])
    features[..., ::2] = large[:, :SAMPLES, ::2]
    large = integers(8, shape, largest[1])
    targets[..., 1::2] = large[:, SAMPLES:, 1::2]
    medium = integers(9, shape, 127)
    features[..., 4::5], targets[..., 4::5] = medium[:, :SAMPLES, 4::5], medium[:, SAMPLES:, 4::5]
    for many, few, columns, is_wanted in (
        (features, targets, [0, 40], three_parts[0]),
        (targets, features, [1, 41], three_parts[1]),
    ):
        if is_wanted:
            many[..., columns] = integers(10, (*many.shape[:2], 2), 2**17)
            few[..., columns] = integers(11, (*few.shape[:2], 2), 1)
    return _ScoringValues(features, targets, (features.double() @ targets.double().mT).float())


@functools.cache
def scoring_scales(samples: int) -> tuple[Tensor, Tensor]:
    """Return weights [n] and coefficients [M, n]: powers of two, the weights of either sign."""
    drawn = integers(12, (4, samples), 2)
    weights = 2.0 ** drawn[0] * (1 - 2 * (drawn[1] > 0).to(torch.float32))
    return weights, 2.0 ** (drawn[2:] > 0).to(torch.float32)


@dataclass
class ScoringCase:
    """Scores [n, t] of two checkpoints, or the best `count` of them for each target."""

    dtype: torch.dtype
    precision: str
    samples: int
    targets: int
    count: int = 0  # 0: all scores
    aligned: bool = True
    scaled: bool = True  # by coefficients
    least_workspace: bool = False
    proj_dim: int = SCORED_FEATURES
    _inputs: list[Slot] = field(default_factory=list)
    _outputs: list[Slot] = field(default_factory=list)

    @property
    def compute(self) -> torch.dtype:
        """Of the scores."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def _values(self) -> _ScoringValues:
        if self.precision == "medium":
            return scoring_values((127, 127), (False, False))
        feature = {torch.bfloat16: 127, torch.float16: 2**11 - 1}.get(self.dtype, 2**12 - 1)
        is_highest = self.precision == "highest"
        return scoring_values(
            (feature, 2**12 - 1), (is_highest and self.dtype.itemsize > 2, is_highest)
        )

    def _rows(self) -> Tensor:
        """Return which of the drawn samples each one is, [n]: again and again, for ties."""
        return torch.arange(self.samples, device=CPU) % SAMPLES

    def reserve(self, inputs: Memory, outputs: Memory) -> None:
        """Take places."""
        values, rows = self._values(), self._rows()
        pitch = 96 if self.aligned else 2 * SCORED_FEATURES + 1
        start = 0 if self.aligned else self.dtype.itemsize
        shape = (self.samples, self.proj_dim)
        self._inputs = [
            inputs.shared(
                (id(values.features), m, self.dtype, shape, pitch),
                functools.partial(
                    inputs.place,
                    shape,
                    self.dtype,
                    values.features[m, rows, : self.proj_dim],
                    (pitch, 1),
                    start,
                ),
            )
            for m in range(CHECKPOINTS)
        ]
        solved = values.targets[:, : self.targets, : self.proj_dim]
        for tensor in (solved, *scoring_scales(self.samples)):
            self._inputs.append(inputs.place(tuple(tensor.shape), self.compute, tensor))
        if self.count == 0:
            self._outputs = [
                outputs.place((self.samples, self.targets + GUARD), self.compute, 32.0)
            ]
        else:
            shape = (self.targets, self.count)
            self._outputs = [
                outputs.place(shape, self.compute, math.nan),
                outputs.place(shape, torch.int64, -1.0),
                outputs.place((1,), torch.int32, 0.0),
            ]

    def launch(self, kernels: Any, path: str, inputs: Tensor, outputs: Tensor) -> None:
        """Start the scores."""
        *features, solved, weights, coefficients = (slot.view(inputs) for slot in self._inputs)
        given = (features, solved, weights, coefficients if self.scaled else None, self.precision)
        out = [slot.view(outputs) for slot in self._outputs]
        if self.count == 0:
            kernels.score(path, *given, out[0][:, : self.targets], self.least_workspace)
        else:
            kernels.top_k(path, *given, tuple(out), self.least_workspace)

    def judge(self, outputs: Tensor) -> str | None:
        """Compare with fp64."""
        values = self._values()
        products = values.products[:, :, : self.targets]
        if self.proj_dim != SCORED_FEATURES:
            features, targets = (phi[..., : self.proj_dim].double() for phi in values[:2])
            products = (features @ targets[:, : self.targets].mT).float()
        if self.samples != SAMPLES:
            products = products[:, self._rows()]
        weights, coefficients = scoring_scales(self.samples)
        if self.scaled:
            products = products * coefficients[..., None]
        scores = products.sum(0) * weights[:, None]
        got = [slot.view(outputs) for slot in self._outputs]
        if self.count == 0:
            expected = torch.full(got[0].shape, 32.0, dtype=self.compute, device=CPU)
            expected[:, : self.targets] = scores
            return describe_difference(str(self), got[0], expected)
        best, indices = (found[:, : self.count] for found in best_first(scores))
        if bool(got[2]):
            return f"{self}: NaN is said to be among the scores, and is not"
        return describe_difference(
            f"{self}: values", got[0], best.to(self.compute)
        ) or describe_difference(f"{self}: indices", got[1], indices)

    def __str__(self) -> str:
        what = f"the best {self.count} of" if self.count else "all"
        return (
            f"{what} {self.samples} scores of {str(self.dtype)[6:]} features in {self.precision} "
            f"for {self.targets} targets, {self.proj_dim} features each"
        )


def best_first(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return every target's scores and samples, [t, n], ties by lower index."""
    found = scores.T.sort(dim=1, descending=True, stable=True)
    return found.values, found.indices


def scoring_cases(kernels: Any, path: str) -> list[ScoringCase]:
    """Return the quick cases: each dtype, precision and tile, and two lists of the best."""
    precisions = ["highest"] if path == "plain" else list(operators.PRECISIONS)
    cases: list[ScoringCase] = []
    for dtype in kernels.feature_dtypes:
        for precision in precisions:
            for targets in (11, 71):
                i = len(cases)
                cases.append(
                    ScoringCase(
                        *(dtype, precision, 133, targets),
                        aligned=i % 2 == 0,
                        scaled=i % 3 != 0,
                        least_workspace=i % 4 == 3,
                    )
                )
    return [*cases, *top_k_cases(kernels.feature_dtypes[0])]


def wide_scoring_cases(kernels: Any, path: str) -> list[ScoringCase]:
    """Return the quick cases in fp64."""
    wide = torch.float64
    return [ScoringCase(wide, "highest", 133, 71, aligned=False), *top_k_cases(wide)]


def top_k_cases(dtype: torch.dtype) -> list[ScoringCase]:
    """Return lists of the best: of groups in ample workspace, of slabs in the least."""
    return [
        ScoringCase(dtype, "highest", 1333, 5, count=7),
        ScoringCase(dtype, "high", 1333, 5, count=300, least_workspace=True),
    ]
