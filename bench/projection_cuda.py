"""Projection on a CUDA device, against its measured ceilings, matrix products and peers.

Run as `python bench/projection.py --device cuda`. Times are medians between CUDA events on the
current stream. The ceilings are measured in the same run: a large bf16 product and a large copy.
The floor of a projection is the larger of its matrix operations at the one and its reading of the
gradients at the other. "torch matmul" gets the matrix for nothing, in memory, where it fits;
fast_jl is measured where it can be imported.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

import measure
import trak_ext

# (B, P, k); the first one small enough for its matrix to lie in memory.
SHAPES = [
    (32, 2**20, 4096),
    (1, 10**7, 4096),
    (8, 10**7, 4096),
    (32, 10**7, 4096),
    (64, 10**8, 8192),
    (8, 10**9, 4096),
]
PASSES = {"medium": 1, "high": 2, "highest": 3}
# ||G R - exact|| / ||exact|| that a precision may reach.
ERRORS = {"medium": 3e-3, "high": 1e-5, "highest": 1e-6}


def milliseconds(call: Callable[[], object], patience: float = 10.0, turns: int = 9) -> list[float]:
    """Return the times of some runs after a warm-up; fewer where they take long."""
    call()
    torch.cuda.synchronize()
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < turns and (len(times) < 2 or time.perf_counter() - begin < patience):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return times


def measure_ceilings() -> dict[str, float]:
    """Return bf16 operations a second of a product, and bytes a second of a copy, both counted."""
    size = 8192
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = statistics.median(milliseconds(lambda: a @ b))
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    copy = statistics.median(milliseconds(lambda: target.copy_(source)))
    return {
        "bf16_operations": 2 * size**3 / product * 1e3,
        "bytes": 2 * source.numel() * source.element_size() / copy * 1e3,
    }


def find_fast_jl() -> Any:
    """Return the peer's module, or None with a word."""
    try:
        import fast_jl
    except ImportError as error:
        print(f"fast_jl is left out: {error}")
        return None
    return fast_jl


def check() -> list[dict[str, Any]]:
    """Compare with fp64 before anything is timed, and return the errors."""
    records = []
    for kind in ("rademacher", "normal"):
        matrix = trak_ext.projection_matrix(50_000, 512, kind=kind, device="cuda", param_offset=5)
        on_cpu = trak_ext.projection_matrix(1000, 512, kind=kind, param_offset=5)
        assert torch.equal(matrix[:1000].cpu(), on_cpu)
        grads = torch.randn(33, 50_000, device="cuda")
        exact = grads.double() @ matrix.double()
        for precision, allowed in ERRORS.items():
            got = trak_ext.project(grads, 512, kind=kind, precision=precision, param_offset=5)
            error = float((got.double() - exact).norm() / exact.norm())
            records.append({"kind": kind, "precision": precision, "error": error})
            print(f"{kind} {precision}: ||G R - exact|| / ||exact|| = {error:.2e}")
            assert error < allowed, records[-1]
    return records


def variance_of_norms(project: Callable[[torch.Tensor, int], torch.Tensor]) -> float:
    """Return the variance of ||R^T x||^2 at P = 25,000, k = 4096 in that of independent signs."""
    proj_dim = 4096
    x = torch.randn(8, 25_000, device="cuda")
    x /= x.norm(dim=1, keepdim=True)
    norms = [project(x, seed)[0].double().square().sum() for seed in range(500)]
    return float(torch.stack(norms).var() / (2 * proj_dim))


def contenders(
    grads: torch.Tensor, shape: tuple[int, int, int], fast_jl: Any
) -> dict[str, tuple[int, Callable[[], object]]]:
    """Return what is measured for gradients [B, P]: passes that the floor counts, and the call."""
    batch, params, proj_dim = shape
    found: dict[str, tuple[int, Callable[[], object]]] = {}
    for kind in ("rademacher", "normal"):
        for precision, passes in PASSES.items():
            call = functools.partial(
                trak_ext.project, grads, proj_dim, kind=kind, precision=precision
            )
            found[f"trak_ext {kind} {precision}"] = passes, call
    if 2 * grads.numel() < 0.3 * torch.cuda.mem_get_info()[0]:
        for dtype, passes in ((torch.bfloat16, 1), (torch.float16, 2)):
            call = functools.partial(trak_ext.project, grads.to(dtype), proj_dim)
            found[f"trak_ext rademacher from {dtype}"] = passes, call
    if 4 * params * proj_dim < 0.4 * torch.cuda.mem_get_info()[0]:
        matrix = trak_ext.projection_matrix(params, proj_dim, device="cuda")
        for name, tf32 in (("fp32", False), ("tf32", True)):

            def product(tf32: bool = tf32, matrix: torch.Tensor = matrix) -> None:
                torch.backends.cuda.matmul.allow_tf32 = tf32
                torch.matmul(grads, matrix)

            found[f"torch matmul {name}, matrix given"] = 0, product
        halved = grads.bfloat16(), matrix.bfloat16()
        call = functools.partial(torch.matmul, *halved)
        found["torch matmul bf16, matrix given"] = 0, call
    if fast_jl is not None:
        tiles = 32 if batch >= 32 else 16 if batch >= 16 else 8
        run = getattr(fast_jl, f"project_rademacher_{tiles}")
        multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
        found["fast_jl rademacher"] = 0, lambda: run(grads, proj_dim, 0, multiprocessors)
    return found


def main(json_path: str | None) -> None:
    """Check, measure and print."""
    name = torch.cuda.get_device_name()
    errors = check()
    ceilings = measure_ceilings()
    fast_jl = find_fast_jl()
    variance = {"trak_ext": variance_of_norms(lambda x, s: trak_ext.project(x, 4096, seed=s))}
    if fast_jl is not None:
        multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
        variance["fast_jl"] = variance_of_norms(
            lambda x, seed: fast_jl.project_rademacher_8(x, 4096, seed, multiprocessors)
        )
    for who, value in variance.items():
        print(f"{who}: variance of ||R^T x||^2, in that of independent signs: {value:.2f}")

    table, records = [], []
    for shape in SHAPES:
        batch, params, proj_dim = shape
        if 4 * batch * params > 0.5 * torch.cuda.mem_get_info()[0]:
            print(f"{shape} is left out: gradients of {4 * batch * params / 1e9:.1f} GB")
            continue
        grads = torch.randn(batch, params, device="cuda")
        for contender, (passes, call) in contenders(grads, shape, fast_jl).items():
            times = milliseconds(call)
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
            records.append(
                {"name": contender, "shape": shape, "milliseconds": times, "floor": floor}
            )
        del grads
        torch.cuda.empty_cache()
    measure.print_table(
        f"{name}: bf16 products {ceilings['bf16_operations'] / 1e12:.0f} TFLOP/s, "
        f"copies {ceilings['bytes'] / 1e12:.2f} TB/s, both measured",
        ["projector, fp32 gradients", "(B, P, k)", "ms", "TFLOP/s", "floor, ms", "time / floor"],
        table,
    )
    settings = {"device": name, "ceilings": ceilings, "errors": errors, "variance": variance}
    measure.write_json(json_path, "projection on cuda", settings, records)
