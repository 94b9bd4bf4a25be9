"""What a store keeps of an Attributor: it is found again, and tells apart what differs."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

import trak_ext
from attributor_cases import (
    PROJ_DIM,
    attributor,
    batches,
    conv_net,
    images,
    mlp,
    states_of,
    vectors,
    vectors_of_seed,
)
from trak_ext import StoreError, reference


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(trak_ext.store.base, "shard_rows", lambda proj_dim: 8)


@pytest.mark.usefixtures("small_shards")
def test_a_store_opened_again_gives_the_same_bits(tmp_path):
    model, train, test = conv_net(), images(29), images(5)
    states = states_of(model)
    memory = attributor(model, checkpoints=states)
    first = attributor(model, checkpoints=states, store=tmp_path / "s")
    for fitted in (memory, first):
        fitted.fit(batches(train, 10))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    again = attributor(copy.deepcopy(model), checkpoints=states, store=str(tmp_path / "s"))
    scores = first.attribute([test])
    best = first.attribute([test], top_k=7)
    for other in (memory, again):
        assert torch.equal(other.attribute([test]), scores)
        assert torch.equal(other.attribute([test], top_k=7).indices, best.indices)
        assert torch.equal(other.self_influence(), first.self_influence())
    # Attributing reads only, and damping is no part of a store.
    damped = attributor(model, checkpoints=states, store=tmp_path / "s", damping=5.0)
    assert not torch.equal(damped.attribute([test]), scores)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


class Counted(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = mlp()
        self.calls = iter(range(1000))  # a model gets its attributes back, but not what they do

    def forward(self, x):
        next(self.calls)
        return self.layers(x)


@pytest.mark.usefixtures("small_shards")
def test_a_fitted_store_is_compared_and_not_computed_again(tmp_path):
    model, train = Counted(), vectors(20)
    first = attributor(model, store=tmp_path)
    first.fit([train])
    called = next(model.calls)
    assert called >= 3
    again = attributor(model, store=tmp_path, probe=False)
    again.fit([train])
    assert next(model.calls) == called + 1


def test_autocast_is_honoured_and_part_of_a_store(tmp_path):
    model, train, test = mlp(), vectors(20), vectors(3)
    plain = attributor(model)
    plain.fit([train])
    with torch.autocast("cpu", torch.bfloat16):
        fitted = attributor(model, store=tmp_path)
        fitted.fit([train])
        scores = fitted.attribute([test])
    exact = plain.attribute([test])
    assert 1e-4 < float((scores - exact).abs().max() / exact.abs().max()) < 0.1
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for use in (fitted.attribute, fitted.fit, attributor(model, store=tmp_path).fit):
        with pytest.raises(StoreError, match=r'autocast = null, got "torch\.bfloat16"'):
            use([train])
    with (
        torch.autocast("cpu", torch.float16),
        pytest.raises(StoreError, match=r'autocast = "torch\.float16", got "torch\.bfloat16"'),
    ):
        fitted.attribute([test])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attributor(model, store=tmp_path).attribute([test]), scores)
    assert {path: path.read_bytes() for path in before} == before


def test_autocast_at_fit_alone_is_refused_in_memory_as_well():
    fitted = attributor(mlp())
    with torch.autocast("cpu", torch.bfloat16):
        fitted.fit([vectors(9)])
    with pytest.raises(StoreError, match="autocast"):
        fitted.attribute([vectors(2)])


def test_parameters_in_another_order_are_another_store(tmp_path):
    # The same names and shapes, but the rows of the matrix that they meet are exchanged.
    class Scaled(nn.Module):
        def __init__(self, names):
            super().__init__()
            for name in names:
                self.register_parameter(name, nn.Parameter(torch.ones(4)))
            self.layers = mlp()

        def forward(self, x):
            return self.layers(x * self.a * self.b.square())

    first, turned = Scaled("ab"), Scaled("ba")
    turned.load_state_dict(first.state_dict())
    attributor(first, store=tmp_path).fit([vectors(9)])
    with pytest.raises(StoreError, match="params"):
        attributor(turned, store=tmp_path).attribute([vectors(2)])


class Applies(nn.Module):
    """A module whose repr shows a function, hence an address, as repr does."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def extra_repr(self):
        return f"function={self.function}"

    def forward(self, x):
        return self.function(x)


def test_a_store_does_not_depend_on_addresses(tmp_path):
    state = mlp().state_dict()
    for _ in range(2):
        model = nn.Sequential(*mlp(), Applies(lambda x: 2 * x))
        fitted = attributor(model, checkpoints=[state], store=tmp_path)
        fitted.fit([vectors_of_seed(3)])
    assert fitted.attribute([vectors(2)]).shape == (9, 2)


def test_stores_of_the_sparse_kind_say_their_nnz_and_others_say_nothing(tmp_path):
    model = mlp()
    attributor(model, kind="rademacher", store=tmp_path / "dense").fit([vectors(9)])
    assert "nnz" not in json.loads((tmp_path / "dense" / "manifest.json").read_text())
    sparse = {"kind": "sjlt", "store": tmp_path / "sparse"}
    attributor(model, nnz=2, **sparse).fit([vectors(9)])
    assert json.loads((tmp_path / "sparse" / "manifest.json").read_text())["nnz"] == 2
    attributor(model, nnz=2, **sparse).attribute([vectors(2)])
    with pytest.raises(trak_ext.StoreError, match="nnz"):
        attributor(model, nnz=4, **sparse).attribute([vectors(2)])
    with pytest.raises(ValueError, match=f"nnz: expected a positive divisor .* {PROJ_DIM}"):
        attributor(model, kind="sjlt", nnz=7)
    with pytest.raises(ValueError, match="nnz: expected 1 with kind 'rademacher'"):
        attributor(model, kind="rademacher", nnz=2)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("rademacher", {}), ("normal", {}), ("sjlt", {}), ("sjlt, nnz 2", {"nnz": 2})],
)
def test_a_store_is_opened_with_its_kind_where_none_is_given(tmp_path, kind, options):
    model, data = mlp(), [vectors(9)]
    first = attributor(model, kind=kind.partition(",")[0], **options, store=tmp_path)
    first.fit(data)
    again = attributor(model, store=tmp_path)
    assert kind in repr(again)
    again.fit(data)  # nothing is refused, nothing is made
    assert torch.equal(again.attribute(data), first.attribute(data))
    other = "normal" if kind == "rademacher" else "rademacher"
    with pytest.raises(trak_ext.StoreError, match=f"kind.*{other}"):
        attributor(model, kind=other, store=tmp_path).fit(data)


def test_without_a_store_the_kind_is_sparse_and_project_stays_dense(tmp_path):
    model, data = mlp(), [vectors(9)]
    for store in (None, tmp_path / "new"):
        usual = attributor(model, store=store)
        assert "sjlt, nnz 1" in repr(usual)
        usual.fit(data)
        named = attributor(model, kind="sjlt")
        named.fit(data)
        assert torch.equal(usual.attribute(data), named.attribute(data))
    grads = torch.randn(2, 300)
    assert torch.equal(trak_ext.project(grads, 8), trak_ext.project(grads, 8, kind="rademacher"))


def test_a_manifest_that_cannot_be_read_is_refused_when_it_is_used(tmp_path):
    model, data = mlp(), [vectors(9)]
    attributor(model, store=tmp_path).fit(data)
    (tmp_path / "manifest.json").write_text("{")
    broken = attributor(model, store=tmp_path)
    with pytest.raises(trak_ext.StoreError, match="manifest"):
        broken.attribute(data)


def test_the_manifest_says_what_made_the_store(tmp_path):
    attributor(mlp(), seed=7, kind="normal", store=tmp_path).fit([vectors(9)])
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    expected = {"seed": 7, "kind": "normal", "proj_dim": PROJ_DIM, "task": "image_classification",
                "law_version": reference.LAW_VERSION, "autocast": None}  # fmt: skip
    assert {key: manifest[key] for key in expected} == expected
