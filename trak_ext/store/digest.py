"""Digests of weights, data and settings, by which a store tells its own from another's."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return a tensor's values in row-major order as bytes."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy().data) if flat.numel() else memoryview(b"")


def state_digest(state: Mapping[str, Tensor]) -> str:
    """Return a digest of named tensors: names, dtypes, shapes and bytes."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(state):
        tensor = state[name]
        digest.update(f"{name}|{tensor.dtype}|{list(tensor.shape)}|".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def settings_digest(settings: Mapping[str, Any]) -> str:
    """Return a digest of a JSON-like mapping."""
    text = json.dumps(settings, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class SampleDigest:
    """A digest of samples in order, the same however they were cut into batches."""

    def __init__(self) -> None:
        self._digest = hashlib.blake2b(digest_size=16)

    def update(self, tensors: list[Tensor], ids: Sequence[int | str] | None = None) -> None:
        """Add the samples of a batch: tensors with samples in front, and ids if there are any."""
        rows = [self._rows(tensor) for tensor in tensors]
        for i in range(tensors[0].shape[0]):
            if ids is not None:
                self._digest.update(f"id {json.dumps(ids[i])}|".encode())
            for prefix, data in rows:
                self._digest.update(prefix)
                self._digest.update(data[i])

    def hexdigest(self) -> str:
        """Return the digest of all samples so far."""
        return self._digest.hexdigest()

    @staticmethod
    def _rows(tensor: Tensor) -> tuple[bytes, np.ndarray[Any, Any]]:
        prefix = f"{tensor.dtype}|{list(tensor.shape[1:])}|".encode()
        count = tensor.shape[0]
        data = np.frombuffer(tensor_bytes(tensor), dtype=np.uint8)
        return prefix, data.reshape(count, data.size // max(count, 1))
