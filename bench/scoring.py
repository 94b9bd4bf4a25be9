"""Scoring on one core, top-k included, against its multiply-add peak and a matrix product.

    python bench/scoring.py [--samples 100000] [--targets 256] [--proj-dim 2048] [--json FILE]
    python bench/scoring.py --device cuda [...]        (see scoring_cuda.py)

The kernel matrix is given, as it is after `fit`; solving for the targets is timed apart. "torch
matmul + topk" makes the same scores by one product and holds all of them; "numpy matmul" is the
product alone, by OpenBLAS as each of the two core types that it has for such processors.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

import torch

import measure
import trak_ext
from ceilings import Ceilings
from trak_ext.estimator.formula import factor_kernel, solve_targets
from trak_ext.kernels.score_pass import SolvedTargets


class OpenBlasWorker:
    """One process with OpenBLAS as one core type; a call runs one product there."""

    def __init__(self, core_type: str, n: int, t: int, k: int) -> None:
        environment = {
            **os.environ,
            "OPENBLAS_CORETYPE": core_type,
            "OPENBLAS_NUM_THREADS": "1",
        }
        script = Path(__file__).with_name("openblas_worker.py")
        self._process = subprocess.Popen(
            [sys.executable, str(script), str(n), str(t), str(k)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._answer()  # "ready"

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def __call__(self) -> None:
        """Run one product and wait for it."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        self._answer()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda", "rehearsal"], default="cpu")
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--targets", type=int, default=256)
    parser.add_argument("--proj-dim", type=int, default=2048)
    parser.add_argument("--top-k", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json")
    options = parser.parse_args()
    if options.device != "cpu":
        import scoring_cuda

        sizes = (options.samples, options.targets, options.proj_dim, options.top_k)
        scoring_cuda.main(*sizes, options.json, options.device == "rehearsal")
        return
    measure.pin_to_one_core()
    torch.set_num_threads(1)
    level = trak_ext.build_info()["cpu_level"]
    ceilings = Ceilings(level)
    n, t, k, best = options.samples, options.targets, options.proj_dim, options.top_k

    generator = torch.Generator().manual_seed(0)
    train = torch.randn(n, k, generator=generator)
    targets = torch.randn(t, k, generator=generator)
    weights = torch.rand(n, generator=generator)
    kernel = trak_ext.kernel_matrix(train[: 2 * k]) * (n / (2 * k))
    factor = factor_kernel(kernel, 1.0, 0.0)
    solved = solve_targets(factor, targets)
    prepared = SolvedTargets(solved[None], torch.float32)
    half = train.bfloat16()
    right = solved.float().T.contiguous()

    def by_matmul() -> torch.Tensor:
        return torch.topk((train @ right) * weights[:, None], best, dim=0).indices.T

    found = prepared.top_k([train], weights, best).indices
    assert (found == by_matmul()).float().mean() > 0.999  # ties of last bits may swap

    blas = {name: OpenBlasWorker(name, n, t, k) for name in ("SkylakeX", "Zen")}
    peaks: list[float] = []
    calls = {
        f"trak_ext top-{best}": lambda: prepared.top_k([train], weights, best),
        f"trak_ext top-{best}, bf16 features": lambda: prepared.top_k([half], weights, best),
        "trak_ext all scores": lambda: prepared.score([train], weights),
        "torch matmul + topk": by_matmul,
        **{f"numpy matmul, OpenBLAS {name}": worker for name, worker in blas.items()},
        "solve for the targets": lambda: solve_targets(factor, targets),
        "peak": lambda: peaks.append(ceilings.multiply_add()),
    }
    seconds = measure.alternate(calls, options.repeats, patience=60)
    for worker in blas.values():
        worker.close()
    del seconds["peak"]
    peak = statistics.median(peaks)
    table, records = [], []
    for name, times in seconds.items():
        median = statistics.median(times)
        rate = 2.0 * n * t * k / median
        is_pass = name != "solve for the targets"
        table.append(
            [
                name,
                f"{1e3 * median:.0f}",
                f"{rate / 1e9:.1f}" if is_pass else "",
                f"{rate / peak:.3f}" if is_pass else "",
            ]
        )
        records.append({"name": name, "seconds": times, "fraction_of_peak": rate / peak})
    table.append(["multiply-add peak", "", f"{peak / 1e9:.1f}", "1.000"])
    measure.print_table(
        f"{measure.machine_name()}, one core, level {level}; n = {n}, t = {t}, k = {k}, fp32",
        ["scoring", "ms", "GFLOP/s", "of peak"],
        table,
    )
    settings = {"samples": n, "targets": t, "proj_dim": k, "top_k": best, "level": level}
    measure.write_json(options.json, "scoring", settings, records)


if __name__ == "__main__":
    main()
