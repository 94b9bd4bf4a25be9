"""Batches, containers, samplers and labels drawn at random, at the public boundary.

Each is right, as a plain loader of the same samples is, or refused in one sentence.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict, UserDict, namedtuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import trak_ext

CLASSES = 3
SLOWLY = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
Pair = namedtuple("Pair", "inputs labels")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, CLASSES)

    def forward(self, x=None, **more):
        return self.layer((more["pixel_values"] if x is None else x).float())


def run(loader, targets):
    """Return scores, or the one sentence of a refusal."""
    torch.manual_seed(0)
    attributor = trak_ext.Attributor(
        Net(), "image_classification", proj_dim=8, damping=1.0, progress=False
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            attributor.fit(loader)
            return attributor.attribute(targets)
        except (ValueError, TypeError) as error:
            text = str(error)
            assert "expected" in text
            assert "got" in text
            assert "\n" not in text
            return text


def samples(count, seed, low=0, high=CLASSES):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, generator=generator)
    return x, torch.randint(low, high, (count,), generator=generator)


CONTAINERS = {
    "tuple": lambda x, y: (x, y),
    "list": lambda x, y: [x, y],
    "named tuple": Pair,
    "dict": lambda x, y: {"x": x, "labels": y},
    "label": lambda x, y: {"label": y, "x": x},
    "ordered": lambda x, y: OrderedDict(labels=y, x=x),
    "UserDict": lambda x, y: UserDict({"x": x, "labels": y}),
    "arrays": lambda x, y: (x.numpy(), y.numpy()),
    "array of labels": lambda x, y: {"x": x, "labels": y.numpy().astype(np.int32)},
    "ids": lambda x, y: (x, y, list(range(len(y)))),
    "ids of text": lambda x, y: {"x": x, "labels": y, "id": [f"n{i}" for i in range(len(y))]},
    "idx": lambda x, y: {"x": x, "labels": y, "idx": torch.arange(len(y))},
    "Hugging Face": lambda x, y: {"pixel_values": x, "labels": y, "text": ["a"] * len(y)},
}
REFUSED = {
    "text": lambda x, y: {"x": x, "labels": y, "name": ["a"] * len(y)},
    "None": lambda x, y: (x, None),
    "numbers": lambda x, y: (x.tolist(), y),
    "short": lambda x, y: (x, y[:-1]),
    "one label": lambda x, y: (x, y[0]),
    "four": lambda x, y: (x, y, y, y),
    "floats": lambda x, y: (x, y.float()),
    "vectors": lambda x, y: (x, nn.functional.one_hot(y, CLASSES)),
    "bare": lambda x, y: x,
    "objects": lambda x, y: (x, np.array([object()] * len(y))),
}


@SLOWLY
@given(
    sizes=st.lists(st.integers(0, 7), min_size=1, max_size=5),
    kinds=st.lists(st.sampled_from(sorted(CONTAINERS)), min_size=1, max_size=2),
    seed=st.integers(0, 99),
)
def test_containers_and_batch_sizes(sizes, kinds, seed):
    x, y = samples(sum(sizes), seed)
    batches = list(zip(x.split(sizes), y.split(sizes), strict=True))
    kind, *other = kinds
    made = [CONTAINERS[kind](*batch) for batch in batches]
    got = run(made, [CONTAINERS[(other or kinds)[0]](*samples(3, 100))])
    if sum(sizes) == 0:
        assert isinstance(got, str) or len(got) == 0
        return
    expected = run([(x, y)], [samples(3, 100)])
    assert not isinstance(got, str), got
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@SLOWLY
@given(kind=st.sampled_from(sorted(REFUSED)), place=st.integers(0, 2), seed=st.integers(0, 99))
def test_what_is_no_batch_is_refused_wherever_it_comes(kind, place, seed):
    batches = [samples(4, seed + i) for i in range(3)]
    batches[place] = REFUSED[kind](*batches[place])
    assert isinstance(run(batches, [samples(3, 100)]), str)
    good = [samples(4, seed)]
    assert isinstance(run(good, [REFUSED[kind](*samples(3, 100))]), str)


@SLOWLY
@given(
    labels=st.lists(st.integers(-3, 5) | st.sampled_from([-100, 255, 2**40]), min_size=2),
    dtype=st.sampled_from([torch.int64, torch.int32, torch.int16, torch.uint8]),
)
def test_labels(labels, dtype):
    if not all(torch.iinfo(dtype).min <= label <= torch.iinfo(dtype).max for label in labels):
        return
    y = torch.tensor(labels, dtype=dtype)
    x, _ = samples(len(y), 1)
    got = run([(x, y)], [samples(3, 100)])
    wrong = sorted({label for label in labels if not 0 <= label < CLASSES})
    if wrong:
        assert isinstance(got, str)
        assert got.startswith(f"labels: expected classes from 0 to {CLASSES - 1}")
        assert str(wrong[0]) in got
        return
    torch.testing.assert_close(got, run([(x, y.long())], [samples(3, 100)]))


@SLOWLY
@given(
    order=st.lists(st.integers(0, 11), min_size=1, max_size=15),
    second=st.none() | st.lists(st.integers(0, 11), min_size=1, max_size=15),
    batch_size=st.integers(1, 6),
    drop_last=st.booleans(),
)
def test_samplers(order, second, batch_size, drop_last):
    looks = iter(range(10**6))

    class Given:
        def __iter__(self):
            first_time = next(looks) % 2 == 0
            return iter(order if first_time or second is None else second)

        def __len__(self):
            return len(order)

    x, y = samples(12, 7)
    loader = DataLoader(
        TensorDataset(x, y), batch_size=batch_size, sampler=Given(), drop_last=drop_last
    )
    got = run(loader, [samples(3, 100)])
    kept = order[: len(order) // batch_size * batch_size] if drop_last else order
    other = None if second is None else second[: len(second) // batch_size * batch_size]
    seen = kept if second is None else (other if drop_last else second)
    if seen != kept:
        assert isinstance(got, str)
        assert "keeps the order" in got
    elif kept:
        expected = run([(x[kept], y[kept])], [samples(3, 100)])
        if isinstance(expected, str):
            assert got == expected
        else:
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    else:
        assert isinstance(got, str) or len(got) == 0


@pytest.mark.parametrize("where", ["fit", "attribute"])
@pytest.mark.parametrize("loader", [[], [samples(0, 1)], [samples(0, 1), samples(0, 2)]], ids=len)
def test_empty_loaders(where, loader):
    got = run(*(([*loader], [samples(2, 3)]) if where == "fit" else ([samples(9, 3)], loader)))
    if where == "fit":
        assert isinstance(got, str), got
        assert "train_loader" in got
    else:
        assert isinstance(got, str) or got.shape == (9, 0)
