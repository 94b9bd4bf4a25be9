"""Language models with ragged samples, under Attributor, against brute force without padding."""

from __future__ import annotations

import pytest
import torch

import brute_force
from trak_ext import Attributor
from trak_ext.gradients import GradientComputer
from trak_ext.tasks import TASKS, token_targets

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


def padded(batch, more):
    """The batch with more padding at the end of every text."""
    fill = {"labels": -100}
    return {
        key: torch.nn.functional.pad(value, (0, more), value=fill.get(key, 0))
        for key, value in batch.items()
    }


def all_gradients(model, task, batch):
    parts = list(GradientComputer(model, TASKS[task])({}, batch))
    grads = [torch.cat([part.grads[name] for part in parts]) for name in parts[0].grads]
    return torch.cat([grad.flatten(1) for grad in grads], 1), parts


@pytest.mark.parametrize("name", [*CAUSAL, *SEQ2SEQ])
def test_padding_does_not_change_gradients(name):
    causal = name in CAUSAL
    model = (CAUSAL if causal else SEQ2SEQ)[name]()
    task, batch = (
        ("causal_lm", sentences([7, 3, 5]))
        if causal
        else (
            "seq2seq_lm",
            pairs([7, 3, 5], [2, 4, 3]),
        )
    )
    expected, parts = all_gradients(model, task, batch)
    got, more = all_gradients(model, task, padded(batch, 4))
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
    torch.testing.assert_close(more[0].weight, parts[0].weight, rtol=1e-5, atol=1e-6)


def test_a_text_without_padding_among_ones_with_padding():
    # Hugging Face models take another way when a whole batch is without padding.
    for name, make in CAUSAL.items():
        model, batch = make(), sentences([6, 6])
        without_mask = {key: value for key, value in batch.items() if key != "attention_mask"}
        expected, _ = all_gradients(model, "causal_lm", without_mask)
        got, _ = all_gradients(model, "causal_lm", batch)
        assert (got - expected).abs().max() <= 1e-5 * expected.abs().max(), name


def test_gradient_of_a_tied_weight_is_that_of_both_uses():
    model = gpt2().eval()
    assert model.lm_head.weight is model.transformer.wte.weight
    batch = sentences([7, 5])
    grads, (part,) = all_gradients(model, "causal_lm", batch)
    assert grads.shape[1] == sum(parameter.numel() for parameter in model.parameters())
    for i, sample in enumerate(brute_force.rows([batch])):
        f, _ = brute_force.causal_lm(model, sample)
        (expected,) = torch.autograd.grad(f, [model.lm_head.weight])
        got = part.grads["transformer.wte.weight"][i]
        assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [*CAUSAL, *SEQ2SEQ])
def test_half_precision_weights(name, dtype):
    causal = name in CAUSAL
    model = (CAUSAL if causal else SEQ2SEQ)[name]().to(dtype)
    batch = sentences([7, 3]) if causal else pairs([7, 3], [2, 4])
    attributor = Attributor(
        model, "causal_lm" if causal else "seq2seq_lm", proj_dim=8, progress=False
    )
    attributor.fit([batch])
    assert attributor.attribute([batch]).isfinite().all()


def test_a_model_is_left_as_it_was():
    model = gpt2(attn_implementation="sdpa").train()
    before, state = model.config.to_dict(), {k: v.clone() for k, v in model.state_dict().items()}
    all_gradients(model, "causal_lm", sentences([7, 3]))
    assert model.config.to_dict() == before
    assert model.config._attn_implementation == "sdpa"
    assert model.config.use_cache
    assert all(module.training for module in model.modules())
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


def test_a_target_may_be_one_token_of_a_sample():
    model, batch = gpt2(), sentences([7, 3, 5])
    each, sample = token_targets(batch, causal=True)
    assert sample.bincount().tolist() == [6, 2, 4]
    tokens, _ = all_gradients(model, "causal_lm_token", each)
    whole, _ = all_gradients(model, "causal_lm", batch)
    added = torch.zeros_like(whole).index_add(0, sample, tokens)
    assert (added - whole).abs().max() <= 1e-5 * whole.abs().max()


def test_tied_weights_count_once():
    names = [name for name, _ in gpt2().named_parameters()]
    assert "transformer.wte.weight" in names
    assert "lm_head.weight" not in names
    untied = {name for name, _ in mt5().named_parameters()}
    assert {"shared.weight", "lm_head.weight"} <= untied
