"""Which thread holds what of a matrix instruction, as CuTe's layout algebra states it.

Shares nothing with the kernels, nor with the runner that plays them: the figures are CuTe's
(mma_traits_sm80.hpp, mma_traits_sm90_gmma.hpp, mma_sm90_desc.hpp), written down again.

A layout is a shape with a stride for each of its extents. A coordinate's offset is the sum of its
parts times their strides; within a mode the first part runs fastest. A matrix [rows, columns] is
numbered row + rows * column. Thread-value layouts map (thread, value of the thread) to that number;
values of 16 bits fill registers two at a time, the earlier one in the lower half.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Two modes, each a list of extents with their strides."""

    shape: tuple[tuple[int, ...], tuple[int, ...]]
    stride: tuple[tuple[int, ...], tuple[int, ...]]

    def offsets(self) -> Array:
        """Return the offset of every coordinate, [size of mode 0, size of mode 1]."""
        modes = []
        for extents, strides in zip(self.shape, self.stride, strict=True):
            mode = np.zeros(1, dtype=np.int64)
            for extent, stride in zip(extents, strides, strict=True):
                mode = (np.arange(extent)[:, None] * stride + mode).reshape(-1)
            modes.append(mode)
        return modes[0][:, None] + modes[1]


# A warp's instruction, m16n8k16: 4 x 8 threads. A [m, k], B [n, k], C [m, n].
WARP_A = Layout(((4, 8), (2, 2, 2)), ((32, 1), (16, 8, 128)))
WARP_B = Layout(((4, 8), (2, 2)), ((16, 1), (8, 64)))
WARP_C = Layout(((4, 8), (2, 2)), ((32, 1), (16, 8)))


def warpgroup_c(rows: int) -> Layout:
    """Return the layout of C [64, rows] of a warpgroup's instruction: 4 x 8 threads x 4 warps."""
    return Layout(((4, 8, 4), (2, 2, rows // 8)), ((128, 1, 16), (64, 8, 512)))


# Its A [64, 16] from registers is laid out as a C of 16 columns would be.
WARPGROUP_A = warpgroup_c(16)


@dataclasses.dataclass(frozen=True)
class Descriptor:
    """A shared-memory matrix descriptor. Bytes; the fields leave out the low four bits."""

    address: int  # bits 0 to 13
    leading: int  # bits 16 to 29
    stride: int  # bits 32 to 45

    @classmethod
    def of(cls, bits: int) -> Descriptor:
        """Read a descriptor; swizzling (62, 63), base offset (49 to 51) and the rest must be 0."""
        address, leading, stride = ((bits >> at & 0x3FFF) << 4 for at in (0, 16, 32))
        descriptor = cls(address, leading, stride)
        assert descriptor.bits() == bits, f"descriptor {bits:#018x} has other bits set"
        return descriptor

    def bits(self) -> int:
        """Return the 64 bits."""
        return self.address >> 4 | self.leading >> 4 << 16 | self.stride >> 4 << 32

    def k_major(self, rows: int) -> Layout:
        """Return bytes from the address of B [rows, 16] of 2-byte elements, k running along memory.

        The canonical layout without swizzling: 8 rows of 16 bytes are a core matrix; the leading
        offset leads to the other half of k, the stride offset to the next 8 rows.
        """
        return Layout(((8, rows // 8), (8, 2)), ((16, self.stride), (2, self.leading)))
