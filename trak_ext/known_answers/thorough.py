"""The long form of the self-test: cases of every kernel in more shapes, dtypes and layouts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..kernels import operators
from .cases import Case
from .projections import (
    FIRST_PARAM,
    FP32_VALUES,
    LAYOUTS,
    MatrixCase,
    ProjectionCase,
    projection_cases,
    tiles_of,
)
from .quick import CASES as QUICK
from .scores import ScoringCase, scoring_cases, wide_scoring_cases
from .sparse import thorough_sparse_cases

# What a tensor of each dtype holds to be exact, whatever the precision; fp32 goes by it.
HALVES = {torch.float64: "one part", torch.float16: "fp16", torch.bfloat16: "one part"}


def thorough_projection_cases(kernels: Any, path: str) -> list[ProjectionCase]:
    """Return, of each tile, its least and most rows and more, in each layout and dtype."""
    cases = projection_cases(kernels, path)
    precisions = {passes: name for name, passes in operators.PRECISIONS.items()}
    before: tuple[Any, ...] = ()
    for tile in tiles_of(kernels, path):
        kind, precision = tile["kind"], precisions[tile["passes"]]
        least = before[2] + 1 if before[:2] == (kind, precision) else 1
        most, columns = tile["tile_rows"], tile["tile_columns"]
        shapes = [(least, 1), (most, 7), (max(least, most - 2), columns), (most, 64)]
        for i, (layout, (rows, proj_dim)) in enumerate(zip(LAYOUTS, shapes, strict=True)):
            tensors = [(FP32_VALUES[precision], torch.float32)]
            tensors += [(values, dtype) for dtype, values in HALVES.items()]
            for values, dtype in tensors:
                case = ProjectionCase(kind, precision, rows, proj_dim, [(values, dtype, layout)])
                case.least_workspace, case.transposed = i > 1, i % 2 == 1
                cases.append(case)
        before = (kind, precision, most)
        # Several tiles of rows and columns in one launch.
        grads = [(FP32_VALUES[precision], torch.float32, "aligned in the matrix")]
        cases.append(ProjectionCase(kind, precision, 193, columns + 90, grads))
    return cases


def thorough_matrix_cases(kernels: Any, path: str) -> list[MatrixCase]:
    """Return rows from several places on, one row and one column among them."""
    shapes = [(0, 300, 70), (77, 1, 600), (2**32 * 128 - 3, 257, 1), (2**62, 130, 33)]
    return [
        MatrixCase(kind, *shape)
        for kind in ("rademacher", "normal")
        for shape in [*shapes, (FIRST_PARAM, 301, 277)]
    ]


def thorough_scoring_cases(kernels: Any, path: str) -> list[ScoringCase]:
    """Return every dtype and precision with several numbers of samples, targets and features."""
    cases = scoring_cases(kernels, path)
    for dtype in kernels.feature_dtypes:
        cases += shapes_of(dtype, list(operators.PRECISIONS))
    return cases


def thorough_wide_scoring_cases(kernels: Any, path: str) -> list[ScoringCase]:
    """Return the same in fp64."""
    return wide_scoring_cases(kernels, path) + shapes_of(torch.float64, ["highest"])


def shapes_of(dtype: torch.dtype, precisions: list[str]) -> list[ScoringCase]:
    """Return scores and lists of the best in shapes around the tiles' borders."""
    cases = []
    for precision in precisions:
        for samples, targets, proj_dim in ((1, 1, 1), (128, 16, 64), (129, 17, 65), (400, 64, 16)):
            shape = (dtype, precision, samples, targets)
            cases.append(ScoringCase(*shape, aligned=proj_dim % 2 == 0, proj_dim=proj_dim))
            cases.append(ScoringCase(*shape, scaled=False, least_workspace=True, proj_dim=proj_dim))
        for samples, count in ((1, 1), (600, 255), (600, 600), (1333, 1024)):
            cases.append(ScoringCase(dtype, precision, samples, 3, count=count, proj_dim=20))
    return cases


# As quick.CASES; a family that stands only there has its quick cases alone.
CASES: dict[str, Callable[[Any, str], Sequence[Case]]] = {
    **QUICK,
    "projection": thorough_projection_cases,
    "projection matrix": thorough_matrix_cases,
    "sparse projection": thorough_sparse_cases,
    "scoring": thorough_scoring_cases,
    "scoring in fp64": thorough_wide_scoring_cases,
}
