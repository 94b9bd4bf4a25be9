"""What attributions say of a model trained on a subset: the sum of its samples' scores."""

from __future__ import annotations

import torch
from torch import Tensor

SCORE_ELEMENTS = 1 << 24  # of the scores that are taken to fp64 at once: 128 MiB


def predict(scores: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Sum the scores over each subset: predictions [t, m], and whether they are constant [t].

    Sums of equal scores over equally many samples should tie but need not to the bit, so a spread
    within the rounding of such a sum counts as constant.
    """
    n_train, num_targets = scores.shape
    chosen = masks.to(scores.device, torch.float64)  # [m, n]
    epsilon = torch.finfo(torch.float64).eps * max(n_train, 1) ** 0.5
    width = max(1, SCORE_ELEMENTS // max(n_train, 1))
    predictions, constant = [], []
    for start in range(0, num_targets, width):
        block = scores[:, start : start + width].detach().double()  # [n, c]
        sums = chosen @ block  # [m, c]
        predictions.append(sums.T.cpu())
        spread = sums.amax(0) - sums.amin(0)
        constant.append((spread <= epsilon * block.abs().sum(0)).cpu())
    return torch.cat(predictions).contiguous(), torch.cat(constant)
