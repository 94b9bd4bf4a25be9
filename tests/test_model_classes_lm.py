"""Language models with ragged samples, under Attributor, against brute force without padding."""

from __future__ import annotations

import brute_force
import pytest
import torch

transformers = pytest.importorskip("transformers")

VOCABULARY = 40


def lengths_mask(lengths, width):
    return torch.arange(width)[None] < torch.tensor(lengths)[:, None]


def sentences(lengths, prompt=0):
    """A batch for a causal model: the first `prompt` tokens and padding are no targets."""
    mask = lengths_mask(lengths, max(lengths))
    ids = torch.where(mask, torch.randint(3, VOCABULARY, mask.shape), 0)
    labels = torch.where(mask, ids, -100)
    labels[:, :prompt] = -100
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}


def pairs(sources, targets):
    """A batch for a seq2seq model; the padding of the labels is -100."""
    source, target = lengths_mask(sources, max(sources)), lengths_mask(targets, max(targets))
    return {
        "input_ids": torch.where(source, torch.randint(3, VOCABULARY, source.shape), 0),
        "attention_mask": source.long(),
        "labels": torch.where(target, torch.randint(3, VOCABULARY, target.shape), -100),
    }


def gpt2(**changes):
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=16, **changes
        )
    )


def llama():
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=32,
            max_position_embeddings=16,
        )
    )


def t5():
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
    )
    return transformers.T5ForConditionalGeneration(config)


def mt5(tied=False):
    config = transformers.MT5Config(
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        feed_forward_proj="gated-gelu",
    )
    config.tie_word_embeddings = tied  # transformers 5 sets it whatever is asked for
    return transformers.MT5ForConditionalGeneration(config)


CAUSAL = {"gpt2": gpt2, "llama": llama}
SEQ2SEQ = {"t5": t5, "mt5": mt5, "tied mt5": lambda: mt5(tied=True)}


@pytest.mark.parametrize("name", CAUSAL)
def test_causal(name):
    train = [sentences([7, 3, 5]), sentences([4, 9, 6], prompt=2), sentences([2, 5])]
    targets = [sentences([6, 3, 8])]
    brute_force.assert_scores(CAUSAL[name](), "causal_lm", train, targets, brute_force.causal_lm)


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_seq2seq(name):
    train = [pairs([7, 3, 5], [2, 4, 3]), pairs([2, 6], [5, 1]), pairs([4, 4, 4], [3, 2, 6])]
    targets = [pairs([6, 2], [3, 5])]
    model = SEQ2SEQ[name]()
    brute_force.assert_scores(model, "seq2seq_lm", train, targets, brute_force.seq2seq_lm)


def test_tied_weights_count_once():
    names = [name for name, _ in gpt2().named_parameters()]
    assert "transformer.wte.weight" in names
    assert "lm_head.weight" not in names
    untied = {name for name, _ in mt5().named_parameters()}
    assert {"shared.weight", "lm_head.weight"} <= untied
