"""Kernels in a binary, disassembled by cuobjdump: names, resources and instructions."""

from __future__ import annotations

import collections
import dataclasses
import functools
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

# The tiles of the kernels that multiply, and what their template arguments after the class that
# makes entries are, in order, as far as it is wanted here.
TILES = {
    "TileShape": ("passes", "column_tiles", "row_tiles"),
    "WarpgroupTile": ("passes", "warpgroups", "column_tiles", "rows"),
}
# As a name is mangled: the class that makes entries, and numbers after it.
ENTRIES = r"INS\d*_\d+(Rademacher|Normal)EntriesE((?:Li\d+E)+)"


@dataclasses.dataclass
class Kernel:
    """One kernel of one architecture."""

    arch: int
    name: str
    registers: int
    stack: int
    local: int
    shared: int  # static
    code: list[tuple[int, str]] = dataclasses.field(default_factory=list)

    @functools.cached_property
    def opcodes(self) -> collections.Counter[str]:
        """Return how often each instruction occurs."""
        return collections.Counter(opcode(text) for _, text in self.code)

    @property
    def spills(self) -> int:
        """Return the number of instructions that touch local memory."""
        return self.opcodes["LDL"] + self.opcodes["STL"]

    @functools.cached_property
    def tile(self) -> tuple[str, int, int, int] | None:
        """Return (kind, passes, columns a warp, rows) of a multiplying kernel, else None.

        The warpgroup's kernels are there for every architecture, and all but sm_90a's are a trap.
        """
        found = re.search(rf"\d({'|'.join(TILES)}){ENTRIES}", self.name)
        if found is None or (self.path == "wgmma" and not self.opcodes["HGMMA"]):
            return None
        numbers = map(int, re.findall(r"Li(\d+)E", found[3]))
        argument = dict(zip(TILES[found[1]], numbers, strict=False))
        rows = argument["rows"] if "rows" in argument else 8 * argument["row_tiles"]
        return found[2].lower(), argument["passes"], 16 * argument["column_tiles"], rows

    @property
    def path(self) -> str:
        """Return the path that the kernel belongs to, as TRAK_EXT_CUDA_PATH names it."""
        return "wgmma" if re.search(r"Warpgroup(Scoring)?Tile", self.name) else "mma"

    @property
    def scoring_tile(self) -> tuple[str, int, int] | None:
        """Return (feature dtype, parts of the targets, targets) of a scoring kernel, else None.

        As with `tile`, what is a trap is none.
        """
        found = re.search(r"ScoringTileILNS_5DTypeE(\d)ELi(\d+)ELi(\d+)E", self.name)
        if found is None or (self.path == "wgmma" and not self.opcodes["HGMMA"]):
            return None
        targets = int(found[3]) * (1 if self.path == "wgmma" else 8)
        return ("fp64", "fp32", "fp16", "bf16")[int(found[1])], int(found[2]), targets

    @property
    def label(self) -> str:
        """Return the name for the table."""
        if self.scoring_tile is not None:
            dtype, parts, targets = self.scoring_tile
            return f"{self.path} scoring {dtype} x{parts} [{targets} targets]"
        if self.tile is None:
            found = re.search(r"\d([a-z_]+_kernel)(ILNS_4KindE(\d))?", self.name)
            if found is None:
                return self.name
            if entries := re.search(rf"_kernel{ENTRIES}", self.name):  # split_gradients_kernel
                return f"{found[1]} {entries[1].lower()} x{entries[2][2:-1]}"
            return found[1] + {None: "", "0": " rademacher", "1": " normal"}[found[3]]
        kind, passes, columns, rows = self.tile
        return f"{self.path} {kind} x{passes} [{columns} x {rows}]"


def find_cuobjdump() -> str | None:
    """Return a disassembler's path, or None."""
    candidates = [os.environ.get("CUOBJDUMP"), shutil.which("cuobjdump")]
    for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda"):
        candidates.append(home and f"{home}/bin/cuobjdump")
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        candidates.append(str(Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"))
    return next((path for path in candidates if path and os.access(path, os.X_OK)), None)


def opcode(text: str) -> str:
    """Return an instruction's name without guard and modifiers."""
    return re.sub(r"^@!?U?P\w+ ", "", text).split()[0].split(".")[0]


def branch_target(text: str) -> int | None:
    """Return the address that a branch leads to, or None for another instruction."""
    found = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
    return int(found[1], 16) if found else None


def read_kernels(cuobjdump: str, binary: str) -> list[Kernel]:
    """Return the kernels of all architectures in a binary."""

    def output(option: str) -> list[str]:
        command = [cuobjdump, option, binary]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split(
            "\n"
        )

    kernels: dict[tuple[int, str], Kernel] = {}
    arch, name = 0, ""
    for line in output("-res-usage"):
        if found := re.match(r"arch = sm_(\d+)", line):
            arch = int(found[1])
        elif found := re.match(r"\s*Function (\w+):", line):
            name = found[1]
        elif found := re.match(r"\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, shared, local = map(int, found.groups())
            kernels[arch, name] = Kernel(arch, name, registers, stack, local, shared)
    current = None
    for line in output("-sass"):
        if found := re.match(r"arch = sm_(\d+)", line):
            arch, current = int(found[1]), None
        elif found := re.match(r"\s*Function : (\w+)", line):
            current = kernels.get((arch, found[1]))
        elif current is not None and (
            found := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?) *;", line)
        ):
            current.code.append((int(found[1], 16), found[2]))
    return list(kernels.values())
