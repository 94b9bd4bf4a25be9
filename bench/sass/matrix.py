"""The matrix instructions of machine.py, by CuTe's layouts (layouts.py)."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import numpy.typing as npt

from .layouts import WARP_A, WARP_B, WARP_C, WARPGROUP_A, Descriptor, warpgroup_c
from .operands import predicate_of, register_of

Array = npt.NDArray[Any]


def from_bf16(bits: Array) -> Array:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def halves(machine: Any, place: int, registers: int, threads: Array) -> Array:
    """Return registers as bf16 numbers, [threads, 2 registers]."""
    words = np.ascontiguousarray(machine.registers[place : place + registers, threads].T)
    return from_bf16(words.view("<u2"))


def sums_of(machine: Any, text: str, registers: int, threads: Array) -> Array:
    """Return fp32 sums, [threads, registers]."""
    place = register_of(text)
    if place == 255:
        return np.zeros((threads.size, registers), dtype=np.float32)
    words = np.ascontiguousarray(machine.registers[place : place + registers, threads].T)
    return words.view(np.float32)


def multiply(op: Any, here: Array) -> None:
    """Carry out HMMA or HGMMA for whole warps or warpgroups."""
    machine = op.machine
    group = 32 if op.name == "HMMA" else 128
    for threads in here.reshape(-1, group):
        assert np.array_equal(threads, threads[0] + np.arange(group)), op.text
        if group == 32:
            m, rows, c_layout = 16, 8, WARP_C
            a = halves(machine, register_of(op.parts[1]), 4, threads)
            a_layout = WARP_A
            b = np.empty(8 * 16, dtype=np.float32)
            b[WARP_B.offsets()] = halves(machine, register_of(op.parts[2]), 2, threads)
            b = b.reshape(16, 8)  # [k, n]
            source, adds = op.parts[3], True
        else:
            found = re.search(r"64x(\d+)x16", op.text)
            assert found is not None
            m, rows = 64, int(found[1])
            a_layout, c_layout = WARPGROUP_A, warpgroup_c(rows)
            a = halves(machine, register_of(op.parts[1]), 4, threads)
            # gdesc names four registers: the first operand's descriptor and the second's.
            place = register_of(op.parts[2].removeprefix("gdesc[").rstrip("]")) + 2
            words = machine.registers[place : place + 2, threads].astype(np.uint64)
            assert (words == words[:, :1]).all(), op.text
            descriptor = Descriptor.of(int(words[0, 0]) | int(words[1, 0]) << 32)
            at = descriptor.address + descriptor.k_major(rows).offsets()
            shared = machine.shared
            b = from_bf16(shared[at].astype(np.uint16) | shared[at + 1].astype(np.uint16) << 8).T
            source, adds = op.parts[3], True
            predicates = [part for part in op.parts[4:] if "P" in part]
            if predicates:
                number, wanted = predicate_of(predicates[0])
                adds = bool((machine.predicates[number, threads] == wanted).all())
        matrix = np.empty(m * 16, dtype=np.float32)
        matrix[a_layout.offsets()] = a
        count = rows // 2
        offsets = c_layout.offsets()
        d = np.zeros(m * rows, dtype=np.float64)
        if adds:
            with np.errstate(invalid="ignore"):
                d[offsets] = sums_of(machine, source, count, threads)
        with np.errstate(invalid="ignore"):  # NaN, which a kernel may make
            d = d.reshape(rows, m) + (matrix.reshape(16, m).T.astype(np.float64) @ b).T
            result = np.ascontiguousarray(d.reshape(-1)[offsets].astype(np.float32))
        to = register_of(op.parts[0])
        machine.registers[to : to + count, threads] = result.view(np.uint32).T
