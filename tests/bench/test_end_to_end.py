"""bench/end_to_end.py in small: the peers are called so that they score as trak_ext does."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import end_to_end
import end_to_end_compare
import end_to_end_models
import end_to_end_peers
from trak_ext import Attributor

# Other libraries' warnings are theirs.
pytestmark = pytest.mark.filterwarnings("ignore")

SAMPLES, TARGETS, PROJ_DIM = 24, 8, 1024


def tiny_images(generator, samples):
    model = nn.Sequential(
        nn.Conv2d(3, 2, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(8, 5),
    )  # fmt: skip
    images = torch.randn(samples, 3, 8, 8, generator=generator)
    labels = torch.randint(5, (samples,), generator=generator)
    return model, "image_classification", list(zip(images, labels, strict=True))


def tiny_bert(generator, samples):
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=16, hidden_size=4, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8, max_position_embeddings=6, num_labels=2,
    )  # fmt: skip
    ids = torch.randint(16, (samples, 6), generator=generator)
    labels = torch.randint(2, (samples,), generator=generator)
    rows = [
        {"input_ids": one, "attention_mask": torch.ones_like(one), "labels": label}
        for one, label in zip(ids, labels, strict=True)
    ]
    return BertForSequenceClassification(config), "text_classification", rows


def tiny_gpt2(generator, samples):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=16, n_positions=6, n_embd=4, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    ids = torch.randint(16, (samples, 6), generator=generator)
    rows = [
        {"input_ids": one, "attention_mask": torch.ones_like(one), "labels": one} for one in ids
    ]
    return GPT2LMHeadModel(config), "causal_lm", rows


TINY = {"resnet9": tiny_images, "bert": tiny_bert, "gpt2": tiny_gpt2}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    for name, make in TINY.items():
        monkeypatch.setitem(end_to_end_models.MODELS, name, make)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def ours(model_name):
    """Return our scores with the damping that the peers are given."""
    model, task, rows = end_to_end_models.make(model_name, SAMPLES + TARGETS)
    attributor = Attributor(
        model, task, kind="normal", proj_dim=PROJ_DIM, damping=1.0, curvature=None, progress=False
    )
    attributor.fit(DataLoader(rows[:SAMPLES], batch_size=16))
    return attributor.attribute(DataLoader(rows[SAMPLES:], batch_size=16))


def skip_without(peer, model):
    if end_to_end_peers.version(peer) is None:
        pytest.skip(f"{peer} is not installed")
    if model != "resnet9":
        pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.mark.parametrize("model", TINY)
@pytest.mark.parametrize("peer", ["traker", "dattri"])
def test_trak_of_others_scores_as_ours_does(peer, model):
    skip_without(peer, model)
    scores, took = end_to_end_compare.run(peer, model, SAMPLES, TARGETS, 16, PROJ_DIM)
    assert end_to_end_compare.spearman(scores, ours(model)) > 0.9
    assert took["wall"] > 0


@pytest.mark.parametrize(
    ("peer", "model"),
    [("kronfluence", "resnet9"), ("kronfluence", "bert"), ("kronfluence, no head", "gpt2")],
)
def test_ekfac_agrees_with_ours(peer, model):
    skip_without("kronfluence", model)
    scores, _ = end_to_end_compare.run(peer, model, SAMPLES, TARGETS, 16, PROJ_DIM)
    assert end_to_end_compare.spearman(scores, ours(model)) > 0.3


def test_the_fastest_batch_size_is_taken(monkeypatch):
    walls = {8: 3.0, 16: 1.0, 24: 2.0}

    def run(contender, model, samples, targets, batch, proj_dim):
        return torch.zeros(samples, targets), {"wall": walls[batch]}

    monkeypatch.setattr(end_to_end_compare, "run_apart", run)
    setting = ("kronfluence", "bert", 24, 8)
    assert end_to_end_compare.fastest_batch(*setting, [8, 16, 64], 64) == (16, walls)
    assert end_to_end_compare.fastest_batch(*setting, [64, 128], 64) == (24, {})


def test_table_of_peers(monkeypatch, capsys):
    monkeypatch.setattr(end_to_end_compare, "run_apart", end_to_end_compare.run)
    monkeypatch.setitem(end_to_end_peers.PEERS, "no-such-library", "none")
    args = end_to_end.parse(
        f"--models resnet9 --samples {SAMPLES} --peer-samples 12 --targets {TARGETS} --repeats 2 "
        "--peers dattri".split()
    )
    args.peers = [*args.peers, "no-such-library"]
    rows = end_to_end_compare.measure(args, 256)["resnet9"]["contenders"]
    said = capsys.readouterr().out
    assert "no-such-library is left out: it is not installed" in said
    assert "resnet9: to scores of 8 targets" in said
    if end_to_end_peers.version("dattri") is not None:
        names = ["trak_ext", "trak_ext rademacher"]
        assert [row["name"] for row in rows] == [*names, *names, "dattri"]
        assert [row["samples"] for row in rows] == [24, 24, 12, 12, 12]
    for row in rows:
        assert len(row["runs"]) == 2
        assert math.isfinite(row["ratio"])
        if row["name"] == "trak_ext":
            assert row["ratio"] == 1
            assert row["spearman"] == pytest.approx(1)


def test_each_model_of_the_bench_is_what_it_says(monkeypatch):
    pytest.importorskip("transformers", reason="transformers is not installed")
    monkeypatch.undo()
    sizes = {}
    for name in end_to_end_models.MODELS:
        model, _, rows = end_to_end_models.make(name, 3)
        sizes[name] = round(sum(p.numel() for p in model.parameters()) / 1e6, 1)
        assert len(rows) == 3
        assert not model.training
    assert sizes == {"resnet9": 1.0, "bert": 5.4, "gpt2": 2.1}


def test_gradients_fit_and_attribute_are_measured():
    for what in ("4", "sjlt", "attribute rademacher"):
        took = end_to_end.run("resnet9", what, 8)
        assert took["wall"] > 0
        assert took["params"] == 101
