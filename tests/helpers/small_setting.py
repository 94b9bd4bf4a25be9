"""A small classifier with its data, and Attributors that are fitted on them."""

from __future__ import annotations

import torch
from torch import nn

from trak_ext import Attributor

NUM_TRAIN, NUM_TARGETS, PROJ_DIM = 29, 5, 6


def setting(checkpoints=2):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 3))
    states = []
    for _ in range(checkpoints):
        states.append({name: torch.randn_like(t) for name, t in model.state_dict().items()})
    train = (torch.randn(NUM_TRAIN, 4), torch.randint(0, 3, (NUM_TRAIN,)))
    test = (torch.randn(NUM_TARGETS, 4), torch.randint(0, 3, (NUM_TARGETS,)))
    return model, states, train, test


def fitted(store=None, **options):
    model, states, train, _ = setting()
    options = {
        "proj_dim": PROJ_DIM,
        "damping": 1.0,
        "curvature": None,
        "progress": False,
        **options,
    }
    result = Attributor(model, "image_classification", checkpoints=states, store=store, **options)
    result.fit([train])
    return result
