"""What the compiler made of the CUDA kernels, read from the built extension; needs no GPU.

    python bench/machine_code.py [--arch 80 90] [--json FILE]

Disassembles every architecture that the extension was built for with cuobjdump (of $CUOBJDUMP, the
CUDA toolkit, or the triton package) and prints, for each kernel: registers, shared memory, stack,
spills, matrix instructions, and for the main loop of the multiplying kernels, per warp and stage of
128 parameters: issue slots, and instructions of the ALU pipe per pair of entries that were made.

The main loop is split by what its basic blocks do: those with matrix instructions, those that run
Philox, and the staging of gradients. Staging is counted on the path of fp32 in 16-byte copies,
rather too high than too low: what cannot be told apart is counted. From the counts follow times for
the shapes of the design's floor table, each pipe as if the others were free; shared memory counts
cycles of 128 bytes, what the tensor cores read of it included. They are not timed.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import re
from typing import Any

import measure
from cuda_binary import Kernel, find_cuobjdump, opcode, read_kernels
from trak_ext import _C

STAGE_PARAMS = 128
STAGES_PER_SUPERBLOCK = 4
# The four that Rademacher's target is about, and VIADD, which is sm_90's IADD3 of two.
ALU_OF_TARGET = {"LOP3", "SHF", "IADD3", "VIADD", "PRMT"}
ALU = ALU_OF_TARGET | {"LEA", "ISETP", "SEL", "FMNMX", "FSETP", "FSEL", "IABS", "VIMNMX", "IMNMX"}
LOADS = {"LDS", "LDG", "LD", "LDGSTS"}
# The warp's matrix instruction, and the warpgroup's (wgmma), of which a warp has a quarter.
MATRIX = {"HMMA", "HGMMA"}

# Multiprocessors, GHz, and cycles of one of a multiprocessor's four schedulers: a bf16 product of
# 16 x 8 x 16 at the data sheet's rate (which sm_90 reaches only through wgmma), an ALU instruction,
# an integer multiply-add.
DEVICES = {80: ("A100", 108, 1.41, 8, 2, 2), 90: ("H200", 132, 1.83, 4, 2, 2)}
# Bytes of shared memory a block.
SHARED_LIMITS = {80: 163 * 1024, 90: 227 * 1024}
SHARED_LIMIT = max(SHARED_LIMITS.values())
PATHS = ["mma", "wgmma"]
PIPES = ["matrix", "issue", "alu", "imad", "shared"]
SHAPES = [(32, 10**7, 4096), (64, 10**8, 8192), (8, 10**9, 4096)]


@dataclasses.dataclass
class Block:
    """A basic block and how often a stage runs it."""

    opcodes: collections.Counter[str]
    role: str  # "multiply", "generate" or "staging"
    runs: float
    falls_through: bool
    shared_cycles: float  # of the multiprocessor's shared memory, a run


def branch_target(text: str) -> int | None:
    found = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
    return int(found[1], 16) if found else None


def shared_cycles(text: str, rows: int) -> float:
    """Return cycles of 128 bytes that an instruction of a warp takes of shared memory."""
    name = opcode(text)
    if name == "HGMMA":  # four warps read 16 x rows bf16 numbers together
        return rows * 16 * 2 / 128 / 4
    if name not in {"LDS", "STS", "LDGSTS"}:
        return 0
    return 4 if ".128" in text else 2 if ".64" in text else 1


def turns(kernel: Kernel, loop: list[str], staging: bool) -> float:
    """Return how often a stage runs the body of a loop inside the main loop."""
    inside = [opcode(text) for text in loop]
    copies_16 = any("LDGSTS" in text and ".128" in text for text in loop)
    makes_operand_of_fp32 = "STS" in inside and any("LDS.128" in text for text in loop)
    assert kernel.tile is not None
    _, passes, _, rows = kernel.tile
    matrix = sum(name in MATRIX for name in inside)
    if matrix and kernel.path == "mma":
        return STAGE_PARAMS // 16  # a step a turn
    if matrix and "STS" in inside:
        return 1  # the two turns of a warpgroup, each of which runs a part of the body
    if matrix:
        return STAGE_PARAMS // 16 * passes / matrix
    if copies_16:
        copies = sum("LDGSTS" in text for text in loop)  # of 4 elements, a turn
        return max(1, rows * STAGE_PARAMS // 4 // 256) / copies
    if kernel.path == "wgmma" and makes_operand_of_fp32:
        return min(1.0, rows / 16)  # a unit a thread, see SharedOperand
    return 0 if staging else 1


def main_loop(kernel: Kernel) -> list[Block]:
    """Return the blocks of the largest loop with matrix instructions in it."""
    assert kernel.tile is not None
    _, _, _, rows = kernel.tile
    loops = []
    for address, text in kernel.code:
        target = branch_target(text)
        if target is not None and target < address:
            inside = [t for a, t in kernel.code if target <= a <= address]
            loops.append((target, address, inside))
    with_matrix = [loop for loop in loops if MATRIX & set(map(opcode, loop[2]))]
    begin, end, _ = max(with_matrix, key=lambda loop: loop[1] - loop[0])
    code = [(a, t) for a, t in kernel.code if begin <= a <= end]
    targets = {branch_target(text) for _, text in kernel.code}
    blocks: list[list[tuple[int, str]]] = [[]]
    for address, text in code:
        if blocks[-1] and address in targets:
            blocks.append([])
        blocks[-1].append((address, text))
        if opcode(text) == "BRA":
            blocks.append([])
    result: list[Block] = []
    for block in blocks:
        if not block:
            continue
        opcodes = collections.Counter(opcode(text) for _, text in block)
        wide = sum("IMAD.WIDE.U32" in text for _, text in block)
        role, runs = "staging", 1.0
        if opcodes["HMMA"] or opcodes["HGMMA"] or opcodes["WARPGROUP"]:
            role = "multiply"
        elif wide >= 16:
            role, runs = "generate", 1 / STAGES_PER_SUPERBLOCK
        elif opcodes["HADD2"] or opcodes["F2F"] or opcodes["LD"] or opcodes["LDG"]:
            runs = 0  # other dtypes, and elements one by one
        for low, high, inside in loops:
            if (low, high) == (begin, end) or not low <= block[0][0] <= high:
                continue
            runs *= turns(kernel, inside, role == "staging")
        falls_through = opcode(block[-1][1]) != "BRA"
        cycles = sum(shared_cycles(text, rows) for _, text in block)
        result.append(Block(opcodes, role, runs, falls_through, cycles))
    # What leads only to a path not taken is not taken either.
    for block, following in zip(result[-2::-1], result[:0:-1], strict=True):
        if block.role == "staging" and block.falls_through and following.runs == 0:
            block.runs = 0
    return result


def count(blocks: list[Block], names: set[str] | None, roles: set[str]) -> float:
    """Return executions a stage of the named opcodes (None: all) in blocks of these roles."""
    return sum(
        block.runs * number
        for block in blocks
        if block.role in roles
        for name, number in block.opcodes.items()
        if names is None or name in names
    )


MAKING = {"multiply", "generate"}
ALL = MAKING | {"staging"}


def loop_report(kernel: Kernel) -> dict[str, float]:
    """Return the main loop's figures for one warp and stage."""
    assert kernel.tile is not None
    _, _, columns, _ = kernel.tile
    blocks = main_loop(kernel)
    pairs = columns * STAGE_PARAMS / 2 / 32  # of entries, a thread
    matrix = count(blocks, MATRIX, ALL)
    return {
        "matrix": matrix,
        "shared_cycles": sum(block.runs * block.shared_cycles for block in blocks),
        "issue": count(blocks, None, ALL),
        "issue_staging": count(blocks, None, {"staging"}),
        "alu": count(blocks, ALU, ALL),
        "imad": count(blocks, {"IMAD"}, ALL),
        "loads": count(blocks, LOADS, ALL),
        "loads_per_matrix": count(blocks, LOADS, MAKING) / matrix,
        "alu_per_matrix": count(blocks, ALU, ALL) / matrix,
        "target_alu_per_pair": count(blocks, ALU_OF_TARGET, MAKING) / pairs,
        "target_alu_per_pair_with_staging": count(blocks, ALU_OF_TARGET, ALL) / pairs,
        "issue_per_pair": count(blocks, None, ALL) / pairs,
    }


def bound_times(kernel: Kernel, shape: tuple[int, int, int]) -> dict[str, float]:
    """Return milliseconds for a shape, pipe by pipe, by instruction counts alone."""
    assert kernel.tile is not None
    _, _, columns, rows = kernel.tile
    _, multiprocessors, gigahertz, matrix_cycles, alu_cycles, imad_cycles = DEVICES[kernel.arch]
    if kernel.path == "wgmma":
        matrix_cycles *= rows // 8
    batch, params, proj_dim = shape
    report = loop_report(kernel)
    warp_stages = -(-params // STAGE_PARAMS) * -(-proj_dim // columns) * -(-batch // rows)
    unit = warp_stages / (4 * multiprocessors * gigahertz * 1e9) * 1e3
    return {
        "matrix": unit * report["matrix"] * matrix_cycles,
        "issue": unit * report["issue"],
        "alu": unit * report["alu"] * alu_cycles,
        "imad": unit * report["imad"] * imad_cycles,
        "shared": 4 * unit * report["shared_cycles"],
    }


def tile_key(kernel: dict[str, Any]) -> tuple[str, int, int, int]:
    """Return what Kernel.tile is for an entry of _C.cuda_kernels."""
    columns = kernel["tile_columns"] * 32 // kernel["threads"]
    return kernel["kind"], kernel["passes"], columns, kernel["tile_rows"]


def default_path(arch: int) -> str:
    """Return the path that devices of an architecture take unless told otherwise."""
    return "wgmma" if arch == 90 else "mma"


def kernel_for(
    kernels: list[Kernel], arch: int, kind: str, passes: int, batch: int, path: str | None = None
) -> Kernel:
    """Return the kernel that a batch gets: the smallest tile that holds it, else the largest."""
    path = path or default_path(arch)
    tiles = {k.tile: k for k in kernels if k.arch == arch and k.path == path}
    keys = [tile_key(k) for k in _C.cuda_kernels(path, SHARED_LIMITS[arch])]
    keys = sorted((key for key in keys if key[:2] == (kind, passes)), key=lambda key: key[3])
    return tiles[next((key for key in keys if key[3] >= batch), keys[-1])]


def main() -> None:
    """Print the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", help="architectures, such as 80 90")
    parser.add_argument("--json")
    options = parser.parse_args()
    cuobjdump = find_cuobjdump()
    if cuobjdump is None or not hasattr(_C, "cuda_kernels"):
        raise SystemExit("needs cuobjdump (pip install triton has one) and a build with CUDA")
    kernels = read_kernels(cuobjdump, _C.__file__)
    kernels = [k for k in kernels if not options.arch or k.arch in options.arch]
    dynamic = {
        (path, tile_key(k)): k for path in PATHS for k in _C.cuda_kernels(path, SHARED_LIMIT)
    }
    table, records = [], []
    for kernel in sorted(kernels, key=lambda k: (k.arch, k.label)):
        shared = kernel.shared
        loop: dict[str, float] = {}
        if kernel.tile is not None and kernel.arch >= 80:
            shared += dynamic[kernel.path, kernel.tile]["shared_bytes"]
            loop = loop_report(kernel)
        names = ("matrix", "issue", "issue_staging", "alu_per_matrix", "loads_per_matrix")
        names += ("target_alu_per_pair", "target_alu_per_pair_with_staging", "issue_per_pair")
        table.append(
            [
                f"sm_{kernel.arch} {kernel.label}",
                str(kernel.registers),
                str(shared),
                str(kernel.stack),
                str(kernel.spills),
                *(f"{loop[name]:.3g}" if loop else "" for name in names),
            ]
        )
        records.append(
            {
                "arch": kernel.arch,
                "kernel": kernel.label,
                "registers": kernel.registers,
                "shared_bytes": shared,
                "stack": kernel.stack,
                "spills": kernel.spills,
                "matrix_instructions": kernel.opcodes["HMMA"] + kernel.opcodes["HGMMA"],
                "main_loop": loop,
            }
        )
    header = ["kernel x passes [columns a warp x rows]", "regs", "shared", "stack", "spills"]
    header += [
        "matrix",
        "issue",
        "staging",
        "ALU/matrix",
        "loads/matrix",
        "ALU/pair",
        "all",
        "issue/pair",
    ]
    measure.print_table(
        "from machine code; per warp and stage of 128 parameters\n"
        "ALU/pair: LOP3, SHF, IADD3, VIADD, PRMT per pair of entries made, Philox included; "
        "all: with staging",
        header,
        table,
    )
    times, bounds = [], []
    paths = [
        (arch, default_path(arch)) for arch in sorted({k.arch for k in kernels} & set(DEVICES))
    ]
    paths += [(arch, "mma") for arch, path in paths if path != "mma"]
    for arch, path in paths:
        for shape in SHAPES:
            batch, params, proj_dim = shape
            for kind in ("rademacher", "normal"):
                for passes in (1, 2, 3):
                    kernel = kernel_for(kernels, arch, kind, passes, batch, path)
                    bound = bound_times(kernel, shape)
                    name = f"{DEVICES[arch][0]} {path} {kind} x{passes}"
                    times.append(
                        [
                            name,
                            f"({batch}, {params:.0e}, {proj_dim})",
                            *(f"{bound[pipe]:.1f}" for pipe in PIPES),
                            max(bound, key=lambda pipe: bound[pipe]),
                        ]
                    )
                    bounds.append({"kernel": name, "shape": shape, "milliseconds": bound})
    measure.print_table(
        "ms, from machine code, not timed: each pipe as if the others were free",
        ["kernel", "(B, P, k)", *PIPES, "largest"],
        times,
    )
    measure.write_json(options.json, "machine_code", {"bounds": bounds}, records)


if __name__ == "__main__":
    main()
