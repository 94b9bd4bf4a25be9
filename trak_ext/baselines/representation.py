"""The baseline that needs no gradient: training samples that look alike inside the model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .. import _check
from ..gradients import GradientComputer
from ..inputs.batches import batch_size, map_tensors
from ..tasks import Task
from .base import Baseline, Features, State

SIMILARITIES = ("cosine", "dot", "negative_distance")
SIDES = ("input", "output")
_CHUNK = 256  # samples taken through the model at a time


class RepresentationSimilarity(Baseline):
    """Representation similarity: score = 1/M sum_m s(h_mi, h_mz), h from inside the model.

    Hanawa et al. 2021, "Evaluation of Similarity-based Explanations", compares the three
    similarities s: "cosine" h_i . h_z / (|h_i| |h_z|) (0 where one is zero), "dot" h_i . h_z, and
    "negative_distance" -|h_i - h_z|. Labels and the loss have no part in it.

    Args:
        module: Name of the submodule, as in named_modules(), that h is taken from; None for the
            last torch.nn.Linear, in the order of named_modules().
        side: "input" (the first positional argument) or "output" of that module. h is flattened
            and must be of one length for all samples.
        similarity: s.

    All other arguments are those of `Baseline`, chunk_size None for 256; the task runs the model.

    Raises:
        ValueError: a module that there is not, or one that a batch reaches not once.
    """

    def __init__(
        self,
        model: nn.Module,
        task: str | Task,
        *,
        module: str | None = None,
        side: str = "input",
        similarity: str = "cosine",
        **arguments: Any,
    ) -> None:
        super().__init__(model, task, **arguments)
        self.module = _module_name(model, module)
        self._outputs = GradientComputer(model, self.task, lambda _, p: p.is_floating_point())
        self.side = _check.choice("side", side, SIDES)
        self.similarity = _check.choice("similarity", similarity, SIMILARITIES)

    def _features(
        self, weights: State, m: int, batch: Any, context: State, index: Tensor
    ) -> Iterator[Features]:
        seen: list[Tensor] = []

        def hook(_module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            seen.append(_tensor(inputs if self.side == "input" else output, self.module, self.side))

        step = self.chunk_size or _CHUNK
        for start in range(0, batch_size(batch), step):
            chunk, positions = map_tensors(
                lambda t, a=start: t[a : a + step],  # type: ignore[misc]
                (batch, index),
            )
            seen.clear()
            handle = self._model.get_submodule(self.module).register_forward_hook(hook)
            try:
                weight = self._outputs.outputs(weights, chunk, context, positions).weight
            finally:
                handle.remove()
            if len(seen) != 1 or len(seen[0]) != batch_size(chunk):
                shapes = [list(tensor.shape) for tensor in seen]
                raise ValueError(
                    f"module: expected one that sees each batch of {batch_size(chunk)} "
                    f"samples once, got {self.module!r} with {shapes}"
                )
            yield Features(seen[0].flatten(1), weight)

    def _pair(self, m: int, train: Features, targets: Features) -> Tensor:
        left, right = train.rows, targets.rows
        if self.similarity == "negative_distance":
            return -torch.cdist(left, right) / len(self._checkpoints)
        if self.similarity == "cosine":
            left, right = nn.functional.normalize(left), nn.functional.normalize(right)
        return left @ right.T / len(self._checkpoints)


def _module_name(model: nn.Module, name: str | None) -> str:
    named = dict(model.named_modules())
    if name is None:
        linear = [key for key, module in named.items() if isinstance(module, nn.Linear)]
        if not linear:
            raise ValueError(
                "module: expected a name, as the model has no torch.nn.Linear, got None"
            )
        return linear[-1]
    if not isinstance(name, str) or name not in named:
        shown = ", ".join(key for key in list(named)[:6] if key)
        raise ValueError(f"module: expected a name in named_modules() ({shown}, ...), got {name!r}")
    return name


def _tensor(value: Any, module: str, side: str) -> Tensor:
    if isinstance(value, (tuple, list)) and value:
        value = value[0]
    if not isinstance(value, Tensor) or value.dim() < 1:
        raise ValueError(
            f"side: expected a module whose {side} is a tensor, got {_check.describe(value)} for "
            f"{module!r}"
        )
    return value.detach()
