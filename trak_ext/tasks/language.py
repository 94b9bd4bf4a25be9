"""Language models: all target tokens of a sample, or one of them.

f = sum over tokens of log(p/(1-p)), p the probability of the right token; label -100 is ignored.
Labels are class numbers [B, T] as Hugging Face models take them. They are not given to the model,
which would compute a loss that nobody reads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .core import (
    IGNORED,
    ModelOutput,
    check_integers,
    inputs_and_labels,
    log_odds,
    of_many,
    of_one,
    one_row_each,
    prediction,
    split_position,
)


def causal_lm(model: Callable[..., Any], batch: Any) -> ModelOutput:
    """Return f = sum_t log(p_t/(1-p_t)), and the means of 1-p_t and of p_t(1-p_t).

    Token t of `labels` is predicted by the logits at t-1, so labels[:, 0] never counts. A sample
    without a token that counts gives NaN.
    """
    logits, labels = _causal_logits(model, batch)
    return tokens_output(logits[:, :-1], labels[:, 1:])


def causal_lm_token(model: Callable[..., Any], batch: Any) -> ModelOutput:
    """Return f = log(p/(1-p)), 1-p and p(1-p) of the token labels[b, target_position[b]].

    NaN where that label is ignored and where target_position is below 1 or past the end.
    """
    batch, position = split_position(batch)
    logits, labels = _causal_logits(model, batch)
    return token_output(logits[:, :-1], labels[:, 1:], position - 1)


def seq2seq_lm(model: Callable[..., Any], batch: Any) -> ModelOutput:
    """As `causal_lm`, token t of `labels` being predicted by the decoder's logits at t.

    The decoder's input is `decoder_input_ids` of the batch or, where it has none, what the model's
    prepare_decoder_input_ids_from_labels makes of the labels.
    """
    return tokens_output(*_decoder_logits(model, batch))


def seq2seq_lm_token(model: Callable[..., Any], batch: Any) -> ModelOutput:
    """As `causal_lm_token`, target_position starting at 0."""
    batch, position = split_position(batch)
    return token_output(*_decoder_logits(model, batch), position)


def tokens_output(logits: Tensor, labels: Tensor) -> ModelOutput:
    """Return f, Q and R of logits [B, T, V] and the labels [B, T] that they predict."""
    counted = labels != IGNORED
    return of_many(log_odds(logits, torch.where(counted, labels, 0)), counted)


def token_output(logits: Tensor, labels: Tensor, position: Tensor) -> ModelOutput:
    """Return f, Q and R of the tokens at `position` [B] of logits [B, T, V] and labels [B, T]."""
    index = position.clamp(0, labels.shape[1] - 1)
    own = logits.gather(1, index[:, None, None].expand(-1, 1, logits.shape[2]))[:, 0]
    f = log_odds(own, labels.gather(1, index[:, None])[:, 0])
    return of_one(torch.where(position == index, f, float("nan")))


def token_targets(batch: Any, *, causal: bool) -> tuple[Any, Tensor]:
    """Return a batch with one row for each target token, for `causal_lm_token` and its sister.

    Args:
        batch: A mapping with labels [B, T], or (inputs, labels).
        causal: Whether it is for a causal model, for which labels[:, 0] is no target.

    Returns:
        The batch, each sample repeated for each of its tokens, with `target_position` int64
        [rows]; and int64 [rows], the sample of `batch` that each row repeats.
    """
    labels = inputs_and_labels(batch)[2]
    check_integers(labels, "[B, T]", 2)
    counted = labels != IGNORED
    if causal:
        counted[:, 0] = False
    return one_row_each(batch, counted)


def _causal_logits(model: Callable[..., Any], batch: Any) -> tuple[Tensor, Tensor]:
    args, kwargs, labels = inputs_and_labels(batch)
    return _checked(prediction(model, args, kwargs), labels)


def _decoder_logits(model: Callable[..., Any], batch: Any) -> tuple[Tensor, Tensor]:
    args, kwargs, labels = inputs_and_labels(batch)
    check_integers(labels, "[B, T]", 2)
    if "decoder_input_ids" not in kwargs:
        shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
        if shift is None:
            raise ValueError(
                "batch: expected 'decoder_input_ids' for a model without "
                f"prepare_decoder_input_ids_from_labels, got keys {list(kwargs)}"
            )
        kwargs = {**kwargs, "decoder_input_ids": shift(labels=labels)}
    return _checked(prediction(model, args, kwargs), labels)


def _checked(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    check_integers(labels, "[B, T]", 2)
    if logits.dim() != 3 or logits.shape[:2] != labels.shape or logits.shape[2] < 2:
        raise ValueError(
            f"model: expected logits [B, T, V] for labels {list(labels.shape)}, "
            f"got shape {list(logits.shape)}"
        )
    return logits, labels
