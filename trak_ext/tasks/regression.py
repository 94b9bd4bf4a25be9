"""One number per sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .core import ModelOutput, inputs_and_labels, prediction


def regression(model: Callable[..., Any], batch: Any) -> ModelOutput:
    """Return f = the prediction, Q = y - f and R = 1: the loss is (f - y)^2 / 2."""
    args, kwargs, labels = inputs_and_labels(batch)
    found = prediction(model, args, kwargs)
    if found.numel() != labels.numel():
        raise ValueError(
            f"model: expected one prediction per sample for labels {list(labels.shape)}, "
            f"got shape {list(found.shape)}"
        )
    f = found.reshape(-1)
    return ModelOutput(f, labels.reshape(-1).to(f.dtype) - f, torch.ones_like(f))
