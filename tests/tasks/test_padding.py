"""The same texts alone, padded on the right and on the left score the same; heads that cannot."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import trak_ext
from trak_ext.tasks import token_targets

transformers = pytest.importorskip("transformers")

VOCABULARY = 23
GENERATOR = torch.Generator().manual_seed(1)
LENGTHS = torch.randint(3, 9, (10,), generator=GENERATOR).tolist()
TEXTS = [torch.randint(1, VOCABULARY, (n,), generator=GENERATOR) for n in LENGTHS]
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2}


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=16
    )
    return transformers.GPT2LMHeadModel(config)


def llama():
    config = transformers.LlamaConfig(**SMALL, intermediate_size=24, num_attention_heads=2)
    return transformers.LlamaForCausalLM(config)


def neox():
    config = transformers.GPTNeoXConfig(**SMALL, intermediate_size=24, num_attention_heads=2)
    return transformers.GPTNeoXForCausalLM(config)


def opt():
    config = transformers.OPTConfig(
        **SMALL, ffn_dim=24, num_attention_heads=2, word_embed_proj_dim=16, dropout=0.0,
        max_position_embeddings=16,
    )  # fmt: skip
    return transformers.OPTForCausalLM(config)


def bert_as_decoder():
    config = transformers.BertConfig(
        **SMALL, intermediate_size=24, num_attention_heads=2, is_decoder=True
    )
    return transformers.BertLMHeadModel(config)


class Own(nn.Module):
    """A module of one's own, with absolute positions and a mask, that returns logits alone."""

    def __init__(self):
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, 16), nn.Embedding(16, 16)
        self.query, self.key = nn.Linear(16, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, VOCABULARY)

    def forward(self, input_ids, attention_mask, position_ids):
        x = self.tokens(input_ids) + self.places(position_ids)
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        seen = causal & (attention_mask != 0)[:, None]
        scores = (self.query(x) @ self.key(x).transpose(1, 2)).masked_fill(~seen, -1e9)
        return self.head(scores.softmax(-1) @ x)


MODELS = [gpt2, llama, neox, opt, bert_as_decoder, Own]


def padded(side, texts=TEXTS, width=8, labels=-100):
    def pad(values, value):
        missing = width - len(values)
        where = (0, missing) if side == "right" else (missing, 0)
        return nn.functional.pad(values, where, value=value)

    return {
        "input_ids": torch.stack([pad(text, 3) for text in texts]),
        "attention_mask": torch.stack([pad(torch.ones_like(text), 0) for text in texts]),
        "labels": torch.stack([pad(text, labels) for text in texts]),
    }


def alone():
    return [padded("right", [text], len(text)) for text in TEXTS]


def fitted(make, task, loader):
    torch.manual_seed(3)
    model = make().double()
    attributor = trak_ext.Attributor(model, task, proj_dim=16, damping=1.0, progress=False)
    attributor.fit(loader)
    return attributor


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("labels", [-100, 3])  # 3: the pads' own token, as some collators leave it
def test_padding_moves_no_score(make, labels):
    found = []
    for loader in (alone(), [padded("right", labels=labels)], [padded("left", labels=labels)]):
        found_by = fitted(make, "causal_lm", loader)
        found.append((found_by.attribute(alone()[:3]), found_by.self_influence()))
        found.append((found_by.attribute([padded("left", TEXTS[:3])]), found_by.self_influence()))
    for scores, influence in found[1:]:
        torch.testing.assert_close(scores, found[0][0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(influence, found[0][1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [gpt2, llama, Own])
def test_padding_moves_no_score_of_a_token(make):
    found = []
    for side in ("right", "left"):
        batch, sample = token_targets(padded(side), causal=True)
        assert len(sample) == sum(n - 1 for n in LENGTHS)
        found_by = fitted(make, "causal_lm_token", [batch])
        found.append((sample, found_by.self_influence()))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-4, atol=1e-5)


def test_a_model_that_counts_positions_by_its_tokens_is_left_to_it():
    config = transformers.RobertaConfig(
        **SMALL, intermediate_size=24, num_attention_heads=2, is_decoder=True, pad_token_id=0
    )
    torch.manual_seed(3)
    model = transformers.RobertaForCausalLM(config).eval()
    text = padded("right", TEXTS[:1], LENGTHS[0])
    given = {key: value for key, value in text.items() if key != "labels"}
    logits = model(**given).logits[0, :-1].detach()
    logp = logits.log_softmax(-1).gather(1, text["labels"][0, 1:, None])[:, 0]
    expected = float((logp - torch.log1p(-logp.exp())).sum())
    output = trak_ext.tasks.TASKS["causal_lm"](model, text).output
    assert float(output.detach()) == pytest.approx(expected, rel=1e-5)


def test_labels_of_a_masked_decoder_place_do_not_count():
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
    )
    torch.manual_seed(3)
    model = transformers.T5ForConditionalGeneration(config).eval()
    task = trak_ext.tasks.TASKS["seq2seq_lm"]
    labels = torch.tensor([[5, 6, 7, 8]])
    short = task(model, {"input_ids": TEXTS[0][None], "labels": labels[:, :3]}).output
    mask = torch.tensor([[1, 1, 1, 0]])
    batch = {"input_ids": TEXTS[0][None], "labels": labels, "decoder_attention_mask": mask}
    torch.testing.assert_close(task(model, batch).output, short)
    assert len(token_targets(batch, causal=False)[1]) == 3


# --- heads that do not shift ----------------------------------------------------------------------


def bert(name, **options):
    config = transformers.BertConfig(
        **SMALL, intermediate_size=24, num_attention_heads=2, num_labels=VOCABULARY, **options
    )
    return getattr(transformers, name)(config)


HEADS = {
    "BertForMaskedLM": lambda: bert("BertForMaskedLM"),
    "BertForTokenClassification": lambda: bert("BertForTokenClassification"),
    "GPT2ForTokenClassification": lambda: transformers.GPT2ForTokenClassification(
        transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, num_labels=VOCABULARY
        )
    ),
}


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("task", ["causal_lm", "causal_lm_token"])
def test_heads_that_do_not_shift_are_refused(name, task):
    batch = padded("right")
    if task == "causal_lm_token":
        batch, _ = token_targets(batch, causal=True)
    with pytest.raises(ValueError, match=rf"predicts the next token .* got a {name}"):
        fitted(HEADS[name], task, [batch])


class LooksAhead(Own):
    def forward(self, input_ids, attention_mask, position_ids):
        x = self.tokens(input_ids) + self.places(position_ids)
        x = x * (attention_mask != 0)[..., None]
        return self.head(x + x.mean(1, keepdim=True))


@pytest.mark.parametrize("make", [lambda: bert("BertLMHeadModel", is_decoder=False), LooksAhead])
@pytest.mark.parametrize("side", ["left", "right"])
def test_models_that_look_ahead_are_refused(make, side):
    message = r"whose logits at a token do not depend on later tokens, got a \w+ whose logits moved"
    with pytest.raises(ValueError, match=message):
        fitted(make, "causal_lm", [padded(side)])


def test_one_token_or_no_text_at_all_cannot_tell():
    short = padded("left", [text[:2] for text in TEXTS], 2)
    fitted(gpt2, "causal_lm", [short])
    masked = padded("left")
    masked["attention_mask"][0] = 0
    message = r"labels: expected one at least that counts in every sample .* got 1 of 10"
    with pytest.raises(ValueError, match=message):
        fitted(gpt2, "causal_lm", [masked])
