"""A loader whose order changes is refused, with one checkpoint too; one that keeps it is taken."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import trak_ext
from trak_ext.inputs.loaders import check_loader

X, Y = torch.randn(24, 4, generator=torch.Generator().manual_seed(1)), torch.arange(24) % 3
DATA = TensorDataset(X, Y)
LENGTHS = [int(n) for n in torch.randint(1, 9, (24,), generator=torch.Generator().manual_seed(2))]


class Shuffles(Sampler):
    """Draws an order from whatever `draw` draws from."""

    def __init__(self, draw):
        self.draw = draw

    def __iter__(self):
        yield from sorted(range(24), key=lambda _: self.draw())

    def __len__(self):
        return 24


class LengthGrouped(Sampler):
    """Mixes, and sorts by length within groups, as trainers do."""

    def __init__(self, generator=None, seed=None):
        self.generator, self.seed = generator, seed

    def __iter__(self):
        generator = self.generator
        if self.seed is not None:
            generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(24, generator=generator).tolist()
        for start in range(0, 24, 8):
            yield from sorted(order[start : start + 8], key=LENGTHS.__getitem__)


class Buckets(Sampler):
    """A batch sampler: samples of about one length, buckets in a random order."""

    def __init__(self, shuffle_buckets):
        self.mixed = shuffle_buckets

    def __iter__(self):
        order = sorted(range(24), key=LENGTHS.__getitem__)
        buckets = [order[i : i + 4] for i in range(0, 24, 4)]
        if self.mixed:
            random.shuffle(buckets)
        yield from buckets

    def __len__(self):
        return 6


class Alternates(Sampler):
    """Forwards, backwards, forwards: its own state decides."""

    def __init__(self):
        self.forwards = False

    def __iter__(self):
        self.forwards = not self.forwards
        yield from range(24) if self.forwards else reversed(range(24))


OWN = torch.Generator().manual_seed(5)
NUMPY = np.random.default_rng(3)
CHANGING = {
    "RandomSampler": lambda: DataLoader(DATA, sampler=RandomSampler(DATA)),
    "RandomSampler, own generator": lambda: DataLoader(
        DATA, sampler=RandomSampler(DATA, generator=OWN)
    ),
    "SubsetRandomSampler": lambda: DataLoader(DATA, sampler=SubsetRandomSampler(range(9))),
    "WeightedRandomSampler": lambda: DataLoader(
        DATA, sampler=WeightedRandomSampler(torch.ones(24), 24)
    ),
    "DistributedSampler": lambda: DataLoader(
        DATA, sampler=DistributedSampler(DATA, num_replicas=2, rank=0)
    ),
    "torch": lambda: DataLoader(DATA, sampler=Shuffles(lambda: float(torch.rand(())))),
    "NumPy": lambda: DataLoader(DATA, sampler=Shuffles(NUMPY.random)),
    "random": lambda: DataLoader(DATA, sampler=Shuffles(random.random)),
    "length-grouped": lambda: DataLoader(DATA, sampler=LengthGrouped()),
    "length-grouped, own generator": lambda: DataLoader(DATA, sampler=LengthGrouped(OWN)),
    "buckets": lambda: DataLoader(DATA, batch_sampler=Buckets(True)),
    "within a batch sampler": lambda: DataLoader(
        DATA, batch_sampler=BatchSampler(LengthGrouped(), 5, False)
    ),
    "without batches": lambda: DataLoader(
        TensorDataset(X[:, None], Y[:, None]), batch_size=None, sampler=LengthGrouped()
    ),
    "alternating": lambda: DataLoader(DATA, sampler=Alternates()),
}
KEEPING = {
    "sequential": lambda: DataLoader(DATA, batch_size=5),
    "list": lambda: [(X[:9], Y[:9]), (X[9:], Y[9:])],
    "tuple": lambda: ((X, Y),),
    "length-grouped, seeded": lambda: DataLoader(DATA, sampler=LengthGrouped(seed=3)),
    "buckets": lambda: DataLoader(DATA, batch_sampler=Buckets(False)),
    "range": lambda: DataLoader(DATA, batch_size=4, sampler=range(3, 20)),
    "indices": lambda: DataLoader(DATA, sampler=[5, 3, 5, 1]),
    "distributed": lambda: DataLoader(
        DATA, sampler=DistributedSampler(DATA, num_replicas=2, rank=1, shuffle=False)
    ),
    "batches of indices": lambda: DataLoader(DATA, batch_sampler=[[1, 2], [3]]),
    "without batches": lambda: DataLoader(
        TensorDataset(X[:, None], Y[:, None]), batch_size=None, sampler=SequentialSampler(DATA)
    ),
}


def fit(loader, checkpoints=None):
    torch.manual_seed(0)
    attributor = trak_ext.Attributor(
        nn.Linear(4, 3),
        "image_classification",
        proj_dim=4,
        progress=False,
        damping=1.0,
        checkpoints=checkpoints,
    )
    attributor.fit(loader)
    return attributor


@pytest.mark.parametrize("kind", CHANGING)
def test_an_order_that_changes_is_refused_with_one_checkpoint_too(kind):
    message = r"^train_loader: expected a loader that keeps the order"
    with pytest.raises(ValueError, match=message) as error:
        fit(CHANGING[kind]())
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=message.replace("train", "test")):
        fit([(X, Y)]).attribute(CHANGING[kind]())


@pytest.mark.parametrize("kind", KEEPING)
def test_an_order_that_stays_is_taken(kind):
    one = fit(KEEPING[kind]()).attribute([(X[:3], Y[:3])])
    states = [nn.Linear(4, 3).state_dict() for _ in range(2)]
    two = fit(KEEPING[kind](), states).attribute([(X[:3], Y[:3])])
    assert len(one) == len(two) > 0


class Stream(IterableDataset):
    def __init__(self, change):
        self.change = change

    def __iter__(self):
        order = list(range(24))
        if self.change:
            random.shuffle(order)
        return ((X[i], Y[i]) for i in order)


class Reads:
    """Goes on where it was, as an open file does."""

    def __init__(self):
        self.batches = iter([(X[i : i + 4], Y[i : i + 4]) for i in range(0, 24, 4)])

    def __iter__(self):
        return self.batches


class Mixed:
    def __iter__(self):
        order = torch.randperm(24)
        yield X[order], Y[order]


class SameAgain:
    def __iter__(self):
        yield {"x": X, "labels": Y, "sample_id": [f"s{i}" for i in range(24)]}


@pytest.mark.parametrize("make", [lambda: DataLoader(Stream(True), batch_size=4), Reads, Mixed])
def test_an_iterable_that_begins_otherwise_is_refused(make):
    with pytest.raises(ValueError, match="expected an iterable that begins with the same batch"):
        check_loader("train_loader", make(), 1)


@pytest.mark.parametrize("make", [lambda: DataLoader(Stream(False), batch_size=4), SameAgain])
def test_an_iterable_that_begins_with_the_same_is_taken(make):
    check_loader("train_loader", make(), 3)


def test_a_one_time_iterator_is_taken_once():
    check_loader("train_loader", iter([(X, Y)]), 1)
    with pytest.raises(ValueError, match="can be gone over 2 times"):
        check_loader("train_loader", iter([(X, Y)]), 2)
    assert len(fit(iter([(X, Y)])).self_influence()) == 24


def test_nan_begins_as_nan_does():
    x = X.clone()
    x[0, 0] = float("nan")

    class WithNan:
        def __iter__(self):
            yield x.clone(), Y

    check_loader("train_loader", WithNan(), 1)


@pytest.mark.parametrize("kind", [*CHANGING, *KEEPING])
def test_generators_are_afterwards_where_they_were(kind):
    loader = (CHANGING if kind in CHANGING else KEEPING)[kind]()
    torch.manual_seed(7), random.seed(7), np.random.seed(7)
    own = OWN.get_state()
    try:
        check_loader("train_loader", loader, 1)
    except ValueError:
        assert kind in CHANGING
    after = torch.rand(2), random.random(), np.random.random()
    torch.manual_seed(7), random.seed(7), np.random.seed(7)
    assert torch.equal(after[0], torch.rand(2))
    assert after[1:] == (random.random(), np.random.random())
    assert torch.equal(OWN.get_state(), own)


class NeverAsked(Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, i):
        raise AssertionError("a look at the order asks for no sample")


def test_a_look_at_the_order_asks_for_no_sample():
    check_loader("train_loader", DataLoader(NeverAsked(), sampler=LengthGrouped(seed=3)), 1)


class Mixed:
    """An own iterable whose batches are mixed anew each time; `make` says what they hold."""

    def __init__(self, make, mixes=True):
        self.make, self.mixes = make, mixes

    def __iter__(self):
        order = torch.randperm(24) if self.mixes else torch.arange(24)
        yield self.make(X[order], Y[order], order.tolist())


BESIDE = {
    "ids": lambda x, y, order: (x, y, [f"n{i}" for i in order]),
    "ids by key": lambda x, y, order: {"input": x, "labels": y, "id": [f"n{i}" for i in order]},
    "ids as array": lambda x, y, order: (x, y, np.array([f"n{i}" for i in order])),
    "ids as objects": lambda x, y, order: (x, y, np.array([f"n{i}" for i in order], dtype=object)),
    "text": lambda x, y, order: {"input_ids": x, "labels": y, "text": ["a"] * 24},
    "None": lambda x, y, order: {"input_ids": x, "labels": y, "more": None},
    "text alone differs": lambda x, y, order: (X, Y, [f"n{i}" for i in order]),
}


@pytest.mark.parametrize("kind", BESIDE)
def test_what_stands_beside_tensors_does_not_hide_another_order(kind):
    with pytest.raises(ValueError, match=r"^train_loader: .*begins with the same batch every time"):
        check_loader("train_loader", Mixed(BESIDE[kind]), 1)
    check_loader("train_loader", Mixed(BESIDE[kind], mixes=False), 1)


def test_nan_in_a_batch_is_no_other_order():
    nan = float("nan")
    for batch in ((torch.tensor([nan]), [nan]), {"input_ids": np.array([nan]), "more": [nan]}):
        check_loader("train_loader", Mixed(lambda *_, batch=batch: batch), 1)
