"""A device's two streams on the CPU, for streaming: work happens as early or as late as it may."""

from __future__ import annotations

from collections.abc import Callable

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


class LateTransport:
    """Stands for CudaTransport. What a test does between blocks itself needs eager_compute."""

    def __init__(self, eager_compute: bool = True, eager_copies: bool = False) -> None:
        self.compute_stream = Stream(eager_compute)
        self.copy_stream = Stream(eager_copies)
        self.buffers = 0

    def host_buffer(self, rows: int, like: Tensor) -> Tensor:
        self.buffers += 1
        return torch.full((rows, like.shape[1]), float("nan"), dtype=like.dtype)

    def device_buffer(self, rows: int, like: Tensor) -> Tensor:
        self.buffers += 1
        return torch.full((rows, like.shape[1]), float("nan"), dtype=like.dtype)

    def copy(self, to: Tensor, source: Tensor) -> None:
        self.copy_stream.add(lambda: to.copy_(source))
