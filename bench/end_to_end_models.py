"""The three models of bench/end_to_end.py, with random weights and data from fixed seeds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

TOKENS = 64


class Residual(nn.Sequential):
    """Layers whose input is added to their output."""

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return x + super().forward(x)


def convolution(inputs: int, outputs: int, *pool: nn.Module) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
        *pool,
    )


def resnet9(generator: torch.Generator, samples: int) -> tuple[nn.Module, str, list[Any]]:
    """Return a ResNet of nine layers and 1.03 million parameters, its task and samples."""
    w = 36
    model = nn.Sequential(
        convolution(3, w),
        convolution(w, 2 * w, nn.MaxPool2d(2)),
        Residual(convolution(2 * w, 2 * w), convolution(2 * w, 2 * w)),
        convolution(2 * w, 4 * w, nn.MaxPool2d(2)),
        convolution(4 * w, 5 * w, nn.MaxPool2d(2)),
        Residual(convolution(5 * w, 5 * w), convolution(5 * w, 5 * w)),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(5 * w, 10),
    )
    images = torch.randn(samples, 3, 32, 32, generator=generator)
    labels = torch.randint(10, (samples,), generator=generator)
    rows = list(zip(images, labels, strict=True))
    return model, "image_classification", rows


def bert(generator: torch.Generator, samples: int) -> tuple[nn.Module, str, list[Any]]:
    """Return a BERT of four layers and 5.4 million parameters, its task and samples."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=8192, hidden_size=256, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=1024, max_position_embeddings=128, num_labels=2,
    )  # fmt: skip
    ids = torch.randint(8192, (samples, TOKENS), generator=generator)
    labels = torch.randint(2, (samples,), generator=generator)
    rows = [
        {"input_ids": one, "attention_mask": torch.ones_like(one), "labels": label}
        for one, label in zip(ids, labels, strict=True)
    ]
    return BertForSequenceClassification(config), "text_classification", rows


def gpt2(generator: torch.Generator, samples: int) -> tuple[nn.Module, str, list[Any]]:
    """Return a GPT-2 of three layers and 2.1 million parameters, its task and samples."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=4096, n_positions=TOKENS, n_embd=192, n_layer=3, n_head=4,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    ids = torch.randint(4096, (samples, TOKENS), generator=generator)
    rows = [
        {"input_ids": one, "attention_mask": torch.ones_like(one), "labels": one} for one in ids
    ]
    return GPT2LMHeadModel(config), "causal_lm", rows


MODELS: dict[str, Callable[[torch.Generator, int], tuple[nn.Module, str, list[Any]]]] = {
    "resnet9": resnet9,
    "bert": bert,
    "gpt2": gpt2,
}


def make(name: str, samples: int) -> tuple[nn.Module, str, list[Any]]:
    """Return a model in eval mode, its task and samples: the same for the same arguments."""
    torch.manual_seed(0)
    model, task, rows = MODELS[name](torch.Generator().manual_seed(1), samples)
    return model.eval(), task, rows
