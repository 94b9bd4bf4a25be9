"""What a task is: f, the model output whose gradient is taken, and how the loss moves with it.

A task turns a model and a batch into three numbers a sample (Park et al. 2023, section 3):
f; Q = -d loss / df; and R = d^2 loss / df^2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

Batches = Iterable[tuple[int, Any]]
Prepare = Callable[[Callable[..., Any], Batches, int], Mapping[str, Tensor]]


class ModelOutput(NamedTuple):
    """What a task gives for a batch of B samples; each field [B]."""

    output: Tensor  # f
    weight: Tensor  # Q
    curvature: Tensor  # R


@dataclass(frozen=True)
class Task:
    """A model output function with a name.

    Args:
        name: Told apart by a store: another function is another name.
        function: Called with the model (a callable with the checkpoint's weights, a
            `trak_ext.gradients.functional.FunctionalModel`) and a batch as the loader yields it.
            Returns f [B], (f, Q) or (f, Q, R). What is left out is ones. It is called under
            `torch.func.vmap` with batches of one sample.
        prepare: None where f depends on the sample alone. Where f needs something of the training
            set as well, a function (model, batches, checkpoint) that returns it as tensors by
            name, the context. It is called once for each checkpoint, without gradients;
            `batches` yields (position of the first sample in the training set, batch).
            `function` is then called as function(model, batch, context, index), index int64 [B]:
            the samples' positions in the training set, -1 for a target that is not in it.
        log_odds: Whether f is log(p/(1-p)) of one label's probability p, Q = 1-p and R = p(1-p):
            then the fit says what damping suits it; see `Attributor`.
    """

    name: str
    function: Callable[..., Any]
    prepare: Prepare | None = None
    log_odds: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"name: expected a non-empty string, got {self.name!r}")
        if not callable(self.function):
            raise TypeError(
                f"function: expected a callable of (model, batch), got {self.function!r}"
            )
        if self.prepare is not None and not callable(self.prepare):
            raise TypeError(
                "prepare: expected None or a callable of (model, batches, checkpoint), "
                f"got {self.prepare!r}"
            )

    def __call__(
        self,
        model: Callable[..., Any],
        batch: Any,
        context: Mapping[str, Tensor] | None = None,
        index: Tensor | None = None,
    ) -> ModelOutput:
        """Return f, Q and R of a batch, each [B]; Q and R carry no gradient."""
        if self.prepare is None:
            result = self.function(model, batch)
        elif not context or index is None:
            raise ValueError(
                f"task {self.name!r}: expected the context that its prepare() makes and the "
                "samples' positions, got none"
            )
        else:
            result = self.function(model, batch, context, index)
        parts = tuple(result) if isinstance(result, tuple) else (result,)
        if not 1 <= len(parts) <= 3 or not all(isinstance(part, Tensor) for part in parts):
            raise TypeError(
                f"task {self.name!r}: expected f, (f, Q) or (f, Q, R) as tensors, "
                f"got {[type(part).__name__ for part in parts]}"
            )
        output = parts[0].reshape(-1)
        ones = torch.ones_like(output)
        weight = parts[1].reshape(-1) if len(parts) > 1 else ones
        curvature = parts[2].reshape(-1) if len(parts) > 2 else ones
        if not output.shape == weight.shape == curvature.shape:
            raise ValueError(
                f"task {self.name!r}: expected f, Q and R of one length, got shapes "
                f"{[list(part.shape) for part in (output, weight, curvature)]}"
            )
        return ModelOutput(output, weight.detach(), curvature.detach())
