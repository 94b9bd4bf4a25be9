"""What a task is: f, the model output whose gradient is taken, and how the loss moves with it.

A task turns a model and a batch into three numbers per sample (Park et al. 2023, section 3):
f; Q = -d loss / df; and R = d^2 loss / df^2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..inputs.batches import ID_KEY

IGNORED = -100  # the label that cross_entropy of torch and Hugging Face models leave out

_POSITION = "target_position"

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
        function: Called with the model, which holds the checkpoint's weights, and a batch as the
            loader yields it, copies that may be written to. Returns f [B], (f, Q) or (f, Q, R).
            What is left out is ones. It is called under `torch.func.vmap` with batches of one
            sample.
        prepare: None where f depends on the sample alone. Where f needs something of the training
            set as well, a function (model, batches, checkpoint) that returns it as tensors by
            name, the context. It is called once for each checkpoint, without gradients;
            `batches` yields (position of the first sample in the training set, batch).
            `function` is then called as function(model, batch, context, index), index int64 [B]:
            the samples' positions in the training set, -1 for a target that is not in it.
        log_odds: Whether f is log(p/(1-p)) of one label's probability p, Q = 1-p and R = p(1-p):
            then the fit says what damping suits it; see `Attributor`.
        check: None, or a function (model, batch) that raises where the model is not one for this
            task. It is called once for each checkpoint, on the first few samples, without
            gradients and outside of vmap.
        ids_as: What of a batch is taken out of it as sample ids, beside the key "sample_id": keys
            of a mapping, and 2 for the third of a sequence of three.
    """

    name: str
    function: Callable[..., Any]
    prepare: Prepare | None = None
    log_odds: bool = False
    check: Callable[[Any, Any], None] | None = None
    ids_as: tuple[Any, ...] = ()

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


# --- what the built-in tasks share ----------------------------------------------------------------

# A task runs under vmap, where no value can be looked at: a sample that it cannot take gets NaN.
# When one has come out as NaN it is computed once more with this set, outside of vmap.
_naming_faults: ContextVar[bool] = ContextVar("naming_faults", default=False)


@contextmanager
def naming_faults() -> Iterator[None]:
    """Have `nan_where` raise its sentence instead."""
    token = _naming_faults.set(True)
    try:
        yield
    finally:
        _naming_faults.reset(token)


def nan_where(bad: Tensor, values: Tensor, sentence: Callable[[], str]) -> Tensor:
    """Return values with NaN in the places `bad`, or raise what is wrong, see `naming_faults`."""
    if _naming_faults.get() and bool(bad.any()):
        raise ValueError(sentence())
    return torch.where(bad, float("nan"), values)


def examples(values: Tensor, bad: Tensor) -> str:
    """Return the first few different values in the places `bad`, and how many places there are."""
    found = values[bad]
    few = found.unique()[:4].tolist()
    different = ", ".join(str(v) if isinstance(v, int) else f"{v:g}" for v in few)
    return f"{different} ({found.numel()} of {bad.numel()})"


def inputs_and_labels(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any], Tensor]:
    """Return positional and keyword inputs of the model, and the labels, of a batch."""
    if isinstance(batch, Mapping):
        key = next((key for key in ("labels", "label") if key in batch), None)
        if key is None:
            raise ValueError(
                f"batch: expected a mapping with 'labels' (or 'label'), got keys {list(batch)}"
            )
        odd = next((name for name in batch if not isinstance(name, str)), None)
        if odd is not None:
            raise ValueError(
                "batch: expected strings as keys, which are the model's keyword arguments, got "
                f"{odd!r}"
            )
        return (), {name: value for name, value in batch.items() if name != key}, batch[key]
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return (batch[0],), {}, batch[1]
    raise ValueError(
        f"batch: expected (inputs, labels) or a mapping with 'labels', got a {type(batch).__name__}"
        + (f" of {len(batch)}" if isinstance(batch, (tuple, list)) else "")
    )


def has_position(batch: Any) -> bool:
    """Return whether a batch has what `split_position` takes out."""
    if isinstance(batch, Mapping):
        return _POSITION in batch
    return isinstance(batch, (tuple, list)) and len(batch) == 3


def split_position(batch: Any) -> tuple[Any, Tensor]:
    """Return a batch without its `target_position`, and that: int64 [B].

    A mapping has it under that key; (inputs, labels, target_position) as the last.
    """
    if isinstance(batch, Mapping) and _POSITION in batch:
        rest = {name: value for name, value in batch.items() if name != _POSITION}
        return rest, batch[_POSITION].reshape(-1).long()
    if isinstance(batch, (tuple, list)) and len(batch) == 3:
        return tuple(batch[:2]), batch[2].reshape(-1).long()
    raise ValueError(
        f"batch: expected a mapping with {_POSITION!r} or (inputs, labels, {_POSITION}), got "
        + (f"keys {list(batch)}" if isinstance(batch, Mapping) else f"a {type(batch).__name__}")
    )


def one_row_each(batch: Any, counted: Tensor) -> tuple[Any, Tensor]:
    """Return a batch with one row for each counted token or pixel, and the rows' samples.

    Args:
        batch: A mapping with labels and perhaps sample ids, or (inputs, labels).
        counted: bool [B, T], which tokens or pixels count.

    Returns:
        The batch, samples repeated, with `target_position` (mapping) or that as a third entry;
        and int64 [rows], the sample of `batch` that each row repeats.
    """
    sample, position = counted.nonzero(as_tuple=True)
    if isinstance(batch, Mapping):
        repeated = {name: _rows(name, value, sample) for name, value in batch.items()}
        return {**repeated, _POSITION: position}, sample
    return (*(value[sample.to(value.device)] for value in batch), position), sample


def _rows(name: str, value: Any, sample: Tensor) -> Any:
    """Return the rows of a batch's value; ids may be a list."""
    if name == ID_KEY and not isinstance(value, Tensor):
        return [value[i] for i in sample.tolist()]
    return value[sample.to(value.device)]


def prediction(model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the model's logits or predictions, in fp32 at least."""
    result = model(*args, **kwargs)
    found = result if isinstance(result, Tensor) else getattr(result, "logits", None)
    if found is None and isinstance(result, Mapping):
        found = result.get("logits", result.get("out"))  # "out": torchvision's segmentation models
    if not isinstance(found, Tensor):
        raise TypeError(
            "model: expected logits as a tensor or as the attribute .logits of its result, got a "
            f"{type(result).__name__}"
        )
    return at_least_fp32(found)


def at_least_fp32(tensor: Tensor) -> Tensor:
    """Return a tensor whose half precision, if it has it, is widened."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def check_integers(labels: Tensor, shape: str, dims: int) -> None:
    """Refuse labels that are not class numbers of the wanted number of dimensions."""
    if labels.dim() != dims or labels.dtype.is_floating_point or labels.dtype == torch.bool:
        raise ValueError(
            f"labels: expected integers {shape}, got {labels.dtype} of shape {list(labels.shape)}"
        )


def log_odds(logits: Tensor, labels: Tensor) -> Tensor:
    """Return log(p/(1-p)) = logit_y - logsumexp(other logits) of the labelled classes.

    A label that is no class gives NaN, so that `fit` can name the sample.

    Args:
        logits: [..., C], C >= 2.
        labels: int [...].
    """
    labels = labels.long()
    index = labels.clamp(0, logits.shape[-1] - 1)
    own = logits.gather(-1, index[..., None])[..., 0]
    others = logits.scatter(-1, index[..., None], float("-inf")).logsumexp(-1)
    bad = labels != index
    classes = logits.shape[-1]
    return nan_where(
        bad,
        own - others,
        lambda: (
            f"labels: expected classes from 0 to {classes - 1}, as the model gives {classes} "
            f"logits, got {examples(labels, bad)}"
        ),
    )


def of_one(f: Tensor) -> ModelOutput:
    """Return f with Q = 1-p and R = p(1-p), where f = log(p/(1-p)) and the loss is -log p."""
    return ModelOutput(f, torch.sigmoid(-f), torch.sigmoid(f) * torch.sigmoid(-f))


def of_many(f: Tensor, counted: Tensor) -> ModelOutput:
    """Return the sum of the log odds of each sample's tokens, with the means of 1-p and of p(1-p).

    Q as Park et al. 2023 take it for language models. It is -d loss / df for a loss that is the
    mean of -log p and an f that moves all tokens alike, and R is the same for the second
    derivative. NaN where no token counts.

    Args:
        f: [B, T], log(p/(1-p)) of each.
        counted: bool [B, T], which tokens count.
    """
    count = counted.sum(1)
    parts = of_one(f)
    total = torch.where(counted, f, 0).sum(1)
    weight, curvature = (
        torch.where(counted, part, 0).sum(1) / count for part in (parts.weight, parts.curvature)
    )
    f = nan_where(
        count == 0,
        total,
        lambda: (
            f"labels: expected one at least that counts in every sample ({IGNORED} does not), "
            f"got {int((count == 0).sum())} of {len(count)} samples without"
        ),
    )
    return ModelOutput(f, weight, curvature)
