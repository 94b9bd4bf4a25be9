"""Features in host memory on their way to a device that scores them.

They come to the device a sample block at a time, through two pinned buffers and two buffers of
the device, on a stream of their own: while one sample block is scored the next one is on its way.
So the device holds two of them, whatever the number of samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Of all checkpoints' features together; two such sample blocks are on the device.
BLOCK_BYTES = 64 * 2**20


class Block(NamedTuple):
    """Some rows on the device: which they are, and each checkpoint's features [rows, k]."""

    rows: slice
    features: list[Tensor]


class CudaTransport:
    """Where sample blocks are kept and how they get to a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.compute_stream: Any = torch.cuda.current_stream(device)
        self.copy_stream: Any = torch.cuda.Stream(device)

    def host_buffer(self, rows: int, like: Tensor) -> Tensor:
        """Return pinned memory for `rows` rows of a feature matrix."""
        return torch.empty((rows, like.shape[1]), dtype=like.dtype, device="cpu", pin_memory=True)

    def device_buffer(self, rows: int, like: Tensor) -> Tensor:
        """Return the device's memory for `rows` rows of a feature matrix."""
        return torch.empty((rows, like.shape[1]), dtype=like.dtype, device=self.device)

    def copy(self, to: Tensor, source: Tensor) -> None:
        """Start a copy on the copy stream, from pinned memory."""
        with torch.cuda.stream(self.copy_stream):
            to.copy_(source, non_blocking=True)


class _Slot:
    """One of the two places of a sample block, and the events that say when it is free."""

    def __init__(self, transport: Any, rows: int, features: Sequence[Tensor]) -> None:
        self._transport = transport
        self.host = [transport.host_buffer(rows, phi) for phi in features]
        self.device = [transport.device_buffer(rows, phi) for phi in features]
        self.copied: Any = None
        # The device's memory may have been something else's that the compute stream still uses.
        self.computed: Any = transport.compute_stream.record_event()

    def fetch(self, features: Sequence[Tensor], rows: slice) -> Block:
        """Start bringing rows here."""
        size = rows.stop - rows.start
        if self.copied is not None:
            self.copied.synchronize()  # the pinned buffer is read until then
        self._transport.copy_stream.wait_event(self.computed)
        for phi, host, device in zip(features, self.host, self.device, strict=True):
            host[:size].copy_(phi[rows])
            self._transport.copy(device[:size], host[:size])
        self.copied = self._transport.copy_stream.record_event()
        return Block(rows, [device[:size] for device in self.device])


def stream_blocks(
    features: Sequence[Tensor],
    device: torch.device,
    block_bytes: int | None = None,
    transport: Any = None,
) -> Iterator[Block]:
    """Yield features M x [n, k] from host memory as sample blocks on the device, in order.

    A sample block's tensors are the caller's until the next one is asked for, to be used on the
    stream that is current at the first. `transport` is for tests; by default it is
    CudaTransport(device).
    """
    num_train = features[0].shape[0]
    if num_train == 0:
        return
    transport = CudaTransport(device) if transport is None else transport
    row_bytes = sum(phi.shape[1] * phi.element_size() for phi in features)
    block_bytes = BLOCK_BYTES if block_bytes is None else block_bytes
    step = min(num_train, max(1, block_bytes // max(1, row_bytes)))
    parts = [slice(i, min(i + step, num_train)) for i in range(0, num_train, step)]
    try:
        slots = [_Slot(transport, step, features) for _ in range(min(2, len(parts)))]
        coming = slots[0].fetch(features, parts[0])
        for i in range(len(parts)):
            block, slot = coming, slots[i % 2]
            if i + 1 < len(parts):
                coming = slots[(i + 1) % 2].fetch(features, parts[i + 1])
            transport.compute_stream.wait_event(slot.copied)
            yield block
            slot.computed = transport.compute_stream.record_event()
    finally:
        # However this ends, the buffers go back to their allocators now: no copy may be under way.
        transport.copy_stream.synchronize()
