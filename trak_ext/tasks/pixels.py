"""Classes of pixels (segmentation): all of a sample, or one of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .core import (
    IGNORED,
    ModelOutput,
    check_integers,
    inputs_and_labels,
    one_row_each,
    prediction,
    split_position,
)
from .language import token_output, tokens_output


def pixel_classification(model: Callable[..., Any], batch: Any) -> ModelOutput:
    """Return f = sum over pixels of log(p/(1-p)), and the means of 1-p and of p(1-p).

    Logits [B, C, ...] and labels [B, ...]; label -100 is ignored. See `of_many` for Q and R.
    """
    return tokens_output(*_pixel_logits(model, batch))


def pixel(model: Callable[..., Any], batch: Any) -> ModelOutput:
    """Return f = log(p/(1-p)), 1-p and p(1-p) of the pixel `target_position`.

    It counts pixels in the order of labels[b].flatten(); NaN for an ignored one or none at all.
    """
    batch, position = split_position(batch)
    return token_output(*_pixel_logits(model, batch), position)


def pixel_targets(batch: Any) -> tuple[Any, Tensor]:
    """Return a batch with one row for each pixel that is not ignored, for the task `pixel`.

    As `trak_ext.tasks.token_targets` does for tokens.
    """
    labels = inputs_and_labels(batch)[2]
    check_integers(labels, "[B, ...]", labels.dim())
    return one_row_each(batch, (labels != IGNORED).flatten(1))


def _pixel_logits(model: Callable[..., Any], batch: Any) -> tuple[Tensor, Tensor]:
    """Return logits [B, pixels, C] and labels [B, pixels]."""
    args, kwargs, labels = inputs_and_labels(batch)
    logits = prediction(model, args, kwargs)
    check_integers(labels, "[B, ...]", max(labels.dim(), 2))
    if (logits.shape[:1] + logits.shape[2:]) != labels.shape or logits.shape[1] < 2:
        raise ValueError(
            f"model: expected logits [B, C, ...] for labels {list(labels.shape)}, "
            f"got shape {list(logits.shape)}"
        )
    return logits.flatten(2).transpose(1, 2), labels.flatten(1)
