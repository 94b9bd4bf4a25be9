"""Scoring on a CUDA device, top-k included, against matrix products, a sort and the floor.

Run as `python bench/scoring.py --device cuda`; `--device rehearsal` goes through the same on the
CPU with small problems. The kernel matrix is given; solving for the targets is timed apart. The
floor is the larger of the matrix operations (a product for each pair of bf16 parts that is kept)
at the measured rate of a bf16 product and the reading of the features at that of a copy; for
features that come from the host, their copying from pinned memory.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

import measure
import trak_ext
from gpu import Gpu, Rehearsal, measure_ceilings, with_tf32
from trak_ext.estimator.formula import factor_kernel, solve_targets
from trak_ext.kernels.score_pass import SolvedTargets
from trak_ext.kernels.streaming import Block, stream_blocks

# Products of bf16 parts: of fp32 features, and of bf16 features.
PRODUCTS = {"medium": (1, 1), "high": (3, 2), "highest": (6, 3)}
Call = Callable[[], object]


def contenders(
    gpu: Gpu,
    train: torch.Tensor,
    solved: torch.Tensor,
    weights: torch.Tensor,
    best: int,
) -> dict[str, tuple[int, int, Call]]:
    """Return what is measured: products, bytes that are read of a feature, and the call."""
    found: dict[str, tuple[int, int, Call]] = {}
    half = train.bfloat16()
    right = solved.float().T.contiguous()
    half_right = right.bfloat16()
    for precision, (products, half_products) in PRODUCTS.items():
        prepared = SolvedTargets(solved[None], torch.float32, precision)
        name = f"trak_ext top-{best} {precision}"
        found[name] = products, 4, functools.partial(prepared.top_k, [train], weights, best)
        call = functools.partial(prepared.top_k, [half], weights, best)
        found[f"{name}, bf16 features"] = half_products, 2, call
        call = functools.partial(prepared.score, [train], weights)
        found[f"trak_ext all scores {precision}"] = products, 4, call

    def by_matmul(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return torch.topk((left @ right) * weights[:, None], best, dim=0).indices.T

    # The three products of `high` in one matrix product: what a library's kernel takes for them,
    # the parts being given and the scores being all that is wanted.
    small, right_small = (train - half.float()).bfloat16(), (right - half_right.float()).bfloat16()
    parts = torch.cat([small, half, half], dim=1)
    right_parts = torch.cat([half_right, right_small, half_right])
    kept = {} if gpu.rehearsal else {"out_dtype": torch.float32}
    call = functools.partial(torch.mm, parts, right_parts, **kept)
    found["torch matmul bf16x3, given the parts"] = PRODUCTS["high"][0], 6, call
    exact = functools.partial(by_matmul, train, right)
    found["torch matmul fp32 + topk"] = 0, 4, with_tf32(False, exact)
    found["torch matmul tf32 + topk"] = 0, 4, with_tf32(True, exact)
    found["torch matmul bf16 + topk"] = 0, 2, functools.partial(by_matmul, half, half_right)
    found["torch matmul fp32 alone"] = 0, 4, with_tf32(False, lambda: train @ right)
    prepared = SolvedTargets(solved[None], torch.float32)
    assert isinstance(exact(), torch.Tensor)
    same = prepared.top_k([train], weights, best).indices == with_tf32(False, exact)()
    assert same.float().mean() > 0.999  # ties of last bits may swap
    return found


def from_the_host(
    gpu: Gpu, samples: int, proj_dim: int, solved: torch.Tensor, best: int
) -> tuple[list[float], list[float]]:
    """Return times of top-k with features on the host, and of copying them from pinned memory."""
    features, weights = torch.randn(samples, proj_dim), torch.rand(samples)

    def stream(given: Sequence[torch.Tensor]) -> Iterator[Block]:
        return stream_blocks(given, gpu.device, transport=gpu.transport)

    prepared = SolvedTargets(solved[None], torch.float32, stream=stream)
    streamed = gpu.milliseconds(lambda: prepared.top_k([features], weights, best))
    rows = min(samples, 4096)
    pinned = features[:rows] if gpu.rehearsal else features[:rows].pin_memory()
    target = torch.empty((rows, proj_dim), device=gpu.device)
    copies = gpu.milliseconds(lambda: target.copy_(pinned, non_blocking=True))
    return streamed, [time * samples / rows for time in copies]


def main(
    samples: int, targets: int, proj_dim: int, best: int, json_path: str | None, rehearsal: bool
) -> None:
    """Check, measure and print."""
    gpu = Rehearsal() if rehearsal else Gpu()
    ceilings = measure_ceilings(gpu)
    generator = torch.Generator(gpu.device).manual_seed(0)
    arguments: dict[str, Any] = {"generator": generator, "device": gpu.device}
    train = torch.randn(samples, proj_dim, **arguments)
    target_features = torch.randn(targets, proj_dim, **arguments)
    weights = torch.rand(samples, **arguments)
    kernel = trak_ext.kernel_matrix(train[: 2 * proj_dim]) * (samples / (2 * proj_dim))
    factor = factor_kernel(kernel, 1.0, 0.0)
    solved = solve_targets(factor, target_features)

    table: list[list[str]] = []
    records: list[dict[str, Any]] = []

    def note(name: str, times: list[float], floor: float | None) -> None:
        median = statistics.median(times)
        table.append(
            [
                name,
                f"{median:.2f}",
                "" if floor is None else f"{floor:.2f}",
                "" if floor is None else f"{median / floor:.2f}",
            ]
        )
        records.append({"name": name, "milliseconds": times, "floor": floor})

    def floor(products: int, size: int, targets: int) -> float:
        compute = products * 2.0 * samples * targets * proj_dim / ceilings["bf16_operations"]
        read = samples * proj_dim * size / ceilings["bytes"]
        return 1e3 * max(compute, read)

    for name, (products, size, call) in contenders(gpu, train, solved, weights, best).items():
        try:
            times = gpu.milliseconds(call)
        except (RuntimeError, TypeError) as error:  # a product that this torch does not have
            print(f"{name} is left out: {error}")
            continue
        note(name, times, floor(products, size, targets) if products else None)
    for others in (16, 64, 1024):
        prepared = SolvedTargets(
            torch.randn(1, others, proj_dim, dtype=torch.float64, **arguments),
            torch.float32,
            "high",
        )
        call = functools.partial(prepared.score, [train], weights)
        name = f"trak_ext all scores high, {others} targets"
        note(name, gpu.milliseconds(call), floor(PRODUCTS["high"][0], 4, others))
    note(
        "solve for the targets",
        gpu.milliseconds(lambda: solve_targets(factor, target_features)),
        None,
    )
    # A part of the samples: filling host memory with random numbers takes its time.
    part = samples if rehearsal else min(samples, 200_000)
    streamed, copied = from_the_host(gpu, part, proj_dim, solved, best)
    note(f"trak_ext top-{best}, {part} samples from the host", streamed, statistics.median(copied))
    measure.print_table(
        f"{gpu.name()}: bf16 products {ceilings['bf16_operations'] / 1e12:.0f} TFLOP/s, copies "
        f"{ceilings['bytes'] / 1e12:.2f} TB/s, both measured; n = {samples}, t = {targets}, "
        f"k = {proj_dim}, fp32",
        ["scoring", "ms", "floor, ms", "time / floor"],
        table,
    )
    settings = {
        "device": gpu.name(),
        "ceilings": ceilings,
        "samples": samples,
        "targets": targets,
        "proj_dim": proj_dim,
        "top_k": best,
    }
    measure.write_json(json_path, "scoring on cuda", settings, records)
