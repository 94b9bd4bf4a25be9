"""The device that a GPU measurement runs on, or this machine's CPU in its place for a rehearsal.

A rehearsal goes through the same lines on problems a thousand times smaller, so that a script does
not fail on a slip when a GPU is at hand for ten minutes. Its times mean nothing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Gpu:
    """The current CUDA device."""

    rehearsal = False
    device = torch.device("cuda")
    transport: Any = None  # what trak_ext.kernels.streaming takes by itself

    def name(self) -> str:
        """Return the device's name."""
        return torch.cuda.get_device_name()

    def multiprocessors(self) -> int:
        """Return how many multiprocessors it has."""
        return torch.cuda.get_device_properties(0).multi_processor_count

    def free_bytes(self) -> int:
        """Return the memory that nobody uses."""
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]

    def milliseconds(
        self, call: Callable[[], object], patience: float = 3.0, turns: int = 9
    ) -> list[float]:
        """Return the device's times of some runs after a warm-up; fewer where they take long.

        The device is kept waiting until a call has been queued whole, so that the time it takes to
        come through Python, a few tenths of a millisecond, is not measured.
        """
        call()
        torch.cuda.synchronize()
        times: list[float] = []
        begin = time.perf_counter()
        while len(times) < turns and (len(times) < 2 or time.perf_counter() - begin < patience):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(2_000_000)
            start.record()
            call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        return times


class Rehearsal(Gpu):
    """The CPU, for one run of everything."""

    rehearsal = True
    device = torch.device("cpu")

    class _Stream:
        def record_event(self) -> Any:
            return self

        def wait_event(self, event: Any) -> None:
            pass

        def synchronize(self) -> None:
            pass

    def __init__(self) -> None:
        self.transport = self
        self.compute_stream = self.copy_stream = self._Stream()

    def host_buffer(self, rows: int, like: Tensor) -> Tensor:
        """Return memory for `rows` rows of a feature matrix."""
        return torch.empty((rows, like.shape[1]), dtype=like.dtype)

    device_buffer = host_buffer

    def copy(self, to: Tensor, source: Tensor) -> None:
        """Copy at once."""
        to.copy_(source)

    def name(self) -> str:
        """Return what stands in the device's place."""
        return "REHEARSAL on the CPU, times mean nothing"

    def multiprocessors(self) -> int:
        """Return a number."""
        return 1

    def free_bytes(self) -> int:
        """Return a number that lets every contender in."""
        return 2**34

    def milliseconds(
        self, call: Callable[[], object], patience: float = 3.0, turns: int = 1
    ) -> list[float]:
        """Return the time of one run."""
        begin = time.perf_counter()
        call()
        return [1e3 * (time.perf_counter() - begin)]


def measure_ceilings(gpu: Gpu) -> dict[str, float]:
    """Return bf16 operations a second of a product, and bytes a second of a copy, both counted."""
    size = 64 if gpu.rehearsal else 8192
    a, b = (torch.randn(size, size, device=gpu.device).bfloat16() for _ in range(2))
    product = statistics.median(gpu.milliseconds(lambda: a @ b))
    source = torch.randn(2**10 if gpu.rehearsal else 2**28, device=gpu.device)
    target = torch.empty_like(source)
    copy = statistics.median(gpu.milliseconds(lambda: target.copy_(source)))
    return {
        "bf16_operations": 2 * size**3 / product * 1e3,
        "bytes": 2 * source.numel() * source.element_size() / copy * 1e3,
    }


def with_tf32(allowed: bool, call: Callable[[], object]) -> Callable[[], object]:
    """Return a call whose fp32 products are or are not rounded to tf32."""

    def run() -> object:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if allowed else "highest")
        try:
            return call()
        finally:
            torch.set_float32_matmul_precision(before)

    return run
