"""Where a model's gradients are computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def choose_device(model: nn.Module, device: Any = None) -> torch.device:
    """Return a device of this machine: the one asked for, or the model's first parameter's."""
    if device is None:
        parameter = next(model.parameters(), None)
        device = "cpu" if parameter is None else parameter.device
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, TypeError, AssertionError, ValueError) as error:
        reason = ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
        raise ValueError(
            f"device: expected a torch device of this machine, got {device!r} ({reason})"
        ) from error
    if found.type == "meta":
        raise ValueError("device: expected one that tensors have values on, got the meta device")
    return found
