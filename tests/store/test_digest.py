"""Digests tell apart what differs and nothing else."""

from __future__ import annotations

from collections import UserDict, namedtuple
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trak_ext.inputs.batches import SampleDigest, tensor_bytes
from trak_ext.inputs.checkpoints import state_digest
from trak_ext.store.base import settings_digest


def digest_of(*batches):
    digest = SampleDigest()
    for batch in batches:
        digest.update(list(batch))
    return digest.hexdigest()


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor([[1, 2], [3, 4]], dtype=torch.int16),
        torch.tensor([[1, 3], [2, 4]], dtype=torch.int16).T,
        torch.tensor([[1, 2, 0], [3, 4, 0]], dtype=torch.int16)[:, :2],
    ],
    ids=["plain", "transposed", "strided"],
)
def test_bytes_are_row_major_whatever_the_strides(tensor):
    assert bytes(tensor_bytes(tensor)) == b"\1\0\2\0\3\0\4\0"


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (torch.tensor(1.0, requires_grad=True), b"\0\0\x80\x3f"),
        (torch.tensor([1.0], dtype=torch.bfloat16), b"\x80\x3f"),
        (torch.tensor([True, False]), b"\1\0"),
        (torch.zeros(0, 3), b""),
    ],
    ids=["scalar with grad", "bf16", "bool", "empty"],
)
def test_bytes_of_any_tensor(tensor, expected):
    assert bytes(tensor_bytes(tensor)) == expected


@given(data=st.data(), count=st.integers(1, 12))
@settings(max_examples=40, deadline=None)
def test_the_cut_into_batches_does_not_matter(data, count):
    x = torch.randn(count, 2, 3)
    y = torch.arange(count)
    cuts = sorted(data.draw(st.sets(st.integers(0, count), max_size=count)))
    edges = [0, *cuts, count]
    pieces = [(x[a:b], y[a:b]) for a, b in pairwise(edges)]
    assert digest_of(*pieces) == digest_of((x, y))


def test_samples_without_values():
    assert digest_of((torch.zeros(2, 0), torch.arange(2))) != digest_of(
        (torch.zeros(3, 0), torch.arange(3))
    )
    assert digest_of((torch.zeros(0, 4), torch.zeros(0))) == digest_of()


def changed(x, y):
    flipped = x.clone()
    flipped.view(torch.int32)[3, 1] ^= 1  # one bit
    yield "one bit", (flipped, y)
    yield "order", (x.flip(0), y.flip(0))
    yield "two samples swapped", (x[[0, 2, 1, 3]], y[[0, 2, 1, 3]])
    yield "labels", (x, y + 1)
    yield "dtype", (x.view(torch.int32), y)
    yield "dtype of labels", (x, y.to(torch.int32))
    yield "shape", (x.reshape(4, 3, 1), y)
    yield "fewer", (x[:3], y[:3])
    yield "more", (torch.cat([x, x[:1]]), torch.cat([y, y[:1]]))
    yield "without labels", (x,)
    yield "fields swapped", (y, x)
    yield "minus zero", (torch.where(x == 0, -x, x), y)


CHANGES = [
    "one bit",
    "order",
    "two samples swapped",
    "labels",
    "dtype",
    "dtype of labels",
    "shape",
    "fewer",
    "more",
    "without labels",
    "fields swapped",
    "minus zero",
]


@pytest.mark.parametrize("change", CHANGES)
def test_samples_that_differ_have_another_digest(change):
    x, y = torch.randn(4, 3), torch.arange(4)
    x[2, 2] = 0.0
    assert digest_of(dict(changed(x, y))[change]) != digest_of((x, y))


def test_a_value_cannot_move_to_the_next_sample():
    # The same bytes in the same order, cut into samples at other places.
    long_short = [(torch.arange(3.0)[None],), (torch.tensor([[3.0]]),)]
    short_long = [(torch.tensor([[0.0]]),), (torch.arange(1.0, 4.0)[None],)]
    assert digest_of(*long_short) != digest_of(*short_long)


def of_batch(*batches):
    digest = SampleDigest()
    for batch in batches:
        digest.add(batch)
    return digest.hexdigest()


class Pair(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


def test_keys_and_containers_are_in_the_digest():
    x, y = torch.randn(4, 3), torch.arange(4)
    batches = [
        (x, y),
        {"x": x, "y": y},
        {"x": x, "z": y},
        {"y": y, "x": x},
        {"x": x, 1: y},
        {"x": x, "1": y},
        {"x": {"y": x}, "z": y},
        ({"x": x}, y),
        ((x,), y),
        ((x, y),),
        Pair(x, y),
    ]
    assert len({of_batch(batch) for batch in batches}) == len(batches)
    # A class may have another name in another session; its fields stay.
    again = namedtuple("again", "x y")
    assert of_batch(again(x, y)) == of_batch(Pair(x, y))
    assert of_batch(UserDict({"x": x, "y": y})) == of_batch({"x": x, "y": y})
    # Loaders give lists where tuples are meant.
    assert of_batch([x, y]) == of_batch((x, y))
    parts = ({"x": x[a:b], "y": y[a:b]} for a, b in ((0, 1), (1, 4)))
    assert of_batch(*parts) == of_batch({"x": x, "y": y})


def test_state_digest():
    state = {"a": torch.randn(2, 3), "b": torch.zeros((), dtype=torch.int64)}
    digest = state_digest(state)
    assert digest == state_digest(dict(reversed(state.items())))
    assert digest == state_digest({**state, "a": state["a"].T.contiguous().T})
    others = [
        {**state, "a": state["a"] + 1e-6},
        {**state, "a": state["a"].reshape(3, 2)},
        {**state, "a": state["a"].view(torch.int32)},
        {**state, "b": torch.ones((), dtype=torch.int64)},
        {"a": state["a"]},
        {"c": state["a"], "b": state["b"]},
        {**state, "c": torch.zeros(0)},
    ]
    assert len({digest, *map(state_digest, others)}) == 1 + len(others)


def test_settings_digest():
    digest = settings_digest({"a": 1, "b": {"c": [1, 2]}})
    assert digest == settings_digest({"b": {"c": [1, 2]}, "a": 1})
    others = [{"a": 1}, {"a": 1, "b": {"c": [2, 1]}}, {"a": "1", "b": {"c": [1, 2]}}, {}]
    assert len({digest, *map(settings_digest, others)}) == 5
