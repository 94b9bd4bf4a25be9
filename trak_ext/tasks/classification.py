"""Classes, one label per sample or several."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .core import (
    IGNORED,
    ModelOutput,
    at_least_fp32,
    check_integers,
    examples,
    inputs_and_labels,
    log_odds,
    nan_where,
    of_many,
    of_one,
    prediction,
)


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
    check_integers(labels, "[B]", 1)
    return of_one(log_odds(at_least_fp32(logits), labels))


def binary_output(logits: Tensor, labels: Tensor) -> ModelOutput:
    """Return f = log(p/(1-p)) = s logit, Q = 1-p and R = p(1-p), p that of the sample's label.

    s is 1 for label 1 and -1 for label 0; the loss is binary cross-entropy = log(1 + exp(-f)).
    A label other than 0 and 1 gives NaN.

    Args:
        logits: [B] or [B, 1].
        labels: 0 or 1, of any dtype, [B] or [B, 1].
    """
    if logits.numel() != logits.shape[0] or labels.numel() != logits.numel():
        raise ValueError(
            f"model: expected one logit per sample for labels {list(labels.shape)}, "
            f"got shape {list(logits.shape)}"
        )
    return of_one(_signed(at_least_fp32(logits).reshape(-1), labels.reshape(-1)))


def multilabel_output(logits: Tensor, labels: Tensor) -> ModelOutput:
    """Return f = sum over labels of log(p/(1-p)) = s logit, with means of 1-p and p(1-p).

    p is the probability of what the label says; s is 1 for label 1 and -1 for label 0. The loss,
    a mean of binary cross-entropies, is no function of f alone, so Q and R follow the choice for
    language models, whose f is a sum as well: see `of_many`. Label -100 is left out; another one
    gives NaN, and so does a sample without labels.

    Args:
        logits: [B, L].
        labels: 0, 1 or -100, of any dtype, [B, L].
    """
    if logits.dim() != 2 or logits.shape != labels.shape:
        raise ValueError(
            f"model: expected logits [B, L] for labels {list(labels.shape)}, "
            f"got shape {list(logits.shape)}"
        )
    return of_many(_signed(at_least_fp32(logits), labels, IGNORED), labels != IGNORED)


def _signed(logits: Tensor, labels: Tensor, ignored: int | None = None) -> Tensor:
    labels = labels.to(logits.dtype)
    signed = torch.where(labels == 1, logits, -logits)
    bad = (labels != 0) & (labels != 1)
    if ignored is not None:
        bad &= labels != ignored
    return nan_where(bad, signed, lambda: f"labels: expected 0 or 1, got {examples(labels, bad)}")


def classification(model: Callable[..., Any], batch: Any) -> ModelOutput:
    """The task of `classification_output`."""
    args, kwargs, labels = inputs_and_labels(batch)
    return classification_output(prediction(model, args, kwargs), labels)


def binary_classification(model: Callable[..., Any], batch: Any) -> ModelOutput:
    """The task of `binary_output`."""
    args, kwargs, labels = inputs_and_labels(batch)
    return binary_output(prediction(model, args, kwargs), labels)


def multilabel_classification(model: Callable[..., Any], batch: Any) -> ModelOutput:
    """The task of `multilabel_output`."""
    args, kwargs, labels = inputs_and_labels(batch)
    return multilabel_output(prediction(model, args, kwargs), labels)
