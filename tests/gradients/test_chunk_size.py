"""How chunks are chosen; what happens with gradients then is in test_gradient_chunks.py."""

from __future__ import annotations

import pytest
import torch

from trak_ext.gradients import computer as chunk_size
from trak_ext.gradients.computer import ChunkSize

CPU = torch.device("cpu")


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
    assert ChunkSize(40).choose(CPU, 100, 10**9, 10**9, measure) == 40
    assert measure.calls == 0


@pytest.mark.parametrize(
    ("available", "expected"),
    [(2 * 10 * 50, 10), (2 * 10 * 50 - 1, 9), (0, 1), (10**6, 256), (None, 256)],
)
def test_half_of_what_is_free(free, available, expected):
    free(available)
    assert ChunkSize(None).choose(CPU, 10**6, 4, 25, Measure(50)) == expected


def test_what_is_small_is_not_measured(free):
    measure = Measure(0)
    free(2 * 1000 * 256 * 20)
    assert ChunkSize(None).choose(CPU, 300, 8, 12, measure) == 256
    assert measure.calls == 0
    ChunkSize(None).choose(CPU, 300, 8, 13, measure)
    assert measure.calls == 1


def test_nobody_asks_what_is_free_for_a_tiny_model(monkeypatch):
    def ask(device):
        raise AssertionError("asked")

    monkeypatch.setattr(chunk_size, "free_bytes", ask)
    most = chunk_size.TINY // chunk_size.SAFE // 256
    assert ChunkSize(None).choose(CPU, 300, 8, most - 8, Measure(0)) == 256
    with pytest.raises(AssertionError, match="asked"):
        ChunkSize(None).choose(CPU, 300, 8, most - 7, Measure(0))


def test_only_larger_samples_are_measured_again(free):
    free(10_000)
    chooser, measure = ChunkSize(None), Measure(100)
    assert chooser.choose(CPU, 99, 8, 25, measure) == 50
    free(1)  # asked once
    measure.value = 500
    assert chooser.choose(CPU, 99, 8, 25, measure) == 50
    assert chooser.choose(CPU, 99, 4, 25, measure) == 50
    assert measure.calls == 1
    assert chooser.choose(CPU, 99, 9, 25, measure) == 10
    assert chooser.choose(CPU, 99, 8, 25, measure) == 10
    assert measure.calls == 2


@pytest.mark.parametrize("given", [None, 64])
def test_halving_lasts_and_is_said_once(free, given):
    free(10**9)
    chooser = ChunkSize(given)
    with pytest.warns(RuntimeWarning, match="with the gradients of 64 samples at a time") as caught:
        halves = [chooser.halve(tried) for tried in (64, 3)]
    assert halves == [32, 1]
    assert len(caught) == 1
    assert chooser.choose(CPU, 99, 8, 25, Measure(1)) == 1
