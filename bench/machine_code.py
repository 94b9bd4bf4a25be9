"""What the compiler made of the CUDA kernels, from the built extension; needs no GPU.

    python bench/machine_code.py [--arch 80 90] [--all] [--json FILE]

Disassembles every architecture that the extension was built for with cuobjdump (of $CUOBJDUMP, the
CUDA toolkit, or the triton package) and prints, for each kernel: registers, shared memory, stack,
spills; and for the multiplying kernels, per warp and stage of 128 parameters: matrix instructions,
issue slots, wavefronts of shared memory, instructions of the ALU pipe per pair of entries made.

Nothing of that is read off loops by eye: the machine code is run, a block at a time, with the
arguments that the package launches it with (kernel_counts.py, sass/machine.py), and counted. From
the counts and the cycles of gpu_costs.py follow times for the shapes of the design's floor table,
each pipe as if the others were free, and for what is expected to cost no more: a batch of one row
more than a tile, and an odd `param_offset`. They are not timed.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import measure
from cuda_binary import Kernel, find_cuobjdump, read_kernels
from gpu_costs import DEVICES
from kernel_counts import Problem, add_up, count_problem, pipe_times, stage_figures
from trak_ext import _C

# Bytes of shared memory a block.
SHARED_LIMITS = {80: 163 * 1024, 90: 227 * 1024}
SHARED_LIMIT = max(SHARED_LIMITS.values())
PATHS = ["mma", "wgmma"]
PIPES = ["matrix", "issue", "alu", "imad", "shared"]
KINDS = ["rademacher", "normal"]
SHAPES = [(32, 10**7, 4096), (64, 10**8, 8192), (8, 10**9, 4096)]
# Beside the second shape, in `high`: one row more; an odd offset; the same of halves.
VARIANTS: list[dict[str, Any]] = [
    {"batch": 65},
    {"param_offset": 1},
    *({"dtype": "fp16", "param_offset": offset} for offset in (0, 1)),
    *({"dtype": "bf16", "passes": 1, "param_offset": offset} for offset in (0, 1)),
]


def by_name(kernels: list[Kernel], arch: int) -> dict[str, Kernel]:
    """Return the kernels of an architecture by their mangled names."""
    return {kernel.name: kernel for kernel in kernels if kernel.arch == arch}


def tile_key(kernel: dict[str, Any]) -> tuple[str, int, int, int]:
    """Return what Kernel.tile is for an entry of _C.cuda_kernels."""
    columns = kernel["tile_columns"] * 32 // kernel["threads"]
    return kernel["kind"], kernel["passes"], columns, kernel["tile_rows"]


def paths_of(kernels: list[Kernel], arch: int) -> list[str]:
    """Return the paths that an architecture has kernels for."""
    return [
        path for path in PATHS if any(k.tile and (k.arch, k.path) == (arch, path) for k in kernels)
    ]


def loop_report(kernels: list[Kernel], kernel: Kernel) -> dict[str, float]:
    """Return a multiplying kernel's figures for one warp and stage."""
    assert kernel.tile is not None
    kind, passes, columns, rows = kernel.tile
    # A kernel may be for small shared memory alone.
    for limit in (SHARED_LIMITS.get(kernel.arch, SHARED_LIMIT), 99 * 1024):
        entries = [
            entry
            for entry in _C.cuda_kernels(kernel.path, limit)
            if tile_key(entry) == (kind, passes, columns, rows)
        ]
        if entries:
            problem = Problem(
                kernel.arch,
                kernel.path,
                kind,
                passes,
                rows,
                2048,
                entries[0]["tile_columns"],
                shared_limit=limit,
            )
            return stage_figures(by_name(kernels, kernel.arch), kernel, problem)
    raise ValueError(f"{kernel.label} is no kernel of _C.cuda_kernels")


def times(kernels: list[Kernel], problem: Problem) -> dict[str, Any]:
    """Return a problem's milliseconds by pipe, which pipe binds, and its work by kernel."""
    named = by_name(kernels, problem.arch)
    work = count_problem(named, problem)
    milliseconds = pipe_times(add_up(work.values()), DEVICES[problem.arch])
    return {
        **dataclasses.asdict(problem),
        "device": DEVICES[problem.arch].name,
        "milliseconds": milliseconds,
        "binds": max(milliseconds, key=lambda pipe: milliseconds[pipe]),
        "work": {named[name].label: dict(counts) for name, counts in work.items()},
    }


def problems(kernels: list[Kernel], every: bool) -> list[Problem]:
    """Return what times are wanted of."""
    found = []
    for arch in sorted({kernel.arch for kernel in kernels} & set(DEVICES)):
        for path in paths_of(kernels, arch):
            limit = SHARED_LIMITS[arch]
            for kind in KINDS:
                for passes in (1, 2, 3) if every else (2,):
                    found += [
                        Problem(arch, path, kind, passes, *shape, shared_limit=limit)
                        for shape in SHAPES
                    ]
            base = Problem(arch, path, "rademacher", 2, *SHAPES[1], shared_limit=limit)
            found += [dataclasses.replace(base, **variant) for variant in VARIANTS]
    return found


def static_table(kernels: list[Kernel]) -> tuple[list[list[str]], list[dict[str, Any]]]:
    """Return the first table's rows and the same as records."""
    dynamic = {
        (path, tile_key(k)): k for path in PATHS for k in _C.cuda_kernels(path, SHARED_LIMIT)
    }
    names = ("matrix", "issue", "issue_staging", "wavefronts", "alu_per_matrix")
    names += ("loads_per_matrix", "target_alu_per_pair", "issue_per_pair")
    table, records = [], []
    for kernel in sorted(kernels, key=lambda k: (k.arch, k.label)):
        shared = kernel.shared
        loop: dict[str, float] = {}
        if kernel.tile is not None and kernel.arch in DEVICES:
            shared += dynamic[kernel.path, kernel.tile]["shared_bytes"]
            loop = loop_report(kernels, kernel)
        resources = (kernel.registers, shared, kernel.stack, kernel.spills)
        cells = [f"{loop[name]:.3g}" if loop else "" for name in names]
        table.append([f"sm_{kernel.arch} {kernel.label}", *map(str, resources), *cells])
        records.append(
            {
                "arch": kernel.arch,
                "kernel": kernel.label,
                "registers": kernel.registers,
                "shared_bytes": shared,
                "stack": kernel.stack,
                "spills": kernel.spills,
                "matrix_instructions": kernel.opcodes["HMMA"] + kernel.opcodes["HGMMA"],
                "stage": loop,
            }
        )
    return table, records


def ratios(found: list[dict[str, Any]]) -> list[list[str]]:
    """Return what a variant costs beside what it varies: issue slots, and the largest pipe."""

    def key(one: dict[str, Any], **changed: Any) -> tuple[Any, ...]:
        names = ("arch", "path", "kind", "passes", "batch", "params", "proj_dim", "dtype")
        return tuple((one | changed)[name] for name in (*names, "param_offset"))

    known = {key(one): one["milliseconds"] for one in found}
    rows = []
    for one in found:
        for name, changed in (("B = 65 / 64", {"batch": 64}), ("odd / even", {"param_offset": 0})):
            if (one["batch"] != 65 and name.startswith("B")) or key(one) == key(one, **changed):
                continue
            this, other = one["milliseconds"], known[key(one, **changed)]
            label = f"{one['device']} {one['path']} {one['dtype']} x{one['passes']} {name}"
            rows.append(
                [
                    label,
                    f"{this['issue'] / other['issue']:.2f}",
                    f"{max(this.values()) / max(other.values()):.2f}",
                ]
            )
    return rows


def main() -> None:
    """Print the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", help="architectures, such as 80 90")
    parser.add_argument("--all", action="store_true", help="times of medium and highest too")
    parser.add_argument("--json")
    options = parser.parse_args()
    cuobjdump = find_cuobjdump()
    if cuobjdump is None or not hasattr(_C, "cuda_kernels"):
        raise SystemExit("needs cuobjdump (pip install triton has one) and a build with CUDA")
    kernels = read_kernels(cuobjdump, _C.__file__)
    kernels = [k for k in kernels if not options.arch or k.arch in options.arch]
    table, records = static_table(kernels)
    measure.print_table(
        "from machine code; from `matrix` on per warp and stage of 128 parameters\n"
        "wavefronts: of shared memory, bank conflicts counted; ALU/pair: LOP3, SHF, IADD3, VIADD,\n"
        "PRMT per pair of entries made, Philox included",
        [
            *("kernel x passes [columns a warp x rows]", "regs", "shared", "stack", "spills"),
            *("matrix", "issue", "staging", "wavefronts", "ALU/matrix", "loads/matrix"),
            *("ALU/pair", "issue/pair"),
        ],
        table,
    )
    found = [times(kernels, problem) for problem in problems(kernels, options.all)]
    rows = []
    for one in found:
        of = f"{one['dtype']}{' odd' if one['param_offset'] else ''}"
        rows.append(
            [
                f"{one['device']} {one['path']} {one['kind']} x{one['passes']} {of}",
                f"({one['batch']}, {one['params']:.0e}, {one['proj_dim']})",
                *(f"{one['milliseconds'][pipe]:.1f}" for pipe in PIPES),
                one["binds"],
            ]
        )
    measure.print_table(
        "ms, from machine code, not timed: each pipe as if the others were free",
        ["kernel", "(B, P, k)", *PIPES, "binds"],
        rows,
    )
    measure.print_table(
        "one beside the other: issue slots, and the pipe that binds",
        ["kernel", "issue", "largest"],
        ratios(found),
    )
    costs = {arch: dataclasses.asdict(device) for arch, device in DEVICES.items()}
    measure.write_json(options.json, "machine_code", {"costs": costs, "times": found}, records)


if __name__ == "__main__":
    main()
