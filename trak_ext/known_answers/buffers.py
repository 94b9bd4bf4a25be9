"""The tensors of a self-test in buffers of bytes, laid out as a case wants them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

CPU = torch.device("cpu")
BASE_ROWS = 8  # others are these times a power of two, so that few answers serve many rows


@functools.cache
def _hashes(seed: int, count: int) -> Tensor:
    """Return numbers below 2^32 that look random: a hash (lowbias32) of seed and place."""
    x = torch.arange(count, dtype=torch.int64, device=CPU) + (seed << 20)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x2C1B3C6D)):
        x = (x ^ x >> shift) * factor & 0xFFFFFFFF
    return x ^ x >> 16


def integers(seed: int, shape: tuple[int, ...], largest: int) -> Tensor:
    """Return integers from -largest to largest as fp32; torch's generators stay untouched."""
    drawn = (_hashes(seed, math.prod(shape)) * (2 * largest + 1) >> 32) - largest
    return drawn.to(torch.float32).view(shape)


@functools.cache
def _group_scales(groups: int, device: torch.device) -> Tensor:
    group = torch.arange(groups, dtype=torch.float32, device=CPU)
    return (2.0 ** (group % 9 - 4) * (1 - 2 * (group % 2)))[:, None, None].to(device)


def spread(base: Tensor, rows: int) -> Tensor:
    """Return `rows` rows [rows, n] of the 8: those of every next 8 times another power of two."""
    scales = _group_scales(-(-rows // BASE_ROWS), base.device).to(base.dtype)
    return (base * scales).flatten(0, 1)[:rows]


class Slot(NamedTuple):
    """A tensor's place in a buffer of bytes."""

    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def view(self, buffer: Tensor) -> Tensor:
        """Return the tensor."""
        extent = 1 + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        end = self.start + extent * self.dtype.itemsize
        typed = buffer[self.start : end].view(self.dtype)
        return typed.as_strided(self.shape, self.strides)


class Memory:
    """Tensors in one buffer of the device; around them all bytes are 255."""

    def __init__(self) -> None:
        self._size = 0
        self._values: list[tuple[Slot, Tensor | float, bool]] = []
        self._known: dict[Any, Slot] = {}

    def place(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        values: Tensor | float,
        strides: tuple[int, ...] | None = None,
        start: int = 0,
        is_base: bool = False,
    ) -> Slot:
        """Reserve a place, `start` bytes after a multiple of 16.

        Its values, or the base rows that they are `spread` from.
        """
        if strides is None:
            strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
        slot = Slot(self._size + start, dtype, shape, strides)
        extent = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        self._size += (start + extent * dtype.itemsize + 15) // 16 * 16 + 16
        self._values.append((slot, values, is_base))
        return slot

    def shared(self, key: Any, make: Callable[[], Slot]) -> Slot:
        """Return the place that was made for a key, or make it."""
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]

    def build(self, kernels: Any) -> Tensor:
        """Return the buffer with its values: each tensor is sent once and spread on the device."""
        buffer = torch.full((self._size,), 255, dtype=torch.uint8, device=kernels.device)
        there: dict[Any, Tensor] = {}
        for slot, values, is_base in self._values:
            place = slot.view(buffer)
            if not isinstance(values, Tensor):
                place.fill_(values)
                continue
            key, rows = id(values), slot.shape[0]
            if key not in there:
                there[key] = kernels.send(values)
            if is_base and (key, rows) not in there:
                there[key, rows] = spread(there[key], rows)
            place.copy_(there[key, rows] if is_base else there[key])
        return buffer
