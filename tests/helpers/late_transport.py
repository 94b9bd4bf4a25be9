"""A device's two streams on the CPU, for streaming: work happens as early or as late as it may."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


class Event:
    """A point of a stream."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._position = len(stream.work)

    def synchronize(self) -> None:
        self._stream.run(self._position)


class Stream:
    """Work in order: done at once where `eager`, else when somebody waits for it."""

    def __init__(self, eager: bool) -> None:
        self.work: list[Callable[[], object]] = []
        self._eager = eager
        self._done = 0

    def run(self, position: int) -> None:
        while self._done < position:
            self._done += 1
            self.work[self._done - 1]()

    def add(self, work: Callable[[], object]) -> None:
        self.work.append(work)
        if self._eager:
            self.run(len(self.work))

    def record_event(self) -> Event:
        return Event(self)

    def wait_event(self, event: Event) -> None:
        self.add(event.synchronize)

    def synchronize(self) -> None:
        self.run(len(self.work))


class Memory:
    """What an allocator lends out as a tensor, and takes back when nothing refers to it any more.

    Copies find it by its address, as a device does: one under way keeps no memory for itself.
    """

    def __init__(self, size: int) -> None:
        self.content = np.full(size, 0xFF, np.uint8)  # NaN in every floating-point type
        self.lent = True

    def take_back(self) -> None:
        self.lent = False


class LateTransport:
    """Stands for CudaTransport. What a test does between blocks itself needs eager_compute.

    `faults` are copies that touched memory after it was taken back, which may be somebody else's.
    """

    def __init__(self, eager_compute: bool = True, eager_copies: bool = False) -> None:
        self.compute_stream = Stream(eager_compute)
        self.copy_stream = Stream(eager_copies)
        self.memories: list[Memory] = []
        self.faults: list[str] = []
        self._at_address: dict[int, Memory] = {}

    @property
    def buffers(self) -> int:
        return len(self.memories)

    def host_buffer(self, rows: int, like: Tensor) -> Tensor:
        # The host's allocator gives memory to its next owner at once.
        return self._lend(rows, like, lambda memory: memory.take_back())

    def device_buffer(self, rows: int, like: Tensor) -> Tensor:
        # The device's is of the compute stream: its next owner comes behind what is queued there.
        return self._lend(rows, like, lambda memory: self.compute_stream.add(memory.take_back))

    def _lend(self, rows: int, like: Tensor, take_back: Callable[[Memory], None]) -> Tensor:
        memory = Memory(rows * like.shape[1] * like.element_size())
        lent = memory.content[:]  # an object of its own, which the tensor's memory keeps alive
        weakref.finalize(lent, take_back, memory).atexit = False
        self.memories.append(memory)
        self._at_address[memory.content.ctypes.data] = memory
        return torch.from_numpy(lent).view(like.dtype).view(rows, like.shape[1])

    def copy(self, to: Tensor, source: Tensor) -> None:
        target, origin = self._at_address[to.data_ptr()], self._at_address[source.data_ptr()]
        size = to.nbytes

        def run() -> None:
            if not origin.lent:
                self.faults.append("a copy read pinned memory that had been taken back")
            if not target.lent:
                self.faults.append("a copy wrote to the device's memory that had been taken back")
            target.content[:size] = origin.content[:size]

        self.copy_stream.add(run)
