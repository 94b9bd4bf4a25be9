"""Language models: all target tokens of a sample, or one of them.

f = sum over tokens of log(p/(1-p)), p the probability of the right token; label -100 is ignored.
Labels are class numbers [B, T] as Hugging Face models take them. They are not given to the model,
which would compute a loss that nobody reads.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .core import (
    IGNORED,
    ModelOutput,
    check_integers,
    examples,
    has_position,
    inputs_and_labels,
    log_odds,
    nan_where,
    of_many,
    of_one,
    one_row_each,
    prediction,
    split_position,
)


def causal_lm(model: Callable[..., Any], batch: Any) -> ModelOutput:
    """Return f = sum_t log(p_t/(1-p_t)), and the means of 1-p_t and of p_t(1-p_t).

    Token t of `labels` is predicted by the logits at t-1, so labels[:, 0] never counts, nor does a
    token that `attention_mask` masks or whose predecessor it masks. A sample without a token that
    counts gives NaN.
    """
    logits, labels = _causal_logits(model, batch)
    return tokens_output(logits[:, :-1], labels[:, 1:])


def causal_lm_token(model: Callable[..., Any], batch: Any) -> ModelOutput:
    """Return f = log(p/(1-p)), 1-p and p(1-p) of the token labels[b, target_position[b]].

    NaN where that label does not count, see `causal_lm`, and where target_position is below 1 or
    past the end.
    """
    batch, position = split_position(batch)
    logits, labels = _causal_logits(model, batch)
    return token_output(logits[:, :-1], labels[:, 1:], position - 1, first=1)


def seq2seq_lm(model: Callable[..., Any], batch: Any) -> ModelOutput:
    """As `causal_lm`, token t of `labels` being predicted by the decoder's logits at t.

    The decoder's input is `decoder_input_ids` of the batch or, where it has none, what the model's
    prepare_decoder_input_ids_from_labels makes of the labels. A label whose place
    `decoder_attention_mask` masks does not count.
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


def token_output(logits: Tensor, labels: Tensor, position: Tensor, first: int = 0) -> ModelOutput:
    """Return f, Q and R of the tokens at `position` [B] of logits [B, T, V] and labels [B, T].

    first: What the caller's user calls the first position.
    """
    index = position.clamp(0, labels.shape[1] - 1)
    own = logits.gather(1, index[:, None, None].expand(-1, 1, logits.shape[2]))[:, 0]
    label = labels.gather(1, index[:, None])[:, 0]
    outside, ignored = position != index, label == IGNORED
    f = log_odds(own, torch.where(outside | ignored, 0, label))
    f = nan_where(
        outside,
        f,
        lambda: (
            f"target_position: expected numbers from {first} to {labels.shape[1] - 1 + first}, "
            f"got {examples(position + first, outside)}"
        ),
    )
    return of_one(
        nan_where(
            ignored,
            f,
            lambda: (
                f"target_position: expected tokens that count (not label {IGNORED}, not masked, "
                f"nor after a masked one), got {examples(position + first, ignored)}"
            ),
        )
    )


def token_targets(batch: Any, *, causal: bool) -> tuple[Any, Tensor]:
    """Return a batch with one row for each target token, for `causal_lm_token` and its sister.

    Args:
        batch: A mapping with labels [B, T], or (inputs, labels).
        causal: Whether it is for a causal model, for which labels[:, 0] is no target.

    Returns:
        The batch, each sample repeated for each of its tokens, with `target_position` int64
        [rows]; and int64 [rows], the sample of `batch` that each row repeats.
    """
    _, inputs, labels = inputs_and_labels(batch)
    check_integers(labels, "[B, T]", 2)
    mask = _mask(inputs, "attention_mask" if causal else "decoder_attention_mask", labels)
    counted = _counted(labels, mask, causal) != IGNORED
    if causal:
        counted[:, 0] = False
    return one_row_each(batch, counted)


def check_causal(model: Any, batch: Any) -> None:
    """Refuse a model whose logits at a token are not what it makes of the tokens up to there.

    That is one whose class says so, and one whose logits change when a later token does.
    """
    names = {type(module).__name__ for module in model.modules()}
    other = next((n for n in sorted(names) if any(head in n for head in _OTHER_HEADS)), None)
    if other is not None:
        raise ValueError(
            f"model: expected one that predicts the next token (such as ...ForCausalLM), got a "
            f"{other}, whose logits are not shifted against its labels (write a task of your own)"
        )
    if has_position(batch):
        batch, _ = split_position(batch)
    args, kwargs, labels = inputs_and_labels(batch)
    tokens = kwargs.get("input_ids", args[0] if args else None)
    if not isinstance(tokens, Tensor) or tokens.dim() != 2 or tokens.is_floating_point():
        return
    mask = _mask(kwargs, "attention_mask", labels)
    here = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
    places = torch.arange(tokens.shape[1], device=tokens.device)
    last = torch.where(here, places, -1).amax(1)  # of each sample; -1 where all is masked
    rows = torch.arange(len(tokens), device=tokens.device)[last > 0]
    if len(rows) == 0:
        return
    changed = tokens.clone()
    ends = (rows, last[rows])
    changed[ends] = torch.where(tokens[ends] == tokens[rows, 0], tokens[ends] - 1, tokens[rows, 0])
    changed[ends] = torch.where(changed[ends] < 0, 1, changed[ends])
    logits, again = (
        _logits_of_tokens(model, args, kwargs, given, labels)[rows] for given in (tokens, changed)
    )
    # Not at masked tokens, where a wholly masked row of attention may look at all of them.
    before = (places < last[rows, None]) & here[rows]
    moved = float((logits - again)[before].abs().max())
    largest = float(logits[before].abs().max())
    half = next(model.parameters()).dtype in (torch.float16, torch.bfloat16)
    if moved > (1e-2 if half else 1e-5) * largest:
        raise ValueError(
            "model: expected a causal language model, whose logits at a token do not depend on "
            f"later tokens, got a {type(model).__name__} whose logits moved by {moved:.3g} of "
            f"{largest:.3g} (a bidirectional encoder? is_decoder=True makes some causal)"
        )


# Of classes in Hugging Face's library: heads whose logits at a token are for that token's label.
_OTHER_HEADS = (
    *("ForMaskedLM", "ForTokenClassification", "ForQuestionAnswering", "ForPreTraining"),
    *("ForNextSentencePrediction", "ForSequenceClassification", "ForMultipleChoice"),
)


def _logits_of_tokens(
    model: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tokens: Tensor, labels: Tensor
) -> Tensor:
    if "input_ids" in kwargs:
        kwargs = {**kwargs, "input_ids": tokens}
    else:
        args = (tokens, *args[1:])
    return prediction(model, args, _with_positions(model, kwargs, labels))


def _causal_logits(model: Callable[..., Any], batch: Any) -> tuple[Tensor, Tensor]:
    """Return logits [B, T, V], and labels [B, T] with -100 for those that do not count."""
    args, kwargs, labels = inputs_and_labels(batch)
    check_integers(labels, "[B, T]", 2)
    logits = prediction(model, args, _with_positions(model, kwargs, labels))
    return _checked(logits, _counted(labels, _mask(kwargs, "attention_mask", labels), True))


def _mask(inputs: dict[str, Any], name: str, labels: Tensor) -> Tensor | None:
    """Return which tokens are there, bool [B, T], where the batch says so."""
    mask = inputs.get(name)
    return mask != 0 if isinstance(mask, Tensor) and mask.shape == labels.shape else None


def _counted(labels: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """Return labels with -100 where a token, or the predecessor that predicts it, is masked."""
    if mask is None:
        return labels
    if causal:
        mask = mask & torch.cat([mask[:, :1], mask[:, :-1]], 1)
    return torch.where(mask, labels, IGNORED)


_takes_positions: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()


def _with_positions(model: Any, kwargs: dict[str, Any], labels: Tensor) -> dict[str, Any]:
    """Return inputs with position_ids counted from a text's first token, if the model takes any.

    So that padding on the left moves no token. Models that count positions by the tokens
    themselves are left alone.
    """
    mask = _mask(kwargs, "attention_mask", labels)
    if mask is None or "position_ids" in kwargs:
        return kwargs
    if model not in _takes_positions:
        takes = "position_ids" in inspect.signature(model.forward).parameters
        own = any(hasattr(m, "create_position_ids_from_input_ids") for m in model.modules())
        _takes_positions[model] = takes and not own
    if not _takes_positions[model]:
        return kwargs
    return {**kwargs, "position_ids": (mask.long().cumsum(1) - 1).clamp(min=0)}


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
    mask = _mask(kwargs, "decoder_attention_mask", labels)
    return _checked(prediction(model, args, kwargs), _counted(labels, mask, False))


def _checked(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    check_integers(labels, "[B, T]", 2)
    if logits.dim() != 3 or logits.shape[:2] != labels.shape or logits.shape[2] < 2:
        raise ValueError(
            f"model: expected logits [B, T, V] for labels {list(labels.shape)}, "
            f"got shape {list(logits.shape)}"
        )
    return logits, labels
