"""The sparse kind on a CUDA device against reading the gradients once.

    python bench/sjlt_cuda.py [--shapes 32,10000000,4096 ...] [--dtypes float32 bfloat16]
                              [--nnz 1] [--repeats 9] [--json FILE]

Checks the first shape's bits against the CPU's before anything is timed. "read" is torch's sum over
the same gradients, and "copy" a copy of them to others, which reads and writes: the better of the
sum's and half the copy's time is what reading costs here. Shapes that do not fit are left out.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable
from typing import Any

import torch

import measure
import trak_ext


def milliseconds(call: Callable[[], object], repeats: int) -> list[float]:
    """Return the device's time of each call, after two that are not counted.

    The device is kept waiting until the call has been queued whole, so that the time it takes to
    come through Python, a few tenths of a millisecond, is not measured.
    """
    call()
    call()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(5_000_000)
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return times


def check(dtype: torch.dtype, nnz: int) -> None:
    """Compare a small projection's bits with the CPU's."""
    grads = (torch.randn(9, 1_000_003) * 10 ** (torch.rand(9, 1_000_003) * 6 - 3)).to(dtype)
    law: dict[str, Any] = {"kind": "sjlt", "nnz": nnz, "param_offset": 77}
    on_cpu = trak_ext.project(grads, 2048, **law)
    on_cuda = trak_ext.project(grads.cuda(), 2048, **law)
    assert torch.equal(on_cuda.cpu().view(torch.int32), on_cpu.view(torch.int32)), dtype


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    shapes = ["32,10000000,4096", "64,100000000,8192", "8,1000000000,4096", "1,100000000,4096"]
    parser.add_argument("--shapes", nargs="+", default=shapes)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--nnz", type=int, nargs="+", default=[1])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json")
    options = parser.parse_args()
    table, records = [], []
    for name in options.dtypes:
        dtype = getattr(torch, name)
        for nnz in options.nnz:
            check(dtype, nnz)
        for shape in options.shapes:
            batch, params, proj_dim = map(int, shape.split(","))
            size = batch * params * dtype.itemsize
            if size * 1.02 + 2**30 > torch.cuda.mem_get_info()[0]:
                print(f"{shape} {name} is left out: it does not fit")
                continue
            grads = torch.empty(batch, params, dtype=dtype, device="cuda").normal_()
            read = statistics.median(milliseconds(grads.sum, options.repeats))
            half = grads.view(-1)[: grads.numel() // 2]
            if size * 1.52 + 2**30 < torch.cuda.mem_get_info()[0] + size:
                other = torch.empty_like(half)
                copy = functools.partial(other.copy_, half)  # reads and writes half each
                read = min(read, statistics.median(milliseconds(copy, options.repeats)))
                del other, copy
            for nnz in options.nnz:
                call = functools.partial(trak_ext.project, grads, proj_dim, kind="sjlt", nnz=nnz)
                times = milliseconds(call, options.repeats)
                median = statistics.median(times)
                table.append(
                    [
                        shape,
                        name,
                        str(nnz),
                        f"{median:.3f}",
                        f"{read:.3f}",
                        f"{median / read:.2f}",
                        f"{size / median / 1e9:.2f}",
                    ]
                )
                records.append(
                    {
                        "shape": [batch, params, proj_dim],
                        "dtype": name,
                        "nnz": nnz,
                        "milliseconds": times,
                        "read": read,
                    }
                )
            del grads, half
            torch.cuda.empty_cache()
    measure.print_table(
        torch.cuda.get_device_name(),
        ["B, P, k", "dtype", "nnz", "ms", "read ms", "time / read", "TB/s"],
        table,
    )
    settings = {"device": torch.cuda.get_device_name()}
    measure.write_json(options.json, "sjlt_cuda", settings, records)


if __name__ == "__main__":
    main()
