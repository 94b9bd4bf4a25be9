"""What a fine-tuned MiniLM says after retraining on random halves: the truth for an LDS on text."""

from __future__ import annotations

import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import docstrings
import minilm
from trak_ext.demo import digits


class TextTask(NamedTuple):
    """The task before any fine-tuning."""

    model: minilm.TopLayers
    train: minilm.EncodedTexts
    test: minilm.EncodedTexts
    split: docstrings.DocstringSplit


def make_task(num_train: int, num_test: int, seed: int) -> TextTask:
    split = docstrings.load_docstrings_split(num_train, num_test, seed=seed)
    bert, tokenizer = minilm.load_bert()
    train = minilm.encode_texts(bert, tokenizer, split.train_texts, split.train_labels)
    test = minilm.encode_texts(bert, tokenizer, split.test_texts, split.test_labels)
    return TextTask(minilm.TopLayers(bert, len(split.classes)).eval(), train, test, split)


def train_checkpoints(task: TextTask, count: int, seed: int) -> list[dict[str, Tensor]]:
    everything = torch.arange(len(task.train.labels))
    return [
        minilm.fine_tune(task.model, task.train, everything, seed * 10_000 + i)
        for i in range(count)
    ]


def retrain_on_halves(
    task: TextTask, num_subsets: int, models_a_subset: int, seed: int, path: str | None = None
) -> tuple[Tensor, Tensor]:
    """Return masks [m, n] and outputs [m, models per subset, t] on the test texts.

    With a path, what is there already is not trained again.
    """
    num_train = len(task.train.labels)
    masks = digits.subset_masks(num_subsets, num_train, seed=seed)
    outputs = torch.full((num_subsets, models_a_subset, len(task.test.labels)), torch.nan)
    file = None if path is None else Path(path)
    if file is not None and file.exists():
        found = torch.load(file)
        if not torch.equal(found["masks"], masks) or found["outputs"].shape != outputs.shape:
            raise ValueError(f"truth: expected the subsets of these settings, got others in {file}")
        outputs = found["outputs"]
    begin = time.perf_counter()
    # One model of every subset first, then a second: a stopped run is still balanced.
    for r in range(models_a_subset):
        for j in range(num_subsets):
            if not outputs[j, r].isnan().any():
                continue
            state = minilm.fine_tune(
                task.model,
                task.train,
                masks[j].nonzero()[:, 0],
                seed * 10_000 + 1_000 + j * models_a_subset + r,
            )
            outputs[j, r] = minilm.text_outputs(task.model, state, task.test)
            if file is not None:
                torch.save({"masks": masks, "outputs": outputs}, file)
        elapsed = time.perf_counter() - begin
        print(f"round {r + 1} of {models_a_subset} after {elapsed:.0f} s", flush=True)
    return masks, outputs
