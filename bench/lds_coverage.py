"""How often the 95 % intervals of `lds` and `lds_difference` over subsets hold the truth.

Effects are drawn, two methods know them up to noise, outputs are sums over subsets with noise of
their own. The truth is the score over 40,000 subsets; each interval sees `--subsets` of them.
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor

from measure import print_table
from trak_ext.evaluation import lds, lds_difference
from trak_ext.evaluation.bootstrap import central, mean_over_targets, resample_counts
from trak_ext.evaluation.datamodeling import spearman_difference

POPULATION = 40_000
NUM_TRAIN, NUM_TARGETS = 60, 30


def percentile_interval(a: Tensor, b: Tensor, masks: Tensor, outputs: Tensor) -> tuple[float, ...]:
    """Return the interval that `lds_difference` does not use, for comparison."""
    chosen = masks.double()
    values = tuple(x.T.contiguous() for x in (chosen @ a, chosen @ b, outputs))
    counts = resample_counts(len(masks), 300, torch.Generator().manual_seed(0))
    return central(mean_over_targets(spearman_difference, values, counts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subsets", type=int, nargs="*", default=[20, 30, 40, 50, 100])
    parser.add_argument("--draws", type=int, default=200)
    settings = parser.parse_args()
    torch.set_num_threads(1)
    g = torch.Generator().manual_seed(0)
    effects = torch.randn(NUM_TRAIN, NUM_TARGETS, generator=g, dtype=torch.float64)
    masks = torch.rand(POPULATION, NUM_TRAIN, generator=g).argsort(1) < NUM_TRAIN // 2
    outputs = masks.double() @ effects
    noise = torch.randn(outputs.shape, generator=g, dtype=torch.float64)
    outputs += 0.5 * math.sqrt(NUM_TRAIN) * noise
    rows = []
    for spreads in ((0.7, 1.5), (1.0, 1.2), (0.5, 6.0)):
        a, b = (
            effects + s * torch.randn(effects.shape, generator=g, dtype=torch.float64)
            for s in spreads
        )
        truth = lds_difference(a, b, masks, outputs, num_resamples=1).mean
        truth_a = lds(a, masks, outputs, num_resamples=1).mean
        for size in settings.subsets:
            held = torch.zeros(3)
            for part in torch.arange(POPULATION).split(size)[: settings.draws]:
                data = (masks[part], outputs[part])
                intervals = [
                    lds(a, *data, num_resamples=300).interval_subsets,
                    lds_difference(a, b, *data, num_resamples=300).interval_subsets,
                    percentile_interval(a, b, *data),
                ]
                for i, (low, high) in enumerate(intervals):
                    held[i] += low <= (truth_a if i == 0 else truth) <= high
            shares = [f"{share:.2f}" for share in (held / settings.draws).tolist()]
            rows.append([f"{truth_a:.2f} and {truth_a - truth:.2f}", str(size), *shares])
    header = ["LDS of a and b", "subsets", "lds", "lds_difference", "percentile instead"]
    print_table(f"coverage over {settings.draws} draws", header, rows)


if __name__ == "__main__":
    main()
