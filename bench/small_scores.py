"""Every CUDA scoring and top-k kernel once, on small problems: what compute-sanitizer watches.

python bench/small_scores.py [cuda|cpu]        (cpu: a rehearsal of this script)
"""

from __future__ import annotations

import sys

import torch

import trak_ext
from gpu import Gpu, Rehearsal
from projection_cuda import cuda_path, find_paths


def run(path: str, device: torch.device) -> None:
    """Run each dtype, precision, tile and count of the best; compare with fp64 on the CPU."""
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        for precision in ("medium", "high", "highest"):
            for targets in (3, 40, 130):
                train = torch.randint(-3, 4, (2, 150, 70), device=device).to(dtype)
                asked = torch.randint(-3, 4, (2, targets, 70), device=device).to(dtype)
                weights = torch.rand(2, 150, device=device)
                with cuda_path(path):
                    scores = trak_ext.score(train, asked, weights, precision=precision)
                    best = trak_ext.top_k(train, asked, 7, weights, precision=precision)
                exact = trak_ext.score(train.double().cpu(), asked.double().cpu(), weights.cpu())
                error = (scores.cpu().double() - exact).norm() / exact.norm()
                assert error < 1e-2, (path, dtype, precision, targets, float(error))
                assert torch.equal(best.values, scores.T.gather(1, best.indices))


def main() -> None:
    """Run every path that the build has for the device."""
    gpu = Rehearsal() if sys.argv[1:] == ["cpu"] else Gpu()
    for path in find_paths(gpu, plain=True):
        run(path, gpu.device)
        print(f"every scoring kernel of {path} has run")


if __name__ == "__main__":
    main()
