"""Gradients chunk by chunk: sizes do not matter, and chunks are halved when memory runs out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import trak_ext.gradients.computer
from gradient_cases import CLASSES, CLASSIFICATION, assert_same, collect, loop, make, mlp
from trak_ext.gradients import GradientComputer


@pytest.mark.parametrize("name", ["conv", "attention"])
@pytest.mark.parametrize("chunk_size", [1, 4, 6, 100])
def test_chunks_do_not_matter(name, chunk_size):
    model, batch = make(name)
    computer = GradientComputer(model, CLASSIFICATION, chunk_size=chunk_size)
    sizes = [len(part.output) for part in computer({}, batch)]
    assert sizes == {1: [1] * 6, 4: [4, 2], 6: [6], 100: [6]}[chunk_size]
    expected, _ = loop(model, model.state_dict(), batch)
    got, _ = collect(computer, {}, batch)
    assert_same(got, expected, 1e-5)


def test_small_models_go_256_at_a_time():
    computer = GradientComputer(mlp(), CLASSIFICATION)
    batch = (torch.randn(300, 5), torch.randint(0, CLASSES, (300,)))
    assert [len(part.output) for part in computer({}, batch)] == [256, 44]


def test_a_sample_is_measured_where_chunks_might_not_fit(monkeypatch):
    model = nn.Sequential(nn.Linear(5, 100), nn.Linear(100, CLASSES))
    batch = (torch.randn(30, 5), torch.randint(0, CLASSES, (30,)))
    sample = GradientComputer(model, CLASSIFICATION).sample_bytes({}, batch)
    assert sample >= 4 * sum(parameter.numel() for parameter in model.parameters())
    monkeypatch.setattr(trak_ext.gradients.computer, "TINY", 0)
    budget = 1 << (14 * sample).bit_length() - 1  # a power of two is not rounded
    monkeypatch.setattr(trak_ext.gradients.computer, "free_bytes", lambda device: 2 * budget)
    computer, size = GradientComputer(model, CLASSIFICATION), budget // sample
    assert 7 <= size <= 14
    expected = [min(size, 30 - start) for start in range(0, 30, size)]
    assert [len(part.output) for part in computer({}, batch)] == expected
    # What is left out at the front does not move the cuts of the rest.
    rest = [len(part.output) for part in computer({}, batch, skip=size)]
    assert rest == expected[1:]


def test_longer_texts_are_measured_anew():
    class Long(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(9, 50)
            self.head = nn.Linear(50, CLASSES)

        def forward(self, x):
            return self.head(torch.tanh(self.embed(x)).mean(1))

    computer = GradientComputer(Long(), CLASSIFICATION)
    short, long = (
        computer.sample_bytes({}, (torch.zeros(2, length, dtype=int), torch.zeros(2, dtype=int)))
        for length in (10, 1000)
    )
    assert long - short >= 2 * 990 * 50 * 4


class RunsOut(nn.Module):
    """An MLP that runs out of memory with more than three samples at a time, as torch does."""

    def __init__(self, limit=3):
        super().__init__()
        self.layers = mlp()
        self.limit = limit

    def forward(self, x):
        # Under vmap x is one sample; below it is the tensor of the chunk.
        inner = x
        while torch._C._functorch.is_functorch_wrapped_tensor(inner):
            inner = torch._C._functorch.get_unwrapped(inner)
        if inner.shape[0] > self.limit:
            torch.empty(2**60, dtype=torch.int8)
        return self.layers(x)


@pytest.mark.parametrize("chunk_size", [None, 6])
def test_chunks_are_halved_when_memory_runs_out(chunk_size):
    model = RunsOut()
    batch = (torch.randn(7, 5), torch.randint(0, CLASSES, (7,)))
    computer = GradientComputer(model, CLASSIFICATION, chunk_size=chunk_size)
    with pytest.warns(RuntimeWarning, match="ran out of memory with the gradients of") as caught:
        sizes = [len(part.output) for part in computer({}, batch)]
    assert len(caught) == 1
    assert sizes == [3, 3, 1]
    expected, _ = loop(model.layers, model.layers.state_dict(), batch)
    got, _ = collect(computer, {}, batch)  # it remembers: no warning
    assert_same({name[7:]: grad for name, grad in got.items()}, expected, 1e-5)


def test_one_sample_that_does_not_fit_is_an_error():
    computer = GradientComputer(RunsOut(limit=0), CLASSIFICATION)
    with pytest.raises(RuntimeError, match="memory"):
        collect(computer, {}, (torch.randn(3, 5), torch.zeros(3, dtype=torch.int64)))


def test_no_samples_give_nothing():
    computer = GradientComputer(mlp(), CLASSIFICATION)
    empty = (torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64))
    assert list(computer({}, empty)) == []
