"""What a case is, and how cases are run on a path."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from .buffers import Memory

GUARD = 3  # columns beside a result, which must stay as they were


class Case(Protocol):
    """A problem and its answer."""

    def reserve(self, inputs: Memory, outputs: Memory) -> None:
        """Take places."""

    def launch(self, kernels: Any, path: str, inputs: Tensor, outputs: Tensor) -> None:
        """Start the work; wait for nothing."""

    def judge(self, outputs: Tensor) -> str | None:
        """Return what is wrong, None for nothing."""


def run_cases(kernels: Any, path: str, cases: Iterable[Case]) -> list[str | None]:
    """Return what is wrong with each case, None for nothing; raises where a launch does."""
    cases = list(cases)
    inputs, outputs = Memory(), Memory()
    for case in cases:
        case.reserve(inputs, outputs)
    with kernels.stream():
        there, back = inputs.build(kernels), outputs.build(kernels)
        for case in cases:
            case.launch(kernels, path, there, back)
        made = kernels.fetch(back)
    return [case.judge(made) for case in cases]


def describe_difference(
    name: str, got: Tensor, expected: Tensor, bound: Tensor | None = None
) -> str | None:
    """Return a clause about the first entry [row, column] that is wrong, None if none is."""
    if bound is None:
        if torch.equal(got, expected):
            return None
        wrong = ~(got == expected)
    else:
        wrong = ~((got - expected).abs() <= bound)
    if not bool(wrong.any()):
        return None
    row, column = divmod(int(wrong.flatten().to(torch.uint8).argmax()), wrong.shape[1])
    return (
        f"{name}: {int(wrong.sum())} of {wrong.numel()} results are wrong, the first at "
        f"[{row}, {column}]: expected {expected[row, column].item()}, got {got[row, column].item()}"
    )
