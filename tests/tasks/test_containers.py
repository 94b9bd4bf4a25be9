"""A task of one's own is called with the containers that the loader yields."""

from __future__ import annotations

from collections import UserDict, namedtuple

import pytest
import torch
from torch import nn

import trak_ext
from trak_ext.tasks import Task

Pair = namedtuple("Pair", "inputs labels")
X, Y = torch.randn(9, 4, generator=torch.Generator().manual_seed(1)), torch.arange(9) % 3


class Encoding(UserDict):
    """Named fields, as Hugging Face's BatchEncoding has them."""

    def __getattr__(self, name):
        return self.data[name]


def of_pair(model, batch):
    assert type(batch) is Pair
    return model(batch.inputs).gather(1, batch.labels[:, None])[:, 0]


def of_encoding(model, batch):
    assert type(batch) is Encoding
    return model(batch.x).gather(1, batch.labels[:, None])[:, 0]


def of_nested(model, batch):
    assert set(batch) == {"pair", "more"}
    assert type(batch["pair"]) is Pair
    return of_pair(model, batch["pair"]) + batch["more"][0].sum(1) * 0


TASKS = {
    "named tuple": (of_pair, lambda x, y: Pair(x, y)),
    "encoding": (of_encoding, lambda x, y: Encoding({"x": x, "labels": y})),
    "nested": (of_nested, lambda x, y: {"pair": Pair(x, y), "more": [x]}),
    "arrays": (of_pair, lambda x, y: Pair(x.numpy(), y.numpy())),
}


class Looped(nn.Linear):
    def forward(self, x):
        return super().forward(x) * (2 if float(x.sum()) > 1e9 else 1)  # vmap cannot take it


@pytest.mark.filterwarnings("ignore:trak_ext computes gradients one sample at a time")
@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize("layer", [nn.Linear, Looped])
def test_a_task_gets_the_loaders_containers(kind, layer):
    function, make = TASKS[kind]
    found = []
    for task, wrap in ((function, make), (of_pair, TASKS["named tuple"][1])):
        torch.manual_seed(0)
        attributor = trak_ext.Attributor(
            layer(4, 3), Task("own", task), proj_dim=8, damping=1.0, progress=False
        )
        attributor.fit([wrap(X[:5], Y[:5]), wrap(X[5:], Y[5:])])
        found.append(attributor.attribute([wrap(X[:2], Y[:2])]))
    torch.testing.assert_close(*found)


def test_an_encoding_of_transformers_reaches_the_task():
    transformers = pytest.importorskip("transformers")

    def f(model, batch):
        assert type(batch) is transformers.BatchEncoding
        return model(batch.x).gather(1, batch["labels"][:, None])[:, 0]

    batch = transformers.BatchEncoding({"x": X, "labels": Y})
    attributor = trak_ext.Attributor(
        nn.Linear(4, 3), Task("own", f), proj_dim=8, damping=1.0, progress=False
    )
    attributor.fit([batch])
    assert attributor.attribute([batch]).shape == (9, 9)
