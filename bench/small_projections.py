"""Every CUDA projection kernel once, on small problems: what compute-sanitizer watches.

python bench/small_projections.py [cuda|cpu] [few]        (cpu: a rehearsal; few: fp32, high)
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

import trak_ext
from gpu import Gpu, Rehearsal
from projection_cuda import cuda_path, find_paths

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def run(
    path: str,
    device: torch.device,
    dtypes: tuple[torch.dtype, ...],
    precisions: tuple[str, ...] = ("medium", "high", "highest"),
) -> None:
    """Run each kind, dtype, precision, tile and way of copying; compare where that is exact."""
    for kind in ("rademacher", "normal"):
        trak_ext.projection_matrix(300, 40, kind=kind, param_offset=100, device=device)
        for dtype in dtypes:
            for precision in precisions:
                for rows, shift in ((3, 0), (9, 1), (33, 2)):
                    integers = torch.randint(-9, 10, (rows * 1100 + shift,), device=device)
                    grads = integers.to(dtype)[shift:].view(rows, 1100)
                    with cuda_path(path):
                        got = trak_ext.project(grads, 70, kind=kind, precision=precision)
                    # The CPU's medium is a fixed-point one.
                    if kind == "rademacher" and (device.type == "cuda" or precision != "medium"):
                        assert torch.equal(got.cpu(), trak_ext.project(grads.cpu(), 70))


def run_sparse(device: torch.device) -> None:
    """Run the sparse kind's kernels; the CPU's bits are expected."""
    trak_ext.projection_matrix(300, 40, kind="sjlt", nnz=2, param_offset=100, device=device)
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        for rows, shift, proj_dim, nnz in ((1, 0, 512, 1), (9, 1, 70, 2), (3, 2, 12, 4)):
            values = torch.randn(rows * 5000 + shift, device=device)
            grads = values.to(dtype)[shift:].view(rows, 5000)
            law = {"kind": "sjlt", "nnz": nnz, "param_offset": 2**40 + 3}
            got = trak_ext.project(grads, proj_dim, **law)
            assert torch.equal(got.cpu(), trak_ext.project(grads.cpu(), proj_dim, **law))


def run_paths(run: Callable[..., None], what: str) -> Gpu:
    """Run every path that the build has for the device, and return the device."""
    gpu = Rehearsal() if "cpu" in sys.argv else Gpu()
    few = "few" in sys.argv
    for path in find_paths(gpu, plain=not few):
        if few:
            run(path, gpu.device, DTYPES[1:2], ("high",))
        else:
            run(path, gpu.device, DTYPES)
        print(f"every {what} of {path} has run")
    return gpu


def main() -> None:
    """Run the dense kinds on every path, and the sparse kind."""
    gpu = run_paths(run, "kernel")
    run_sparse(gpu.device)
    print("every kernel of the sparse kind has run")


if __name__ == "__main__":
    main()
