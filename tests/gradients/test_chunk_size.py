"""How chunks are chosen; what happens with gradients then is in test_gradient_chunks.py."""

from __future__ import annotations

import pytest
import torch

from trak_ext.gradients import computer as chunk_size
from trak_ext.gradients.computer import ChunkSize

CPU = torch.device("cpu")
KIND = "of one shape"


class Measure:
    def __init__(self, value):
        self.value = value
        self.calls = 0

    def __call__(self):
        self.calls += 1
        return self.value


@pytest.fixture
def free(monkeypatch):
    """Sets what is free."""

    monkeypatch.setattr(chunk_size, "TINY", 0)

    def say(value):
        monkeypatch.setattr(chunk_size, "free_bytes", lambda device: value)

    return say


def test_a_given_size_is_taken_without_a_look(free):
    free(1)
    measure = Measure(10**9)
    assert ChunkSize(40).choose(CPU, 100, KIND, 10**9, 10**9, measure) == 40
    assert measure.calls == 0


@pytest.mark.parametrize(
    ("available", "expected"),
    [(2 * 10 * 64, 10), (2 * 10 * 64 - 1, 8), (0, 1), (10**6, 256), (None, 256)],
)
def test_half_of_what_is_free(free, available, expected):
    free(available)
    assert ChunkSize(None).choose(CPU, 10**6, KIND, 4, 25, Measure(64)) == expected


def test_what_is_small_is_not_measured(free):
    measure = Measure(0)
    free(2 * 1024 * 256 * 16)
    assert ChunkSize(None).choose(CPU, 300, KIND, 8, 8, measure) == 256
    assert measure.calls == 0
    ChunkSize(None).choose(CPU, 300, KIND, 8, 9, measure)
    assert measure.calls == 1


def test_nobody_asks_what_is_free_for_a_tiny_model(monkeypatch):
    def ask(device):
        raise AssertionError("asked")

    monkeypatch.setattr(chunk_size, "free_bytes", ask)
    most = chunk_size.TINY // chunk_size.SAFE // 256
    assert ChunkSize(None).choose(CPU, 300, KIND, 8, most - 8, Measure(0)) == 256
    with pytest.raises(AssertionError, match="asked"):
        ChunkSize(None).choose(CPU, 300, KIND, 8, most - 7, Measure(0))


def test_each_kind_of_sample_is_measured_once_whatever_came_before(free):
    free(2 * 7 * 1024)
    sizes = {"short": 64, "long": 512, "longest": 10**6}
    expected = {"short": 112, "long": 14, "longest": 1}

    def chosen(order):
        chooser, measures = ChunkSize(None), {kind: Measure(sizes[kind]) for kind in sizes}
        found = {k: chooser.choose(CPU, 999, k, 8, 25, measures[k]) for k in (*order, *order)}
        assert [measure.calls for measure in measures.values()] == [1, 1, 1]
        return found

    for order in (sizes, reversed(list(sizes))):
        assert chosen(list(order)) == expected


def test_what_is_free_is_asked_once_or_said_by_another_run(free):
    free(2 * 7 * 1024)
    chooser = ChunkSize(None)
    assert chooser.choose(CPU, 999, KIND, 8, 25, Measure(512)) == 14
    free(1)
    assert chooser.choose(CPU, 999, KIND, 8, 25, Measure(512)) == 14
    other = ChunkSize(None)
    other.use_budget(chooser.budget(CPU))
    assert other.choose(CPU, 999, KIND, 8, 25, Measure(512)) == 14


@pytest.mark.parametrize(
    ("available", "budget"), [(2 * 1023, 896), (2 * 1024, 1024), (2**40, 2**28), (0, 0), (6, 3)]
)
def test_a_budget_has_three_significant_bits(free, available, budget):
    free(available)
    assert ChunkSize(None).budget(CPU) == budget


@pytest.mark.parametrize("given", [None, 64])
def test_halving_lasts_and_is_said_once(free, given):
    free(10**9)
    chooser = ChunkSize(given)
    with pytest.warns(RuntimeWarning, match="with the gradients of 64 samples at a time") as caught:
        halves = [chooser.halve(tried) for tried in (64, 3)]
    assert halves == [32, 1]
    assert len(caught) == 1
    assert chooser.choose(CPU, 99, KIND, 8, 25, Measure(1)) == 1
