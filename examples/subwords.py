"""A byte-level vocabulary learnt from the texts themselves, for models trained from scratch."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from common import Columns
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

PAD, START, END = 0, 1, 2
IGNORED = -100  # labels that do not count


def learn(texts: Iterable[str], size: int) -> Tokenizer:
    """Return a byte-pair tokenizer of at most `size` tokens, the first three being special."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<pad>", "<start>", "<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def rows(sequences: Iterable[list[int]], length: int) -> Columns:
    """Cut and pad token lists to `length`; return input_ids and attention_mask, [n, length]."""
    cut = [ids[:length] for ids in sequences]
    return {
        "input_ids": torch.tensor([ids + [PAD] * (length - len(ids)) for ids in cut]),
        "attention_mask": torch.tensor([[1] * len(i) + [0] * (length - len(i)) for i in cut]),
    }


def as_labels(columns: Columns) -> torch.Tensor:
    """Return the token numbers with padding marked as not to be counted."""
    return columns["input_ids"].masked_fill(columns["attention_mask"] == 0, IGNORED)
