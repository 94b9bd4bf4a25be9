"""Every CUDA scoring and top-k kernel once, on small problems: what compute-sanitizer watches.

python bench/small_scores.py [cuda|cpu] [few]        (cpu: a rehearsal; few: fp32, high)
"""

from __future__ import annotations

import torch

from projection_cuda import cuda_path
from small_projections import run_paths
from trak_ext.kernels.score_pass import SolvedTargets


def run(
    path: str,
    device: torch.device,
    dtypes: tuple[torch.dtype, ...],
    precisions: tuple[str, ...] = ("medium", "high", "highest"),
) -> None:
    """Run each dtype, precision, tile and count of the best; compare with fp64 on the CPU."""
    for dtype in dtypes:
        for precision in precisions:
            for targets in (3, 40, 130):
                train = [torch.randn(150, 70, device=device).to(dtype) for _ in range(2)]
                solved = torch.randn(2, targets, 70, device=device, dtype=torch.float64)
                weights = torch.rand(150, device=device, dtype=torch.float64)
                scored = torch.float64 if dtype == torch.float64 else torch.float32
                prepared = SolvedTargets(solved, scored, precision)
                with cuda_path(path):
                    scores = prepared.score(train, weights.to(scored))
                    best = prepared.top_k(train, weights.to(scored), 7)
                exact = sum(
                    phi.double().cpu() @ s.T for phi, s in zip(train, solved.cpu(), strict=True)
                )
                exact = exact * weights.cpu()[:, None]
                assert isinstance(exact, torch.Tensor)
                ratio = (scores.cpu().double() * exact).sum() / exact.square().sum()
                error = (scores.cpu().double() / ratio - exact).norm() / exact.norm()
                assert error < 1e-2, (path, dtype, precision, targets, float(error))
                assert torch.equal(best.values, scores.T.gather(1, best.indices))


if __name__ == "__main__":
    run_paths(run, "scoring kernel")
