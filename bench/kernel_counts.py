"""What a projection's kernels do, counted by running their machine code (sass/machine.py).

The launches are those that the package makes for a problem: the host build (host_build.py) notes
them instead of running them. So whatever kernels there are, with whatever tiles, are counted. A
problem of 10^9 parameters is counted by two of one chunk, of two and of four superblocks (512
parameters), and by the launches of the whole. Blocks of a launch do the same but for rows that are
not there: where the batch fills its tiles the first block stands for all, else a few do.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
from typing import Any

import numpy as np
import numpy.typing as npt

from cuda_binary import Kernel, branch_target, opcode
from gpu_costs import Device
from host_build import library
from sass.machine import Machine, Memory
from sass.matrix import multiply
from trak_ext.reference import NORMAL_TABLE

Array = npt.NDArray[Any]
SUPERBLOCK = 512
PRECISIONS = {1: "medium", 2: "high", 3: "highest"}
PATHS = {"mma": "", "wgmma": "warpgroup "}
DTYPES = {"fp64": 0, "fp32": 1, "fp16": 2, "bf16": 3}
WORKSPACE_BYTES = 2**28
# Made-up addresses, far apart. The kernels' own table is the one thing bank 4 leads to.
GRADIENTS, OUT, WORKSPACE, TABLE = (i << 44 for i in (1, 2, 3, 4))

# The four that Rademacher's target is about, and VIADD, which is sm_90's IADD3 of two.
ALU_OF_TARGET = {"LOP3", "SHF", "IADD3", "VIADD", "PRMT"}
ALU = ALU_OF_TARGET | {"LEA", "ISETP", "SEL", "FMNMX", "FSETP", "FSEL", "IABS", "VIMNMX", "IMNMX"}
LOADS = {"LDS", "LDSM", "LDG", "LD", "LDGSTS"}
MATRIX = {"HMMA", "HGMMA"}
Work = collections.Counter  # of warps' instructions, by what they are


@dataclasses.dataclass(frozen=True)
class Problem:
    """A projection on a path of an architecture."""

    arch: int
    path: str
    kind: str
    passes: int
    batch: int
    params: int
    proj_dim: int
    dtype: str = "fp32"
    param_offset: int = 0
    shared_limit: int = 227 * 1024


@functools.lru_cache(maxsize=1)
def host_library() -> Any:
    """Build the kernels for the host, to note their launches."""
    return library.HostLibrary()


def row_stride(params: int) -> int:
    """Return elements from row to row: rows start at multiples of 16 bytes, whatever the dtype."""
    return -(-params // 8) * 8


def launches_of(
    problem: Problem, params: int | None = None, workspace_bytes: int = WORKSPACE_BYTES
) -> list[Any]:
    """Return the launches of a problem, or of one with other parameters."""
    params = problem.params if params is None else params
    gradient = library.Gradient(
        GRADIENTS, DTYPES[problem.dtype], params, row_stride(params), 1, problem.param_offset
    )
    return host_library().launches(
        gradient,
        problem.batch,
        problem.proj_dim,
        precision=PATHS[problem.path] + PRECISIONS[problem.passes],
        out=OUT,
        workspace=WORKSPACE,
        workspace_bytes=workspace_bytes,
        shared_limit=problem.shared_limit,
        kind=problem.kind,
    )


def machine_of(kernel: Kernel, launch: Any, block: int, memory: Memory, **rest: Any) -> Machine:
    """Return a block of a launch, ready to run."""
    if not any(address == TABLE for address, _ in memory.ranges):
        memory.add(TABLE, np.asarray(NORMAL_TABLE, dtype=np.float32))
    return Machine(
        kernel.code,
        kernel.arch,
        arguments=launch.argument,
        block=block,
        threads=launch.threads,
        shared_bytes=launch.shared_bytes + kernel.shared,
        memory=memory,
        constants={4: TABLE.to_bytes(8, "little") * 64},
        **rest,
    )


def run_problem(kernels: dict[str, Kernel], problem: Problem, grads: Array) -> Array:
    """Return [batch, proj_dim] as the machine code makes it of gradients [batch, params].

    `grads` has the problem's dtype, bf16 as integers of 16 bits.
    """
    workspace_bytes = 2**22
    padded = np.zeros((problem.batch, row_stride(problem.params)), dtype=grads.dtype)
    padded[:, : problem.params] = grads
    out = np.zeros((problem.batch, problem.proj_dim), dtype=np.float32)
    memory = Memory()
    memory.add(GRADIENTS, padded)
    memory.add(OUT, out)
    memory.add(WORKSPACE, np.full(workspace_bytes, 0xFF, dtype=np.uint8))  # NaN
    for launch in launches_of(problem, workspace_bytes=workspace_bytes):
        for block in range(launch.blocks):
            machine_of(kernels[launch.kernel], launch, block, memory, multiply=multiply).run()
    return out


@functools.cache
def _roles(name: str, code: tuple[tuple[int, str], ...]) -> dict[int, str]:
    targets = {branch_target(text) for _, text in code}
    blocks: list[list[tuple[int, str]]] = [[]]
    for address, text in code:
        if blocks[-1] and address in targets:
            blocks.append([])
        blocks[-1].append((address, text))
        if opcode(text) in ("BRA", "EXIT", "RET"):
            blocks.append([])
    roles = {}
    for block in blocks:
        names = {opcode(text) for _, text in block}
        role = "staging"
        if names & (MATRIX | {"WARPGROUP"}):
            role = "multiply"
        elif sum("IMAD.WIDE.U32" in text for _, text in block) >= 16:
            role = "generate"
        roles |= {address: role for address, _ in block}
    return roles


def roles_of(kernel: Kernel) -> dict[int, str]:
    """Return what each instruction's basic block is for: multiply, generate (Philox) or staging."""
    return _roles(kernel.name, tuple(kernel.code))


def count_block(kernel: Kernel, launch: Any, block: int) -> Work[str]:
    """Return what a block's warps issue; `wavefronts` are shared memory's, by addresses."""
    counts = machine_of(kernel, launch, block, Memory()).run()
    roles, text_of = roles_of(kernel), dict(kernel.code)
    work: Work[str] = Work()
    for address, number in counts.issued.items():
        text = text_of[address]
        name = opcode(text)
        staging = roles[address] == "staging"
        work["issue"] += number
        work["issue_staging"] += number * staging
        work["alu"] += number * (name in ALU)
        work["imad"] += number * (name == "IMAD")
        work["loads"] += number * (name in LOADS)
        work["loads_making"] += number * (name in LOADS and not staging)
        work["target_alu"] += number * (name in ALU_OF_TARGET)
        work["target_alu_making"] += number * (name in ALU_OF_TARGET and not staging)
        work["matrix"] += number * (name in MATRIX)
        if found := re.search(r"HGMMA\.64x(\d+)x16", text):
            work[f"hgmma {found[1]}"] += number
        elif name == "HMMA":
            work["hmma"] += number
        # Behind a copy the compiler puts loads that no thread takes.
        if name in ("LDS", "STS", "LDGSTS", "LDSM") and not text.startswith("@!PT"):
            width = 4 if re.search(r"\.(128|M88\.4)", text) else 2 if ".64" in text else 1
            width = 2 if ".M88.2" in text else width
            work["wavefronts_at_best"] += number * width
        elif name == "UBLKCP":  # of any size, without conflicts
            work["wavefronts_at_best"] += counts.wavefronts[address]
    work["wavefronts"] = sum(counts.wavefronts.values())
    return work


def count_launches(
    kernels: dict[str, Kernel], launches: list[Any], samples: int = 1
) -> dict[str, tuple[int, Work]]:
    """Return blocks and work by kernel, from some blocks of each launch."""
    result: dict[str, tuple[int, Work[str]]] = {}
    for launch in launches:
        blocks, total = result.get(launch.kernel, (0, Work()))
        sample = sorted({(2 * i + 1) * launch.blocks // (2 * samples) for i in range(samples)})
        for block in sample:
            work = count_block(kernels[launch.kernel], launch, block)
            for name, number in work.items():
                total[name] += number * launch.blocks / len(sample)
        result[launch.kernel] = (blocks + launch.blocks, total)
    return result


def count_problem(kernels: dict[str, Kernel], problem: Problem) -> dict[str, Work[str]]:
    """Return the work of a whole problem by kernel; `kernels` are its architecture's, by name."""
    superblocks = -(-(problem.params + problem.param_offset % SUPERBLOCK) // SUPERBLOCK)
    head = problem.param_offset % SUPERBLOCK
    samples = 1 if problem.batch.bit_count() == 1 else 6
    short, long = (
        count_launches(kernels, launches_of(problem, number * SUPERBLOCK - head), samples)
        for number in (2, 4)
    )
    blocks: collections.Counter[str] = collections.Counter()
    for launch in launches_of(problem):
        blocks[launch.kernel] += launch.blocks
    result = {}
    for name, number in blocks.items():
        (blocks_of_short, few), (blocks_of_long, many) = short[name], long[name]
        work: Work[str] = Work()
        for what in many:
            if blocks_of_long > blocks_of_short:  # a block has so many parameters
                work[what] = many[what] * number / blocks_of_long
                continue
            a_superblock = (many[what] - few[what]) / 2
            a_chunk = few[what] - 2 * a_superblock
            work[what] = a_superblock * superblocks + a_chunk * number / blocks_of_short
        result[name] = work
    return result


def add_up(works: Any) -> Work[str]:
    """Return the sum of several kernels' work."""
    total: Work[str] = Work()
    for work in works:
        for name, number in work.items():
            total[name] += number
    return total


def pipe_times(work: Work[str], device: Device) -> dict[str, float]:
    """Return milliseconds that each pipe needs, as if the others were free."""
    matrix = work["hmma"] * device.hmma
    # A warpgroup's instruction reads [N, 16] bf16 numbers for four warps; 128 bytes a cycle.
    read = 0.0
    for name, number in work.items():
        if name.startswith("hgmma"):
            columns = int(name.split()[1])
            matrix += number * device.hgmma_cycles(columns)
            read += number / 4 * columns * 16 * 2 / 128
    return {
        "matrix": device.milliseconds(matrix),
        "issue": device.milliseconds(work["issue"]),
        "alu": device.milliseconds(work["alu"] * device.alu),
        "imad": device.milliseconds(work["imad"] * device.imad),
        "shared": device.milliseconds(4 * (work["wavefronts"] + read)),
    }


def stage_figures(kernels: dict[str, Kernel], kernel: Kernel, problem: Problem) -> dict[str, float]:
    """Return a multiplying kernel's figures for one warp and stage of 128 parameters."""
    assert kernel.tile is not None
    found = []
    for superblocks in (2, 4):
        launches = [
            launch
            for launch in launches_of(problem, superblocks * SUPERBLOCK)
            if launch.kernel == kernel.name
        ]
        assert launches, f"{kernel.label} is not launched for {problem}"
        found.append(count_launches(kernels, launches[:1])[kernel.name])
    (blocks, few), (_, many) = found
    warps = launches[0].threads // 32
    stages = 2 * 4
    # What a kernel does not have is 0 of a Counter.
    slope = Work({name: (many[name] - few[name]) / (blocks * warps * stages) for name in many})
    _, _, columns, _ = kernel.tile
    pairs = columns * 128 / 2 / 32  # of entries, a thread
    return {
        "matrix": slope["matrix"],
        "issue": slope["issue"],
        "issue_staging": slope["issue_staging"],
        "alu": slope["alu"],
        "imad": slope["imad"],
        "loads": slope["loads"],
        "wavefronts": slope["wavefronts"],
        "wavefronts_at_best": slope["wavefronts_at_best"],
        "loads_per_matrix": slope["loads_making"] / slope["matrix"],
        "alu_per_matrix": slope["alu"] / slope["matrix"],
        "target_alu_per_pair": slope["target_alu_making"] / pairs,
        "target_alu_per_pair_with_staging": slope["target_alu"] / pairs,
        "issue_per_pair": slope["issue"] / pairs,
    }
