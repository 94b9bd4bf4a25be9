"""The quick form of the self-test: what a path computes before a device first uses it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from .cases import Case, run_cases
from .projections import matrix_cases, projection_cases
from .scores import scoring_cases, wide_scoring_cases
from .sparse import sparse_cases

# By family (cuda_paths.FAMILIES), the cases for (kernels, path). A kind of matrix with a kernel of
# its own is a line here.
CASES: dict[str, Callable[[Any, str], Sequence[Case]]] = {
    "projection": projection_cases,
    "projection matrix": matrix_cases,
    "sparse projection": sparse_cases,
    "scoring": scoring_cases,
    "scoring in fp64": wide_scoring_cases,
}


def check_quickly(kernels: Any, family: str, path: str) -> str | None:
    """Run a family's quick cases on one path; return what is wrong in one clause, or None."""
    try:
        problems = run_cases(kernels, path, CASES[family](kernels, path))
    except torch.cuda.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return next(filter(None, problems), None)
