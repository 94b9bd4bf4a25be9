"""Model output functions: what is attributed, and how the loss moves with it.

A task turns a model and a batch into three numbers a sample (Park et al. 2023, section 3):
f, the model output whose gradient is taken; Q = -d loss / df; and R = d^2 loss / df^2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


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
        function: Called with the model (a callable with the checkpoint's weights) and a batch as
            the loader yields it; returns f [B], (f, Q) or (f, Q, R). What is left out is ones. It
            is called under `torch.func.vmap` with batches of one sample.
    """

    name: str
    function: Callable[[Callable[..., Any], Any], Any]
    prepare: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"name: expected a non-empty string, got {self.name!r}")
        if not callable(self.function):
            raise TypeError(
                f"function: expected a callable of (model, batch), got {self.function!r}"
            )

    def __call__(self, model: Callable[..., Any], batch: Any) -> ModelOutput:
        """Return f, Q and R of a batch, each [B]; Q and R carry no gradient."""
        result = self.function(model, batch)
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


def _inputs_and_labels(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any], Tensor]:
    """Return positional and keyword inputs of the model, and the labels, of a batch."""
    if isinstance(batch, Mapping):
        key = next((key for key in ("labels", "label") if key in batch), None)
        if key is None:
            raise ValueError(
                f"batch: expected a mapping with 'labels' (or 'label'), got keys {list(batch)}"
            )
        return (), {name: value for name, value in batch.items() if name != key}, batch[key]
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return (batch[0],), {}, batch[1]
    raise ValueError(
        f"batch: expected (inputs, labels) or a mapping with 'labels', got a {type(batch).__name__}"
        + (f" of {len(batch)}" if isinstance(batch, (tuple, list)) else "")
    )


def _prediction(model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the model's logits or predictions."""
    result = model(*args, **kwargs)
    prediction = result if isinstance(result, Tensor) else getattr(result, "logits", None)
    if not isinstance(prediction, Tensor):
        raise TypeError(
            "model: expected logits as a tensor or as the attribute .logits of its result, got a "
            f"{type(result).__name__}"
        )
    return prediction


def _at_least_fp32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def classification_output(logits: Tensor, labels: Tensor) -> ModelOutput:
    """Return f = log(p/(1-p)), Q = 1-p and R = p(1-p) of the labelled class, p its probability.

    f = logit_y - logsumexp(other logits); the loss is cross-entropy = log(1 + exp(-f)).

    Args:
        logits: [B, C], C >= 2.
        labels: int [B].
    """
    if logits.dim() != 2 or logits.shape[1] < 2:
        raise ValueError(
            f"model: expected logits [B, C] with at least 2 classes, got {list(logits.shape)}"
        )
    if labels.dim() != 1 or labels.dtype.is_floating_point or labels.dtype == torch.bool:
        raise ValueError(
            f"labels: expected integers [B], got {labels.dtype} of shape {list(labels.shape)}"
        )
    logits = _at_least_fp32(logits)
    chosen = torch.arange(logits.shape[1], device=logits.device) == labels[:, None]
    own = torch.where(chosen, logits, 0).sum(1)
    others = torch.where(chosen, float("-inf"), logits).logsumexp(1)
    # A label outside 0..C-1 chooses no class; NaN lets fit name the sample.
    f = torch.where(chosen.any(1), own - others, float("nan"))
    return ModelOutput(f, torch.sigmoid(-f), torch.sigmoid(f) * torch.sigmoid(-f))


def _classification(model: Callable[..., Any], batch: Any) -> ModelOutput:
    args, kwargs, labels = _inputs_and_labels(batch)
    return classification_output(_prediction(model, args, kwargs), labels)


def _regression(model: Callable[..., Any], batch: Any) -> ModelOutput:
    args, kwargs, labels = _inputs_and_labels(batch)
    prediction = _at_least_fp32(_prediction(model, args, kwargs))
    if prediction.numel() != labels.numel():
        raise ValueError(
            f"model: expected one prediction a sample for labels {list(labels.shape)}, "
            f"got shape {list(prediction.shape)}"
        )
    f = prediction.reshape(-1)
    return ModelOutput(f, labels.reshape(-1).to(f.dtype) - f, torch.ones_like(f))


TASKS = {
    "image_classification": Task("image_classification", _classification),
    "text_classification": Task("text_classification", _classification),
    "regression": Task("regression", _regression),  # f = prediction, loss (f - y)^2 / 2
}


def get_task(task: str | Task) -> Task:
    """Return a task by its name, or the task itself."""
    if isinstance(task, Task):
        return task
    if isinstance(task, str) and task in TASKS:
        return TASKS[task]
    raise ValueError(f"task: expected a trak_ext.tasks.Task or one of {list(TASKS)}, got {task!r}")
