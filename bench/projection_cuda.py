"""Projection on a CUDA device, against its measured ceilings, matrix products and peers.

Run as `python bench/projection.py --device cuda`; `--device rehearsal` goes through the same on
the CPU with small problems. Times are medians between CUDA events on the current stream. The
ceilings are measured in the same run: a large bf16 product and a large copy. The floor of a
projection is the larger of its matrix operations at the one and its reading of the gradients at
the other.

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
from contextlib import contextmanager
from typing import Any

import torch

import measure
import trak_ext
from gpu import Gpu, Rehearsal, measure_ceilings, with_tf32
from trak_ext import cuda_paths

# (B, P, k); the first one small enough for its matrix to lie in memory.
SHAPES = [
    (32, 2**20, 4096),
    (1, 10**7, 4096),
    (8, 10**7, 4096),
    (32, 10**7, 4096),
    (64, 10**8, 8192),
    (8, 10**9, 4096),
]
REHEARSAL_SHAPES = [(32, 2**10, 64), (8, 10**4, 64)]
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


def find_paths(gpu: Gpu) -> list[str]:
    """Return the paths that the build has for the device, the default first."""
    if gpu.rehearsal:
        return ["rehearsal"]
    default = cuda_paths.projection_path(gpu.device, 1)
    paths = [default]
    for path in ("wgmma", "mma"):
        with cuda_path(path):
            try:
                found = cuda_paths.projection_path(gpu.device, 1)
            except ValueError as error:
                print(error)
                continue
            if found not in paths:
                paths.append(found)
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


def contenders(
    gpu: Gpu, grads: torch.Tensor, shape: tuple[int, int, int], paths: list[str], fast_jl: Any
) -> dict[str, tuple[int, Call]]:
    """Return what is measured for gradients [B, P]: passes that the floor counts, and the call."""
    batch, params, proj_dim = shape
    found: dict[str, tuple[int, Call]] = {}

    def ours(path: str, source: torch.Tensor, **options: Any) -> Call:
        def call() -> object:
            with cuda_path(path):
                return trak_ext.project(source, proj_dim, **options)

        return call

    for kind in ("rademacher", "normal"):
        for precision, passes in PASSES.items():
            for path in paths if precision == "high" else paths[:1]:
                call = ours(path, grads, kind=kind, precision=precision)
                found[f"trak_ext {path} {kind} {precision}"] = passes, call
    if 2 * grads.numel() < 0.3 * gpu.free_bytes():
        for dtype, passes in ((torch.bfloat16, 1), (torch.float16, 2)):
            call = ours(paths[0], grads.to(dtype))
            found[f"trak_ext {paths[0]} rademacher from {dtype}"] = passes, call
    if 4 * params * proj_dim < 0.4 * gpu.free_bytes():
        matrix = trak_ext.projection_matrix(params, proj_dim, device=gpu.device)
        for name, allowed in (("fp32", False), ("tf32", True)):
            call = with_tf32(allowed, functools.partial(torch.matmul, grads, matrix))
            found[f"torch matmul {name}, matrix given"] = 0, call
        halved = grads.bfloat16(), matrix.bfloat16()
        call = functools.partial(torch.matmul, *halved)
        found["torch matmul bf16, matrix given"] = 0, call
        found["whole matrix made and held (dattri's way)"] = (
            0,
            lambda: grads @ make_signs(params, proj_dim, grads),
        )
    if params * proj_dim <= STORED_SIGNS_MAX:
        call = functools.partial(store_signs_blockwise, grads, proj_dim)
        found["signs stored blockwise (bergson's way)"] = 0, call
    if fast_jl is not None:
        tiles = 32 if batch >= 32 else 16 if batch >= 16 else 8
        run = getattr(fast_jl, f"project_rademacher_{tiles}")
        found["fast_jl rademacher"] = 0, lambda: run(grads, proj_dim, 0, gpu.multiprocessors())
    return found


def measure_shape(
    gpu: Gpu,
    shape: tuple[int, int, int],
    ceilings: dict[str, float],
    paths: list[str],
    fast_jl: Any,
) -> tuple[list[list[str]], list[dict[str, Any]]]:
    """Return the table's rows and the records of one shape."""
    batch, params, proj_dim = shape
    grads = torch.randn(batch, params, device=gpu.device)
    table, records = [], []
    for contender, (passes, call) in contenders(gpu, grads, shape, paths, fast_jl).items():
        try:
            times = gpu.milliseconds(call)
        except torch.OutOfMemoryError as error:
            print(f"{contender} at {shape} is left out: {error}")
            continue
        median = statistics.median(times)
        work = 2.0 * batch * params * proj_dim
        floor = 1e3 * max(
            max(passes, 1) * work / ceilings["bf16_operations"],
            4 * batch * params / ceilings["bytes"],
        )
        table.append(
            [
                contender,
                f"({batch}, {params:.0e}, {proj_dim})",
                f"{median:.2f}",
                f"{work / median / 1e9:.0f}",
                f"{floor:.2f}" if passes else "",
                f"{median / floor:.2f}" if passes else "",
            ]
        )
        records.append({"name": contender, "shape": shape, "milliseconds": times, "floor": floor})
    return table, records


def main(json_path: str | None, rehearsal: bool = False) -> None:
    """Check, measure and print."""
    gpu = Rehearsal() if rehearsal else Gpu()
    paths = find_paths(gpu)
    errors = check(gpu, paths)
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

    table: list[list[str]] = []
    records: list[dict[str, Any]] = []
    for shape in REHEARSAL_SHAPES if rehearsal else SHAPES:
        size = 4 * shape[0] * shape[1]
        if size > 0.5 * gpu.free_bytes():
            print(f"{shape} is left out: gradients of {size / 1e9:.1f} GB")
            continue
        rows, found = measure_shape(gpu, shape, ceilings, paths, fast_jl)
        table += rows
        records += found
    measure.print_table(
        f"{gpu.name()}: bf16 products {ceilings['bf16_operations'] / 1e12:.0f} TFLOP/s, "
        f"copies {ceilings['bytes'] / 1e12:.2f} TB/s, both measured; path {paths[0]}",
        ["projector, fp32 gradients", "(B, P, k)", "ms", "TFLOP/s", "floor, ms", "time / floor"],
        table,
    )
    settings = {
        "device": gpu.name(),
        "paths": paths,
        "ceilings": ceilings,
        "errors": errors,
        "variance": variance,
    }
    measure.write_json(json_path, "projection on cuda", settings, records)
