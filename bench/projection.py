"""Projection on one core, against its multiply-add peak, matrix products and peers.

    python bench/projection.py [--params 262144] [--proj-dim 2048] [--batches 8 32] [--json FILE]
    python bench/projection.py --device cuda [--json FILE]        (see projection_cuda.py)

An effective multiply-add is 2 operations: rate = 2 B P k / seconds. "torch matmul" and "numpy
matmul" get the matrix for nothing, in memory; everything else has to make it. traker comes with
`pip install trak-ext[bench]` and is left out, with a word, where it is not installed.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable

import numpy as np
import torch

import measure
import trak_ext
from ceilings import Ceilings


def contenders(
    grads: torch.Tensor, proj_dim: int, matrix: torch.Tensor | None, peers: bool
) -> dict[str, Callable[[], object]]:
    """Return what is measured for one batch of gradients [B, P], by name."""
    found: dict[str, Callable[[], object]] = {
        f"trak_ext {kind}": functools.partial(trak_ext.project, grads, proj_dim, kind=kind)
        for kind in ("rademacher", "normal")
    }
    if matrix is not None:
        found["torch matmul"] = functools.partial(torch.matmul, grads, matrix)
        found["numpy matmul"] = functools.partial(np.matmul, grads.numpy(), matrix.numpy())
    if peers:
        try:
            from trak.projectors import BasicProjector, ProjectionType
        except ImportError as error:
            print(f"traker is left out: {error}")
        else:
            basic = BasicProjector(
                grads.shape[1],
                proj_dim,
                seed=0,
                proj_type=ProjectionType.rademacher,
                device=torch.device("cpu"),
                block_size=100,
            )
            found["traker BasicProjector"] = lambda: basic.project(grads, model_id=0)
    return found


def check(grads: torch.Tensor, proj_dim: int) -> None:
    """Compare with the matrix written out before anything is timed."""
    for kind in ("rademacher", "normal"):
        part = grads[:, :4096]
        exact = part.double() @ trak_ext.projection_matrix(4096, proj_dim, kind=kind).double()
        got = trak_ext.project(part, proj_dim, kind=kind).double()
        error = float((got - exact).norm() / exact.norm())
        assert error < 1e-6, (kind, error)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", type=int, default=2**18)
    parser.add_argument("--proj-dim", type=int, default=2048)
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--no-matmul", action="store_true", help="spare the matrix's memory")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--json")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options = parser.parse_args()
    if options.device == "cuda":
        import projection_cuda

        projection_cuda.main(options.json)
        return
    measure.pin_to_one_core()
    torch.set_num_threads(1)
    level = trak_ext.build_info()["cpu_level"]
    ceilings = Ceilings(level)
    matrix = None
    if not options.no_matmul:
        matrix = trak_ext.projection_matrix(options.params, options.proj_dim)

    table, records = [], []
    for batch in options.batches:
        grads = torch.randn(batch, options.params, generator=torch.Generator().manual_seed(batch))
        check(grads, options.proj_dim)
        calls = contenders(grads, options.proj_dim, matrix, not options.no_peers)
        peaks: list[float] = []
        calls["peak"] = lambda peaks=peaks: peaks.append(ceilings.multiply_add())
        seconds = measure.alternate(calls, options.repeats)
        del seconds["peak"]
        peak = statistics.median(peaks)
        work = 2.0 * batch * options.params * options.proj_dim
        ours = seconds["trak_ext rademacher"]
        for name, times in seconds.items():
            rate = work / statistics.median(times)
            ratio = measure.median_ratio(times, ours)
            table.append(
                [
                    name,
                    str(batch),
                    f"{1e3 * statistics.median(times):.1f}",
                    f"{rate / 1e9:.2f}",
                    f"{rate / peak:.3f}",
                    f"{ratio:.2f}",
                ]
            )
            records.append(
                {"name": name, "batch": batch, "seconds": times, "fraction_of_peak": rate / peak}
            )
        table.append(["multiply-add peak", str(batch), "", f"{peak / 1e9:.2f}", "1.000", ""])
    measure.print_table(
        f"{measure.machine_name()}, one core, level {level}; "
        f"P = {options.params}, k = {options.proj_dim}, fp32",
        ["projector", "B", "ms", "GFLOP/s", "of peak", "time / ours"],
        table,
    )
    settings = {"params": options.params, "proj_dim": options.proj_dim, "level": level}
    measure.write_json(options.json, "projection", settings, records)


if __name__ == "__main__":
    main()
