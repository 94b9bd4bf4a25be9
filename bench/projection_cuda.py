"""Projection on a CUDA device, against its measured ceilings, matrix products and peers.

Run as `python bench/projection.py --device cuda`; `--device rehearsal` goes through the same on
the CPU with small problems. Times are medians between CUDA events on the current stream. The
ceilings are measured in the same run: a large bf16 product and a large copy. The floor of a
projection is the larger of its matrix operations at the one and its reading of the gradients at
the other; of a sparse one, the reading.

"matrix given" has the matrix for nothing, in memory, where it fits. "signs stored blockwise" makes
blocks of 2^27 signs, stores each and multiplies (what bergson does); "whole matrix made and held"
is what dattri's projector does when it is made anew for a batch. Both are written here in plain
torch. fast_jl is measured where it can be imported.
"""

from __future__ import annotations

import functools
import os
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch

import measure
import trak_ext
from gpu import Gpu, Rehearsal, measure_ceilings, with_tf32
from trak_ext.kernels import cuda_paths

Shape = tuple[int, int, int]  # (B, P, k)


class Case(NamedTuple):
    """Projections of one shape that are measured one after another."""

    shape: Shape
    kinds: tuple[str, ...] = ("rademacher",)
    precisions: tuple[str, ...] = ("high",)
    # Gradients' dtypes and the offset of their first parameter.
    inputs: tuple[tuple[torch.dtype, int], ...] = ((torch.float32, 0),)
    every_path: bool = True
    peers: bool = False


FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
ALL = ("medium", "high", "highest")
CASES = [
    # One whose matrix lies in memory.
    Case((32, 2**20, 4096), peers=True),
    # Batches, for the choice of path and the cost of rows beyond whole tiles.
    *(Case((batch, 10**7, 4096), peers=batch == 8) for batch in (1, 4, 8, 9, 16, 33, 65, 128)),
    Case((32, 10**7, 4096), precisions=ALL, peers=True),
    Case((64, 10**7, 4096), precisions=ALL, peers=True),
    Case((32, 10**7, 4096), kinds=("normal",)),
    # Tensors of two bytes an element, and those that begin at an odd parameter.
    Case((32, 10**7, 4096), inputs=((FP32, 1), (FP16, 0), (FP16, 1), (BF16, 0), (BF16, 1))),
    # Few columns, few parameters.
    Case((32, 10**7, 512)),
    Case((32, 10**5, 2048)),
    # The design's shapes.
    Case((64, 10**8, 8192), every_path=False),
    Case((8, 10**9, 4096), every_path=False),
    *(
        Case(shape, kinds=("sjlt",), inputs=((FP32, 0), (BF16, 0)))
        for shape in ((1, 10**8, 4096), (32, 10**7, 4096), (64, 10**8, 8192))
    ),
    Case((8, 10**9, 4096), kinds=("sjlt",)),
]
REHEARSAL_CASES = [
    Case((32, 2**10, 64), peers=True),
    Case((8, 10**4, 64), kinds=("rademacher", "normal", "sjlt"), precisions=ALL),
    Case((8, 10**4, 64), inputs=((FP16, 1), (BF16, 0))),
]
PASSES = {"medium": 1, "high": 2, "highest": 3}
# ||G R - exact|| / ||exact|| that a precision may reach. The CPU's medium is coarser.
ERRORS = {"medium": 6e-3, "high": 1e-5, "highest": 1e-6}
BLOCK_SIGNS = 2**27
# Peers that store what they make are left out where that alone would take minutes.
STORED_SIGNS_MAX = 10**11
Call = Callable[[], object]


@contextmanager
def cuda_path(path: str) -> Iterator[None]:
    """Have projections take a path, as TRAK_EXT_CUDA_PATH names it."""
    before = os.environ.get("TRAK_EXT_CUDA_PATH")
    os.environ["TRAK_EXT_CUDA_PATH"] = path
    try:
        yield
    finally:
        if before is None:
            del os.environ["TRAK_EXT_CUDA_PATH"]
        else:
            os.environ["TRAK_EXT_CUDA_PATH"] = before


def find_paths(gpu: Gpu, plain: bool = False) -> list[str]:
    """Return the paths that the build has for the device; `plain` where it is the only one."""
    if gpu.rehearsal:
        return ["rehearsal"]
    paths: list[str] = []
    for path in cuda_paths.PATHS:
        if path == "plain" and paths and not plain:
            continue
        with cuda_path(path):
            try:
                paths.append(cuda_paths.projection_path(gpu.device, 1))
            except ValueError as error:
                print(error)
    return paths


def find_fast_jl() -> Any:
    """Return the peer's module, or None with a word."""
    try:
        import fast_jl
    except ImportError as error:
        print(f"fast_jl is left out: {error}")
        return None
    return fast_jl


def check(gpu: Gpu, paths: list[str]) -> list[dict[str, Any]]:
    """Compare with fp64 before anything is timed, and return the errors."""
    records = []
    params = 2000 if gpu.rehearsal else 50_000
    for kind in ("rademacher", "normal"):
        law = {"kind": kind, "param_offset": 5}
        matrix = trak_ext.projection_matrix(params, 512, device=gpu.device, **law)
        on_cpu = trak_ext.projection_matrix(1000, 512, **law)
        assert torch.equal(matrix[:1000].cpu(), on_cpu)
        grads = torch.randn(33, params, device=gpu.device)
        exact = grads.double() @ matrix.double()
        for path in paths:
            for precision, allowed in ERRORS.items():
                with cuda_path(path):
                    got = trak_ext.project(grads, 512, precision=precision, **law)
                error = float((got.double() - exact).norm() / exact.norm())
                records.append({"path": path, "kind": kind, "precision": precision, "error": error})
                print(f"{path} {kind} {precision}: ||G R - exact|| / ||exact|| = {error:.2e}")
                assert error < allowed, records[-1]
    return records


def variance_of_norms(gpu: Gpu, project: Callable[[torch.Tensor, int], torch.Tensor]) -> float:
    """Return the variance of ||R^T x||^2 at P = 25,000, k = 4096 in that of independent signs."""
    proj_dim = 4096
    x = torch.randn(8, 100 if gpu.rehearsal else 25_000, device=gpu.device)
    x /= x.norm(dim=1, keepdim=True)
    seeds = range(3 if gpu.rehearsal else 500)
    norms = [project(x, seed)[0].double().square().sum() for seed in seeds]
    return float(torch.stack(norms).var() / (2 * proj_dim))


def make_signs(rows: int, columns: int, like: torch.Tensor) -> torch.Tensor:
    """Return random signs, stored as fp32."""
    return torch.empty((rows, columns), device=like.device).bernoulli_(0.5).mul_(2).sub_(1)


def store_signs_blockwise(grads: torch.Tensor, proj_dim: int) -> torch.Tensor:
    """Project with signs that are made and stored some rows at a time."""
    out = torch.zeros(grads.shape[0], proj_dim, device=grads.device)
    step = max(1, BLOCK_SIGNS // proj_dim)
    for start in range(0, grads.shape[1], step):
        part = grads[:, start : start + step]
        out += part @ make_signs(part.shape[1], proj_dim, grads)
    return out


def find_peers(gpu: Gpu, grads: torch.Tensor, shape: Shape, fast_jl: Any) -> dict[str, Call]:
    """Return what others do with gradients [B, P], by name."""
    batch, params, proj_dim = shape
    found: dict[str, Call] = {}
    if 4 * params * proj_dim < 0.4 * gpu.free_bytes():
        matrix = trak_ext.projection_matrix(params, proj_dim, device=gpu.device)
        for name, allowed in (("fp32", False), ("tf32", True)):
            call = with_tf32(allowed, functools.partial(torch.matmul, grads, matrix))
            found[f"torch matmul {name}, matrix given"] = call
        halved = grads.bfloat16(), matrix.bfloat16()
        found["torch matmul bf16, matrix given"] = functools.partial(torch.matmul, *halved)
        found["whole matrix made and held (dattri's way)"] = lambda: (
            grads @ make_signs(params, proj_dim, grads)
        )
    if params * proj_dim <= STORED_SIGNS_MAX:
        call = functools.partial(store_signs_blockwise, grads, proj_dim)
        found["signs stored blockwise (bergson's way)"] = call
    if fast_jl is not None:
        tiles = 32 if batch >= 32 else 16 if batch >= 16 else 8
        run = getattr(fast_jl, f"project_rademacher_{tiles}")
        found["fast_jl rademacher"] = lambda: run(grads, proj_dim, 0, gpu.multiprocessors())
    return found


def floor_of(case: Case, dtype: torch.dtype, precision: str, ceilings: dict[str, float]) -> float:
    """Return the milliseconds that a projection takes at least."""
    batch, params, proj_dim = case.shape
    reading = dtype.itemsize * batch * params / ceilings["bytes"]
    if case.kinds == ("sjlt",):
        return 1e3 * reading
    passes = {FP16: 2, BF16: 1}.get(dtype, PASSES[precision])
    products = 2.0 * passes * batch * params * proj_dim / ceilings["bf16_operations"]
    return 1e3 * max(products, reading)


def measure_case(
    gpu: Gpu, case: Case, ceilings: dict[str, float], paths: list[str], fast_jl: Any
) -> list[dict[str, Any]]:
    """Return the records of one case."""
    batch, params, proj_dim = case.shape
    # A generator on the device: `randn` of so many would take twice the memory.
    grads = torch.empty(batch, params, device=gpu.device).normal_()
    records: list[dict[str, Any]] = []

    def note(name: str, call: Call, floor: float | None, **facts: Any) -> None:
        try:
            times = gpu.milliseconds(call, patience=1.0, turns=5)
        except torch.OutOfMemoryError as error:
            print(f"{name} at {case.shape} is left out: {error}")
            return
        records.append(
            {"name": name, "shape": case.shape, "milliseconds": times, "floor": floor, **facts}
        )

    for dtype, offset in case.inputs:
        source = grads.to(dtype)
        for kind in case.kinds:
            dense = kind != "sjlt"
            for precision in case.precisions if dense else ("high",):
                for path in paths if dense and case.every_path else [None]:
                    options = {"kind": kind, "precision": precision, "param_offset": offset}

                    def call(
                        source: torch.Tensor = source,
                        path: str | None = path,
                        options: dict[str, Any] = options,
                    ) -> object:
                        with nullcontext() if path is None else cuda_path(path):
                            return trak_ext.project(source, proj_dim, **options)

                    name = f"trak_ext {kind}" + (f" {precision}" if dense else "")
                    if dtype != FP32 or offset:
                        name += f" from {str(dtype)[6:]}" + (
                            f" at offset {offset}" if offset else ""
                        )
                    floor = floor_of(case, dtype, precision, ceilings)
                    note(name, call, floor, path=path or "default")
    if case.peers:
        for name, peer in find_peers(gpu, grads, case.shape, fast_jl).items():
            note(name, peer, None)
    return records


def recommend(records: list[dict[str, Any]]) -> list[str]:
    """Return, for each batch, which path was the faster one and by how much."""
    times: dict[int, dict[str, float]] = {}
    for record in records:
        batch, *rest = record["shape"]
        if record["name"] == "trak_ext rademacher high" and rest == [10**7, 4096]:
            times.setdefault(batch, {})[record.get("path", "")] = statistics.median(
                record["milliseconds"]
            )
    lines = []
    for batch, by_path in sorted(times.items()):
        if len(by_path) > 1:
            best = min(by_path, key=by_path.__getitem__)
            other = min(ms for path, ms in by_path.items() if path != best)
            lines.append(f"B = {batch}: {best} (the other takes {other / by_path[best]:.2f} times)")
    return lines


def compare_bits(gpu: Gpu, paths: list[str]) -> bool | None:
    """Return whether all paths give the same bits on random fp32 gradients, None for one path."""
    if len(paths) < 2:
        return None
    same = True
    for kind in ("rademacher", "normal"):
        for precision in PASSES:
            for batch in (1, 8, 9, 33, 64, 70):
                grads = torch.randn(batch, 300_001, device=gpu.device)
                made = []
                for path in paths:
                    with cuda_path(path):
                        options = {"kind": kind, "precision": precision, "param_offset": 7}
                        made.append(trak_ext.project(grads, 1100, **options))
                same &= all(torch.equal(made[0], other) for other in made[1:])
    return same


def main(json_path: str | None, rehearsal: bool = False) -> None:
    """Check, measure and print."""
    gpu = Rehearsal() if rehearsal else Gpu()
    paths = find_paths(gpu)
    errors = check(gpu, paths)
    same_bits = compare_bits(gpu, paths)
    ceilings = measure_ceilings(gpu)
    fast_jl = find_fast_jl()
    variance = {
        "trak_ext": variance_of_norms(gpu, lambda x, seed: trak_ext.project(x, 4096, seed=seed))
    }
    if fast_jl is not None:
        variance["fast_jl"] = variance_of_norms(
            gpu,
            lambda x, seed: fast_jl.project_rademacher_8(x, 4096, seed, gpu.multiprocessors()),
        )
    for who, value in variance.items():
        print(f"{who}: variance of ||R^T x||^2, in that of independent signs: {value:.2f}")

    records: list[dict[str, Any]] = []
    for case in REHEARSAL_CASES if rehearsal else CASES:
        size = 4 * case.shape[0] * case.shape[1]
        if size > 0.5 * gpu.free_bytes():
            print(f"{case.shape} is left out: gradients of {size / 1e9:.1f} GB")
            continue
        records += measure_case(gpu, case, ceilings, paths, fast_jl)
        settings = {
            "device": gpu.name(),
            "paths": paths,
            "ceilings": ceilings,
            "errors": errors,
            "same_bits": same_bits,
            "variance": variance,
            "defaults": recommend(records),
        }
        # After every case: what was measured is kept if a later one fails.
        measure.write_json(json_path, "projection on cuda", settings, records)

    def row(record: dict[str, Any]) -> list[str]:
        batch, params, proj_dim = record["shape"]
        median = statistics.median(record["milliseconds"])
        work = 2.0 * batch * params * proj_dim
        floor = record["floor"]
        return [
            record["name"],
            record.get("path", ""),
            f"({batch}, {params:.0e}, {proj_dim})",
            f"{median:.2f}",
            f"{work / median / 1e9:.0f}",
            f"{floor:.2f}" if floor else "",
            f"{median / floor:.2f}" if floor else "",
        ]

    measure.print_table(
        f"{gpu.name()}: bf16 products {ceilings['bf16_operations'] / 1e12:.0f} TFLOP/s, "
        f"copies {ceilings['bytes'] / 1e12:.2f} TB/s, both measured",
        ["projector", "path", "(B, P, k)", "ms", "TFLOP/s", "floor, ms", "time / floor"],
        [row(record) for record in records],
    )
    print(f"\nAll paths give the same bits on random fp32 gradients: {same_bits}")
    print("\nThe faster path:", *(f"  {line}" for line in recommend(records)), sep="\n")
