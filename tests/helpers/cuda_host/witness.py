"""What the matrix instructions of kernels run on the host were given, read by CuTe's layouts."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

from sass.layouts import (
    WARP_A,
    WARP_B,
    WARP_C,
    WARPGROUP_A,
    Array,
    Descriptor,
    Layout,
    warpgroup_c,
)


class Shown(ctypes.Structure):
    """MatrixInstruction of runner.h."""

    _fields_ = [
        ("block", ctypes.c_int64),
        ("threads", ctypes.c_int),
        ("rows", ctypes.c_int),
        ("sums", ctypes.c_int),
        ("add", ctypes.c_int),
        ("a", ctypes.POINTER(ctypes.c_uint32)),
        ("b", ctypes.POINTER(ctypes.c_uint32)),
        ("before", ctypes.POINTER(ctypes.c_float)),
        ("after", ctypes.POINTER(ctypes.c_float)),
        ("operand", ctypes.c_uint64),
        ("shared", ctypes.POINTER(ctypes.c_uint8)),
        ("shared_bytes", ctypes.c_int64),
        ("shared_base", ctypes.c_uint64),
    ]


CALLBACK = ctypes.CFUNCTYPE(None, ctypes.POINTER(Shown))


class Library(Protocol):
    """A host build of kernels."""

    def show_to(self, witness: Any) -> None:
        """Show every matrix instruction to a callback, or to nobody (None)."""


@dataclasses.dataclass
class Instruction:
    """after = before + a b^T, as matrices of fp64."""

    a: Array  # [16 or 64, 16]
    b: Array  # [rows, 16]
    before: Array  # [16 or 64, rows]
    after: Array

    def check_sums(self) -> None:
        """Compare the sums with the product; the instruction cuts them to fp32, towards zero."""
        exact = self.before + self.a @ self.b.T
        size = np.abs(self.before) + np.abs(self.a) @ np.abs(self.b.T)
        wrong = np.argwhere(np.abs(self.after - exact) > size * 2.0**-23)
        assert wrong.size == 0, f"sums at {wrong[:4].tolist()} are not before + a b^T"


def from_bf16(bits: Array) -> Array:
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def as_matrix(layout: Layout, values: Array, rows: int) -> Array:
    """Return the matrix whose elements are `values` [threads, values a thread]."""
    offsets = layout.offsets()
    assert offsets.shape == values.shape, (offsets.shape, values.shape)
    assert np.array_equal(np.sort(offsets, axis=None), np.arange(offsets.size))
    matrix = np.empty(offsets.size)
    matrix[offsets] = values
    return matrix.reshape(-1, rows).T


def read(shown: Shown) -> Instruction:
    """Return the instruction's matrices."""
    warpgroup = shown.threads == 128
    m = 64 if warpgroup else 16

    def halves(pointer: Any, registers: int) -> Array:
        words = np.ctypeslib.as_array(pointer, (shown.threads, registers))
        return from_bf16(words.view("<u2"))

    def sums(pointer: Any) -> Array:
        values = np.ctypeslib.as_array(pointer, (shown.threads, shown.sums)).astype(np.float64)
        return as_matrix(warpgroup_c(shown.rows) if warpgroup else WARP_C, values, m)

    a = as_matrix(WARPGROUP_A if warpgroup else WARP_A, halves(shown.a, 4), m)
    if warpgroup:
        descriptor = Descriptor.of(shown.operand)
        at = descriptor.address - shown.shared_base + descriptor.k_major(shown.rows).offsets()
        assert 0 <= at.min() <= at.max() <= shown.shared_bytes - 2, "past the shared memory"
        shared = np.ctypeslib.as_array(shown.shared, (shown.shared_bytes,))
        b = from_bf16(shared[at].astype(np.uint16) | shared[at + 1].astype(np.uint16) << 8)
    else:
        b = as_matrix(WARP_B, halves(shown.b, 2), shown.rows)
    before = sums(shown.before) if shown.add else np.zeros((m, shown.rows))
    return Instruction(a, b, before, sums(shown.after))


@contextlib.contextmanager
def watch(library: Library) -> Iterator[list[Instruction]]:
    """Collect every matrix instruction that runs meanwhile, and check what it did to its sums."""
    seen: list[Instruction] = []
    faults: list[Exception] = []

    def see(shown: Any) -> None:
        try:
            seen.append(read(shown.contents))
            seen[-1].check_sums()
        except Exception as fault:  # would be lost in the C++ that calls
            faults.append(fault)

    callback = CALLBACK(see)
    library.show_to(callback)
    try:
        yield seen
    finally:
        library.show_to(None)
    if faults:
        raise faults[0]
