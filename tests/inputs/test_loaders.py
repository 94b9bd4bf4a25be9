"""Going over loaders: cuts into segments, and the loaders that are refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from trak_ext.inputs.batches import segments, split_ids
from trak_ext.inputs.loaders import check_loader

CPU = torch.device("cpu")
DATA = TensorDataset(torch.arange(10.0), torch.arange(10))


@given(sizes=st.lists(st.integers(0, 9), max_size=8), boundary=st.integers(1, 12))
@settings(max_examples=80, deadline=None)
def test_segments_keep_order_and_never_cross_a_boundary(sizes, boundary):
    x = torch.arange(sum(sizes))
    batches = list(x.split(sizes)) if sizes else []
    found, position = [], 0
    for start, stop, batch, ids in segments([(b, {"y": b * 2}) for b in batches], CPU, boundary):
        assert ids is None
        assert start == position
        assert start < stop
        assert start // boundary == (stop - 1) // boundary
        assert torch.equal(batch[1]["y"], batch[0] * 2)
        found.append(batch[0])
        position = stop
    assert torch.equal(torch.cat([x[:0], *found]), x)


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=8))
@settings(max_examples=20, deadline=None)
def test_batches_are_not_cut_without_need(sizes):
    batches = [torch.zeros(size, 1) for size in sizes]
    assert [s.stop - s.start for s in segments(batches, CPU, 2**62)] == sizes


def test_samples_of_two_batches_may_differ_in_length():
    batches = [torch.zeros(2, 5), torch.zeros(3, 7)]
    shapes = [tuple(s.batch.shape) for s in segments(batches, CPU, 4)]
    assert shapes == [(2, 5), (2, 7), (1, 7)]


def test_ids_are_cut_with_their_samples():
    batches = [
        {"x": torch.zeros(3), "sample_id": ["a", "b", "c"]},
        {"x": torch.zeros(2), "sample_id": torch.tensor([7, 8])},
    ]
    found = list(segments(batches, CPU, 2))
    assert [s.ids for s in found] == [["a", "b"], ["c"], [7], [8]]
    assert all(set(s.batch) == {"x"} for s in found)


KEEPING = {
    "list": [(torch.zeros(2), torch.zeros(2))],
    "plain": DataLoader(DATA, batch_size=3),
    "drop_last": DataLoader(DATA, batch_size=3, drop_last=True),
    "sequential": DataLoader(DATA, batch_sampler=BatchSampler(SequentialSampler(DATA), 3, False)),
    "distributed": DataLoader(
        DATA, sampler=DistributedSampler(DATA, num_replicas=1, rank=0, shuffle=False)
    ),
    "whole batches": DataLoader(
        DATA, sampler=BatchSampler(SequentialSampler(DATA), 3, False), batch_size=None
    ),
}
SHUFFLING = {
    "shuffle": DataLoader(DATA, batch_size=3, shuffle=True),
    "random": DataLoader(DATA, sampler=RandomSampler(DATA)),
    "subset": DataLoader(DATA, sampler=SubsetRandomSampler(range(5))),
    "weighted": DataLoader(DATA, sampler=WeightedRandomSampler([1.0] * 10, 10)),
    "batches": DataLoader(DATA, batch_sampler=BatchSampler(RandomSampler(DATA), 3, False)),
    "distributed": DataLoader(DATA, sampler=DistributedSampler(DATA, num_replicas=1, rank=0)),
    "whole batches": DataLoader(
        DATA, sampler=BatchSampler(RandomSampler(DATA), 3, False), batch_size=None
    ),
}


@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("loader", KEEPING.values(), ids=KEEPING)
def test_loaders_that_keep_the_order_are_taken(loader, passes):
    check_loader("train_loader", loader, passes)


@pytest.mark.parametrize("loader", SHUFFLING.values(), ids=SHUFFLING)
def test_loaders_that_shuffle_are_refused(loader):
    with pytest.raises(ValueError, match=r"^train_loader: expected .*shuffle=False.*got one with"):
        check_loader("train_loader", loader, 1)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(torch.arange(5.0))


def test_iterable_datasets_are_taken():
    check_loader("train_loader", DataLoader(Stream(), batch_size=2), 2)


def test_a_generator_serves_one_pass_alone():
    check_loader("train_loader", (batch for batch in [torch.zeros(2)]), 1)
    with pytest.raises(ValueError, match=r"^test_loader: .*gone over 2 times.*one-time generator"):
        check_loader("test_loader", (batch for batch in [torch.zeros(2)]), 2)


def test_checking_takes_nothing_from_a_generator():
    batches = iter([torch.zeros(2), torch.ones(3)])
    check_loader("train_loader", batches, 1)
    assert len(list(batches)) == 2


@pytest.mark.parametrize(
    "loader",
    [None, 3, torch.zeros(3, 2), "path", {"x": 1}, DATA],
    ids=lambda loader: type(loader).__name__,
)
def test_what_is_no_loader_is_refused(loader):
    with pytest.raises(TypeError, match=r"^train_loader: expected an iterable of batches.*got a"):
        check_loader("train_loader", loader, 1)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (np.array([4, 5], dtype=np.uint8), [4, 5]),
        (np.array(["a", "bc"]), ["a", "bc"]),
        (np.array([np.str_("a"), 5], dtype=object), ["a", 5]),
        ([np.str_("a"), np.int64(5)], ["a", 5]),
        ((torch.tensor(4), "b"), [4, "b"]),
        (torch.tensor([4, 5], dtype=torch.int32), [4, 5]),
    ],
)
def test_ids_are_plain_strings_and_integers(given, expected):
    rest, ids = split_ids({"x": torch.zeros(2), "sample_id": given})
    assert ids == expected
    assert [type(value) for value in ids] == [type(value) for value in expected]
    assert set(rest) == {"x"}


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (torch.tensor([[1], [2]]), ValueError, r"expected shape \[B\], got \[2, 1\]"),
        (np.array([["a"], ["b"]]), ValueError, r"expected shape \[B\], got \[2, 1\]"),
        (np.array(3), ValueError, r"expected shape \[B\], got \[\]"),
        (torch.tensor([1.0, 2.0]), TypeError, "expected strings or integers, got a float"),
        (torch.tensor([True, False]), TypeError, "expected strings or integers, got a bool"),
        (["a", None], TypeError, "expected strings or integers, got a NoneType"),
        ("ab", TypeError, "expected strings or integers as a list, .* got a str"),
    ],
)
def test_ids_of_another_kind_are_refused(given, error, message):
    with pytest.raises(error, match="^sample_id: " + message):
        split_ids({"x": torch.zeros(2), "sample_id": given})
