"""Every CUDA projection kernel once, on small problems: what compute-sanitizer watches."""

from __future__ import annotations

import torch

import trak_ext


def main() -> None:
    """Run each kind, dtype, precision, tile and way of copying; compare where that is exact."""
    for kind in ("rademacher", "normal"):
        trak_ext.projection_matrix(300, 40, kind=kind, param_offset=100, device="cuda")
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            for precision in ("medium", "high", "highest"):
                for rows, shift in ((3, 0), (9, 1), (33, 2)):
                    integers = torch.randint(-9, 10, (rows * 1100 + shift,), device="cuda")
                    grads = integers.to(dtype)[shift:].view(rows, 1100)
                    got = trak_ext.project(grads, 70, kind=kind, precision=precision)
                    if kind == "rademacher":
                        assert torch.equal(got.cpu(), trak_ext.project(grads.cpu(), 70))
    print("every kernel has run")


if __name__ == "__main__":
    main()
