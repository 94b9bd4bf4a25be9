"""Attributor on a CUDA device agrees with the CPU; skipped where there is none."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cuda_device import device
from trak_ext import Attributor


@device
@pytest.mark.parametrize(
    "options", [{}, {"curvature": "own", "leverage": True, "blocks": 2}, {"kind": "normal"}]
)
def test_scores_agree_with_the_cpu(options, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 5))
    states = [{n: torch.randn_like(t) for n, t in model.state_dict().items()} for _ in range(2)]
    train = (torch.randn(300, 20), torch.randint(0, 5, (300,)))
    test = (torch.randn(17, 20), torch.randint(0, 5, (17,)))
    scores, best, own = [], [], []
    for place in ("cpu", "cuda"):
        attributor = Attributor(
            model, "image_classification", checkpoints=states, proj_dim=64, device=place,
            precision="highest", progress=False, store=tmp_path / place, **options,
        )  # fmt: skip
        attributor.fit([train])
        scores.append(attributor.attribute([test]))
        best.append(attributor.attribute([test], top_k=4))
        own.append(attributor.self_influence())
    assert scores[1].device.type == "cpu"
    largest = scores[0].abs().max(0).values
    assert ((scores[0] - scores[1]).abs() <= 1e-3 * largest).all()
    assert ((best[0].values - best[1].values).abs() <= 1e-3 * largest[:, None]).all()
    assert ((own[0] - own[1]).abs() <= 1e-3 * own[0].abs().max()).all()
