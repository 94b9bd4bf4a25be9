"""Projection against the core's multiply-add peak, matrix products and peers.

    python bench/projection.py [--params 262144 ...] [--proj-dims 2048 ...] [--batches 8 32]
                               [--threads 1] [--json FILE]
    python bench/projection.py --device cuda [--json FILE]        (see projection_cuda.py)

"trak_ext sjlt" and scikit-learn's sparse one do not multiply: their bar is "gradients read once".
dattri's sparse projection runs on CUDA devices alone.
An effective multiply-add is 2 operations: rate = 2 B P k / seconds. "torch matmul" and "numpy
matmul" get the matrix for nothing, in memory; everything else has to make it. Peers come with
`pip install trak-ext[bench]` (dattri with --no-deps will do) and are left out, with a word, where
they are not installed. TRAK_EXT_CPU_LEVEL forces a level, and the peak is that level's own.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
from collections.abc import Callable

import numpy as np
import torch

import measure
import trak_ext
from ceilings import Ceilings

WAYS: dict[str, dict[str, str]] = {
    "trak_ext rademacher": {"kind": "rademacher"},
    "trak_ext rademacher, medium": {"kind": "rademacher", "precision": "medium"},
    "trak_ext normal": {"kind": "normal"},
    "trak_ext sjlt": {"kind": "sjlt"},
}
DENSE_WORK = 2**41  # more multiply-adds than that are left out


def peers(grads: torch.Tensor, proj_dim: int) -> dict[str, Callable[[], object]]:
    """Return other libraries' CPU projections of gradients [B, P], by name."""
    found: dict[str, Callable[[], object]] = {}
    params = grads.shape[1]
    try:
        from trak.projectors import BasicProjector, ProjectionType

        theirs = BasicProjector(
            params,
            proj_dim,
            seed=0,
            proj_type=ProjectionType.rademacher,
            device=torch.device("cpu"),
            block_size=100,
        )
        found["traker BasicProjector"] = lambda: theirs.project(grads, model_id=0)
    except ImportError as error:
        print(f"traker is left out: {error}")
    try:
        from dattri.func.projection import ProjectionType as DattriType
        from dattri.func.projection import make_random_projector

        other = make_random_projector(
            [params],
            len(grads),
            proj_dim,
            32,
            device=torch.device("cpu"),
            proj_type=DattriType.rademacher,
        )
        found["dattri BasicProjector"] = lambda: other.project(grads, ensemble_id=0)
    except ImportError as error:
        print(f"dattri is left out: {error}")
    try:
        from sklearn.random_projection import SparseRandomProjection

        # About one entry a row, as many as nnz = 1 has; the matrix is made once, before the clock.
        sparse = SparseRandomProjection(proj_dim, density=1 / proj_dim, random_state=0)
        sparse.fit(grads[:1].numpy())
        found["scikit-learn sparse, matrix given"] = lambda: sparse.transform(grads.numpy())
    except ImportError as error:
        print(f"scikit-learn is left out: {error}")
    if params * proj_dim <= 2**28:  # it holds the matrix in fp64
        from sklearn.random_projection import GaussianRandomProjection

        array = grads.numpy()
        found["scikit-learn Gaussian"] = lambda: GaussianRandomProjection(
            proj_dim, random_state=0
        ).fit_transform(array)
    return found


def contenders(
    grads: torch.Tensor, proj_dim: int, matrix: torch.Tensor | None, with_peers: bool
) -> dict[str, Callable[[], object]]:
    """Return what is measured for one batch of gradients [B, P], by name."""
    found: dict[str, Callable[[], object]] = {
        name: functools.partial(trak_ext.project, grads, proj_dim, **way)
        for name, way in WAYS.items()
        if "sjlt" in name or grads.numel() * proj_dim <= DENSE_WORK
    }
    if matrix is not None:
        found["torch matmul, matrix given"] = functools.partial(torch.matmul, grads, matrix)
        found["numpy matmul, matrix given"] = functools.partial(
            np.matmul, grads.numpy(), matrix.numpy()
        )
    return {**found, **(peers(grads, proj_dim) if with_peers else {})}


def check(grads: torch.Tensor, proj_dim: int) -> None:
    """Compare with the matrix written out before anything is timed."""
    part = grads[:, :4096]
    for name, way in WAYS.items():
        matrix = trak_ext.projection_matrix(part.shape[1], proj_dim, kind=way["kind"])
        exact = part.double() @ matrix.double()
        error = float((trak_ext.project(part, proj_dim, **way) - exact).norm() / exact.norm())
        assert error < (2**-9 if "precision" in way else 1e-6), (name, error)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--params", type=int, nargs="+", default=[2**18])
    parser.add_argument("--proj-dims", type=int, nargs="+", default=[2048])
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--no-matmul", action="store_true", help="spare the matrix's memory")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--json")
    parser.add_argument("--device", choices=["cpu", "cuda", "rehearsal"], default="cpu")
    options = parser.parse_args()
    if options.device != "cpu":
        import projection_cuda

        projection_cuda.main(options.json, options.device == "rehearsal")
        return
    if options.threads == 1:
        measure.pin_to_one_core()
    torch.set_num_threads(options.threads)
    level = trak_ext.build_info()["cpu_level"]
    ceilings = Ceilings(level)

    table, records = [], []
    for params, proj_dim in itertools.product(options.params, options.proj_dims):
        matrix = None if options.no_matmul else trak_ext.projection_matrix(params, proj_dim)
        for batch in options.batches:
            generator = torch.Generator().manual_seed(batch)
            grads = torch.randn(batch, params, generator=generator)
            check(grads, proj_dim)
            calls = contenders(grads, proj_dim, matrix, not options.no_peers)
            peaks: list[float] = []
            values = grads.numpy().ravel()
            calls["gradients read once"] = functools.partial(ceilings.read, values)
            calls["peak"] = lambda peaks=peaks: peaks.append(ceilings.multiply_add())
            seconds = measure.alternate(calls, options.repeats)
            del seconds["peak"]
            peak = statistics.median(peaks)
            ours = seconds.get("trak_ext rademacher", seconds["trak_ext sjlt"])
            once = seconds["gradients read once"]
            for name, times in seconds.items():
                median = statistics.median(times)
                fraction = 2.0 * batch * params * proj_dim / median / peak
                table.append(
                    [
                        name,
                        str(params),
                        str(proj_dim),
                        str(batch),
                        f"{1e3 * median:.1f}",
                        f"{fraction:.3f}",
                        f"{measure.median_ratio(times, ours):.2f}",
                        f"{measure.median_ratio(times, once):.2f}",
                    ]
                )
                records.append(
                    {
                        "name": name,
                        "params": params,
                        "proj_dim": proj_dim,
                        "batch": batch,
                        "seconds": times,
                        "peak": peak,
                        "fraction_of_peak": fraction,
                    }
                )
    measure.print_table(
        f"{measure.machine_name()}, {options.threads} thread(s), level {level}, fp32; "
        f"peak of one core {peak / 1e9:.0f} GFLOP/s",
        ["projector", "P", "k", "B", "ms", "of peak", "time / ours", "time / read"],
        table,
    )
    settings = {"level": level, "threads": options.threads}
    measure.write_json(options.json, "projection", settings, records)


if __name__ == "__main__":
    main()
