"""Gradients of embedding tables by row: as with all zeros, whatever a model does with a table."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import trak_ext
from gradient_cases import CLASSES, CLASSIFICATION, TiedText, assert_same, collect, loop
from trak_ext.attribution.features import FeatureMaker
from trak_ext.gradients import GradientComputer
from trak_ext.gradients import computer as computer_module
from trak_ext.gradients.embeddings import RowGradients
from trak_ext.inputs.batches import Segment

ROWS, WIDTH, TOKENS = 90, 6, 5


class Text(nn.Module):
    """Token and position tables, with a way to look tokens up of each kind."""

    def __init__(self, way: str = "plain") -> None:
        super().__init__()
        self.way = way
        padding = {"padding": 3, "negative padding": 3 - ROWS}.get(way)
        self.tokens = nn.Embedding(ROWS, WIDTH, padding_idx=padding)
        self.places = nn.Embedding(70, WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, tokens):
        way, table = self.way, self.tokens.weight
        places = self.places(torch.arange(tokens.shape[1]))
        if way == "no_grad":
            with torch.no_grad():
                found = self.tokens(tokens)
        elif way == "by hand":
            found = table[tokens]
        elif way == "torch.embedding":
            found = torch.embedding(table, tokens)
        elif way == "one_hot":
            found = (tokens[..., None] == torch.arange(ROWS)).to(table.dtype) @ table
        elif way == "a view":
            found = F.embedding(tokens, table * 1.5)
        elif way == "its own vmap":
            found = torch.vmap(self.tokens)(tokens.unflatten(1, (TOKENS, 1))).flatten(1, 2)
        elif way == "its own grad":
            square = torch.func.grad(lambda x: self.tokens(tokens).mul(x).square().sum())
            found = self.tokens(tokens) * square(table.new_ones(()))
        else:
            found = self.tokens(tokens)
        if way == "twice":
            found = found * self.tokens(tokens.flip(1)) + self.tokens(tokens[:, :1])
        if way == "unused":
            found = found.detach()
        mixed = torch.tanh(found + places)
        out = self.head(mixed.mean(1))
        if way == "tied":
            out = out + (mixed @ table.T).logsumexp(-1).mean(1, keepdim=True)
        if way == "summed":
            out = out * table.sum()
        return out


DENSE = ["by hand", "torch.embedding", "one_hot", "a view", "tied", "summed"]
SPARSE = ["plain", "padding", "negative padding", "twice", "its own vmap", "its own grad"]
NOTHING = ["no_grad", "unused"]


def batch(samples: int = 7, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(12, (samples, TOKENS), generator=generator) * 2 + 1  # 3 often
    tokens[0] = 5  # five times the same
    return tokens, torch.randint(CLASSES, (samples,), generator=generator)


def computers(model: nn.Module, **options):
    return [
        GradientComputer(model, CLASSIFICATION, tables_by_row=by_row, **options)
        for by_row in (False, True)
    ]


@pytest.mark.parametrize("way", DENSE + SPARSE + NOTHING)
@pytest.mark.parametrize("samples", [1, 7])
def test_equal_the_dense_ones(way, samples):
    torch.manual_seed(0)
    model = Text(way).double()
    data = batch(samples)
    expected, _ = loop(model, model.state_dict(), data)
    dense, by_row = computers(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # by vmap, not one at a time
        for computer in (dense, by_row):
            got, _ = collect(computer, {}, data)
            assert_same(got, expected, 1e-12)
        (part,) = by_row({}, data)
    assert ("tokens.weight" in part.rows) == (way in SPARSE)
    assert "places.weight" in part.rows
    assert {*part.rows, *part.grads} == set(by_row.names)
    assert not {*part.rows} & {*part.grads}


@pytest.mark.parametrize("way", SPARSE)
def test_the_rows_are_those_of_the_chunk(way):
    model = Text(way)
    data = batch()
    (part,) = GradientComputer(model, CLASSIFICATION, tables_by_row=True)({}, data)
    assert part.rows["tokens.weight"].rows.tolist() == sorted(set(data[0].reshape(-1).tolist()))
    assert part.rows["tokens.weight"].num_rows == ROWS
    assert part.rows["places.weight"].rows.tolist() == list(range(TOKENS))
    (dense,) = GradientComputer(model, CLASSIFICATION)({}, data)
    assert not dense.rows
    for name, table in part.rows.items():
        torch.testing.assert_close(table.dense(), dense.grads[name])
        if way in ("plain", "padding", "negative padding"):  # added up in the same order
            assert torch.equal(table.dense(), dense.grads[name])


def test_padding_has_no_gradient():
    model, data = Text("padding"), batch()
    assert bool((data[0] == 3).any())
    (part,) = GradientComputer(model, CLASSIFICATION, tables_by_row=True)({}, data)
    assert not bool(part.rows["tokens.weight"].dense()[:, 3].any())


def test_most_rows_are_dense():
    tokens = torch.arange(ROWS)[: 10 * TOKENS].reshape(10, TOKENS)
    (part,) = GradientComputer(Text(), CLASSIFICATION, tables_by_row=True)(
        {}, (tokens, torch.zeros(10, dtype=torch.int64))
    )
    assert list(part.rows) == ["places.weight"]


@pytest.mark.filterwarnings("ignore:trak_ext computes gradients one sample at a time")
@pytest.mark.parametrize("option", [{"max_norm": 0.5}, {"scale_grad_by_freq": True}])
def test_lookups_with_more_to_them_are_torchs(option):
    model = Text()
    model.tokens = nn.Embedding(ROWS, WIDTH, **option)
    data = batch(1)
    dense, by_row = computers(model)
    expected, _ = collect(dense, {}, data)
    (part,) = by_row({}, data)
    assert "tokens.weight" not in part.rows
    torch.testing.assert_close(part.grads["tokens.weight"], expected["tokens.weight"])


@pytest.mark.parametrize("way", ["plain", "tied", "twice"])
def test_other_weights_and_frozen_tables(way):
    model, data = Text(way), batch()
    other = {name: torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
    dense, by_row = computers(model)
    expected, _ = collect(dense, other, data)
    assert_same(collect(by_row, other, data)[0], expected, 1e-5)
    for params in (["tokens.weight"], ["head.weight", "head.bias"]):
        dense, by_row = computers(model, params=params)
        expected, _ = collect(dense, other, data)
        assert_same(collect(by_row, other, data)[0], expected, 1e-5)


def test_a_gradient_that_two_parameters_share():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens = nn.Embedding(ROWS, WIDTH)
            self.more = nn.Parameter(torch.randn(ROWS, WIDTH))
            self.head = nn.Linear(WIDTH, CLASSES)

        def forward(self, tokens):
            both = self.tokens.weight + self.more  # one gradient for the two
            return self.head(self.tokens(tokens).mean(1) + (both * both.tanh()).mean(0))

    torch.manual_seed(0)
    model, data = Sum(), batch(1)
    dense, by_row = computers(model)
    expected, _ = collect(dense, {}, data)
    assert_same(collect(by_row, {}, data)[0], expected, 1e-6)


def test_tied_weights():
    model = TiedText()
    data = (torch.randint(CLASSES, (3, 5)), torch.zeros(3, dtype=torch.int64))
    dense, by_row = computers(model)
    expected, _ = collect(dense, {}, data)
    assert_same(collect(by_row, {}, data)[0], expected, 1e-6)


def test_placed_rows():
    values = torch.arange(2 * 4 * 3.0).reshape(2, 4, 3)
    table = RowGradients(torch.tensor([2, 3, 7, 9]), values, 11)
    placed = table.placed(100)
    assert [offset for _, offset in placed] == [106, 121, 127]
    assert [part.shape[1] for part, _ in placed] == [6, 3, 3]
    whole = torch.zeros(2, 33)
    for part, offset in placed:
        whole[:, offset - 100 : offset - 100 + part.shape[1]] = part
    assert torch.equal(whole, table.dense().reshape(2, 33))


@pytest.mark.parametrize(("kind", "nnz"), [("sjlt", 1), ("sjlt", 4), ("rademacher", 1)])
def test_features_are_those_with_the_zeros(kind, nnz):
    torch.manual_seed(0)
    model, data = Text(), batch()
    segment = Segment(0, len(data[0]), data, None)
    features = []
    for computer in computers(model):
        maker = FeatureMaker(computer, 128, 2, kind, 5, "highest", nnz)
        features.append(torch.cat([made for _, made in maker({}, segment, 3)]))
    if kind == "sjlt":
        assert torch.equal(*(made.view(torch.int32) for made in features))
    else:
        torch.testing.assert_close(*features, rtol=1e-5, atol=1e-5)


def test_scores_are_those_of_dense_gradients(monkeypatch):
    torch.manual_seed(0)
    model, data = Text(), batch(40)
    rows = list(zip(*data, strict=True))
    scores = []
    for tables in (None, lambda *_: []):
        if tables is not None:
            monkeypatch.setattr(computer_module, "looked_up_tables", tables)
        attributor = trak_ext.Attributor(
            model, CLASSIFICATION, proj_dim=64, progress=False, chunk_size=16
        )
        attributor.fit(DataLoader(rows, batch_size=40))
        scores.append(attributor.attribute(DataLoader(rows[:4], batch_size=4)))
    assert torch.equal(*scores)
