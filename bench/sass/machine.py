"""Runs a kernel's machine code (sm_80 to sm_90) on the CPU, a block at a time, and counts.

All threads of a block that stand at the same, lowest address take a step together, which is how
diverged threads find each other again. An instruction is counted once for every warp that has
threads in it, as the hardware issues it. Accesses to shared memory count wavefronts: passes of 128
bytes over the 32 banks, a half or a quarter of a warp at a time for 8 and 16 bytes a thread.

What it stores can be compared with what the kernel should have stored, which shows that the
instructions were understood; times it does not know.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from .operations import compile_instruction

Array = npt.NDArray[Any]
Code = list[tuple[int, str]]
WARP = 32
RZ = 255
UNIFORM = 256  # the first uniform register
PARAMETERS = {80: 0x160, 86: 0x160, 89: 0x160, 90: 0x210}
SHARED_BASE = {80: 0, 86: 0, 89: 0, 90: 0x400}


class Memory:
    """Global memory: ranges that are there; others read as zeros, and writes to them vanish."""

    def __init__(self) -> None:
        self.ranges: list[tuple[int, Array]] = []

    def add(self, address: int, data: Array) -> None:
        """Put writable bytes at an address."""
        self.ranges.append((address, data.view(np.uint8).reshape(-1)))

    def _places(self, addresses: Array, size: int) -> Any:
        for base, data in self.ranges:
            inside = (addresses >= base) & (addresses + size <= base + data.size)
            if inside.any():
                at = (addresses[inside] - base)[:, None] + np.arange(size)
                yield inside, data, at

    def load(self, addresses: Array, size: int) -> Array:
        """Return bytes [threads, size]."""
        result = np.zeros((addresses.size, size), dtype=np.uint8)
        for inside, data, at in self._places(addresses, size):
            result[inside] = data[at]
        return result

    def store(self, addresses: Array, values: Array) -> None:
        """Store bytes [threads, size]."""
        for inside, data, at in self._places(addresses, values.shape[1]):
            data[at] = values[inside]


def wavefronts(warps: Array, addresses: Array, size: int) -> int:
    """Return passes over the banks that an access takes, of all warps in it."""
    lanes_at_once = WARP * 4 // max(size, 4)
    # Lanes are in order; a part of a warp is `lanes_at_once` of them.
    lane = warps % WARP
    part = warps // WARP * (WARP // lanes_at_once) + lane // lanes_at_once
    words = max(size // 4, 1)
    word = (addresses // 4)[:, None] + np.arange(words)
    keys = np.unique((part[:, None].astype(np.int64) << 32 | word).reshape(-1))
    banks = (keys >> 32) * WARP + (keys & 0xFFFFFFFF) % WARP
    counts = np.bincount(banks - banks.min())
    padded = np.zeros((-(-counts.size // WARP) + 1) * WARP, dtype=np.int64)
    first = banks.min() % WARP
    padded[first : first + counts.size] = counts
    return int(padded.reshape(-1, WARP).max(axis=1).sum())


@dataclasses.dataclass
class Counts:
    """What a block did."""

    issued: collections.Counter[int]  # by address, once a warp
    wavefronts: collections.Counter[int]  # of shared memory, by address
    opcodes: dict[int, str]


@dataclasses.dataclass
class Arrivals:
    """A barrier in shared memory: a phase ends with so many arrivals and bytes."""

    count: int
    pending: int
    bytes: int = 0
    phase: int = 0


class Machine:
    """A block of threads."""

    def __init__(
        self,
        code: Code,
        arch: int,
        *,
        arguments: bytes,
        block: int,
        threads: int,
        shared_bytes: int,
        memory: Memory,
        constants: dict[int, bytes] | None = None,
        multiply: Callable[..., None] | None = None,
    ) -> None:
        self.arch, self.block, self.threads, self.memory = arch, block, threads, memory
        self.base = SHARED_BASE[arch]
        self.shared = np.full(self.base + shared_bytes, 0xFF, dtype=np.uint8)
        bank = np.zeros(0x2000, dtype=np.uint8)
        at = PARAMETERS[arch]
        bank[at : at + len(arguments)] = np.frombuffer(arguments, dtype=np.uint8)
        self.banks = {0: bank}
        for number, data in (constants or {}).items():
            self.banks[number] = np.frombuffer(data.ljust(0x1000, b"\0"), dtype=np.uint8)
        self.registers = np.zeros((UNIFORM + 64, threads), dtype=np.uint32)
        self.predicates = np.zeros((16, threads), dtype=bool)
        self.predicates[7] = self.predicates[15] = True
        self.address = np.full(threads, code[0][0], dtype=np.int64)
        self.state = np.zeros(threads, dtype=np.int8)  # 0 runs, 1 and 3 wait, 2 has ended
        self.barrier = np.zeros(threads, dtype=np.int64)
        self.arrived: collections.Counter[int] = collections.Counter()
        self.arrivals: dict[int, Arrivals] = {}
        self.multiply = multiply
        self.counts = Counts(collections.Counter(), collections.Counter(), {})
        self.next = {a: b for (a, _), (b, _) in itertools.pairwise(code)}
        self.text = dict(code)
        self._compiled: dict[int, Any] = {}
        self._compile = compile_instruction
        self.now = 0

    def run(self) -> Counts:
        """Run to the end of all threads."""
        threads = np.arange(self.threads)
        while True:
            runs = self.state == 0
            if not runs.any():
                if (self.state == 2).all():
                    return self.counts
                raise RuntimeError("threads wait at a barrier for others that never come")
            self.now = now = int(self.address[runs].min())
            here = threads[runs & (self.address == now)]
            if now not in self._compiled:
                self._compiled[now] = self._compile(self, now, self.text[now])
            guard, operation = self._compiled[now]
            # Threads come in whole warps or parts of them.
            self.counts.issued[now] += len(np.unique(here // WARP))
            taken = here
            if guard is not None:
                number, wanted = guard
                taken = here[self.predicates[number, here] == wanted]
            self.address[here] = self.next.get(now, -1)
            if taken.size:
                operation(taken)

    # --- what operations use ---------------------------------------------------------------------

    def wait(self, here: Array, number: int, count: int | None, stay: bool = True) -> None:
        """Come to a barrier, and let all go on once as many as it takes have come."""
        self.arrived[number] += here.size
        if stay:
            self.state[here] = 1
            self.barrier[here] = number
        alive = int((self.state != 2).sum())
        if self.arrived[number] >= (count or alive):
            self.state[(self.state == 1) & (self.barrier == number)] = 0
            self.arrived[number] = 0

    def begin_arrivals(self, place: int, count: int) -> None:
        """Begin a barrier in shared memory."""
        self.arrivals[place] = Arrivals(count, count)

    def arrive(self, place: int, arrivals: int, bytes_expected: int) -> None:
        """Count arrivals at it, and bytes that are still to come (or, negative, have come)."""
        barrier = self.arrivals[place]
        barrier.pending -= arrivals
        barrier.bytes += bytes_expected
        if barrier.pending == 0 and barrier.bytes == 0:
            barrier.phase += 1
            barrier.pending = barrier.count
            self.state[self.state == 3] = 0  # they look again

    def wait_arrivals(self, here: Array, places: Array, odd: Array) -> None:
        """Hold threads at this instruction until the phase has ended; how often they ask in
        between depends on times, and is not counted."""
        ended = np.array([self.arrivals[int(place)].phase % 2 for place in places]) != odd
        held = here[~ended]
        self.state[held] = 3
        self.address[held] = self.now

    def touch_shared(self, here: Array, addresses: Array, size: int) -> None:
        """Count an access of `size` bytes a thread."""
        self.counts.wavefronts[self.now] += wavefronts(here, addresses, size)

    def load_shared(self, here: Array, addresses: Array, size: int) -> Array:
        """Return bytes [threads, size]."""
        self.touch_shared(here, addresses, size)
        return self.shared[addresses[:, None] + np.arange(size)]

    def store_shared(self, here: Array, addresses: Array, values: Array) -> None:
        """Store bytes [threads, size]."""
        self.touch_shared(here, addresses, values.shape[1])
        self.shared[addresses[:, None] + np.arange(values.shape[1])] = values
