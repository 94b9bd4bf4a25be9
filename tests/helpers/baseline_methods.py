"""The baselines by how they are made: what their tests are parametrized with."""

from __future__ import annotations

from torch import nn

from trak_ext.baselines import (
    GradientCosine,
    GradientProduct,
    Random,
    RepresentationSimilarity,
    TracIn,
)

CLASSES, RATES = 3, [0.3, 0.1]
GRADIENT_METHODS = [GradientProduct, GradientCosine, TracIn]
METHODS = [*GRADIENT_METHODS, RepresentationSimilarity, Random]


def make_model():
    return nn.Sequential(
        nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)
    )


def make(method, model, states, task="image_classification", **arguments):
    if method is TracIn:
        arguments["learning_rates"] = RATES[: len(states or [0])]
    return method(model, task, checkpoints=states, progress=False, **arguments)
