"""What instructions cost on the devices that bench/machine_code.py speaks of: one table to fill in.

Cycles of one of a multiprocessor's four sub-cores. What is measured and what is a data sheet's
figure stands beside each; numbers measured later replace these here and nowhere else.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Device:
    """A device and its cycles."""

    name: str
    multiprocessors: int
    gigahertz: float
    hmma: float  # m16n8k16 of bf16, issue to issue
    hgmma: dict[int, float]  # m64nNk16 of bf16, first operand from registers, by N
    alu: float = 2.0  # a warp's instruction of the ALU pipe: 16 lanes
    imad: float = 2.0

    def milliseconds(self, sub_core_cycles: float) -> float:
        """Return the time in which all sub-cores together have so many cycles."""
        return sub_core_cycles / (4 * self.multiprocessors * self.gigahertz * 1e6)

    def hgmma_cycles(self, columns: int) -> float:
        """Return the cycles of an HGMMA of N columns; a multiple of 8 between entries costs in
        proportion, but no less than the entry below it."""
        if columns in self.hgmma:
            return self.hgmma[columns]
        below = max(n for n in self.hgmma if n < columns)
        above = min(n for n in self.hgmma if n > columns)
        return max(self.hgmma[below], self.hgmma[above] * columns / above)


DEVICES = {
    # 312 TFLOP/s at 1.41 GHz.
    80: Device("A100", 108, 1.41, hmma=8.0, hgmma={}),
    # Measured on an H200 (a loop of independent instructions; two or more warpgroups). The warp's
    # instruction does not reach the data sheet's rate, 4 cycles. The warpgroup's does from 32
    # columns on; fewer cost as if they were 26.
    90: Device(
        "H200", 132, 1.83, hmma=6.1, hgmma={8: 13, 16: 13, 32: 16, 64: 32, 128: 64, 256: 128}
    ),
}
