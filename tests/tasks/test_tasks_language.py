"""Token outputs: sums, means, single tokens, what is ignored and what models are called with."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from trak_ext import Attributor
from trak_ext.gradients import GradientComputer
from trak_ext.tasks import TASKS, Task, token_targets

VOCABULARY = 11


class Toy(nn.Module):
    """A causal model that takes what tokenizers make and nothing else."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.head = nn.Linear(8, VOCABULARY)

    def forward(self, input_ids, attention_mask=None):
        return SimpleNamespace(logits=self.head(torch.tanh(self.embed(input_ids).cumsum(1))))


class ToySeq2Seq(Toy):
    def forward(self, input_ids, decoder_input_ids, attention_mask=None):
        hidden = self.embed(input_ids).sum(1, keepdim=True) + self.embed(decoder_input_ids)
        return SimpleNamespace(logits=self.head(torch.tanh(hidden.cumsum(1))))

    def prepare_decoder_input_ids_from_labels(self, labels):
        start = torch.ones_like(labels[:, :1])
        return torch.cat([start, labels[:, :-1].clamp(min=0)], 1)


def batch(count=3, length=6):
    ids = torch.randint(0, VOCABULARY, (count, length))
    labels = ids.clone()
    labels[0, 4:] = -100
    labels[1, :3] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def token_odds(logits, label):
    p = logits.detach().double().softmax(-1)[label]
    return float((p / (1 - p)).log()), float(1 - p)


def expected(logits, labels, shift):
    """f, Q, R of each sample by a loop over its tokens."""
    found = []
    for rows, targets in zip(logits, labels, strict=True):
        pairs = [
            token_odds(rows[t - shift], targets[t])
            for t in range(shift, len(targets))
            if targets[t] != -100
        ]
        f, missed = torch.tensor(pairs).unbind(1)
        found.append((f.sum(), missed.mean(), (missed * (1 - missed)).mean()))
    return [torch.stack(part) for part in zip(*found, strict=True)]


@pytest.mark.parametrize("task", ["causal_lm", "seq2seq_lm"])
def test_f_q_and_r_over_the_target_tokens(task):
    samples = batch()
    if task == "causal_lm":
        model, shift = Toy(), 1
        logits = model(samples["input_ids"]).logits
    else:
        model, shift = ToySeq2Seq(), 0
        start = model.prepare_decoder_input_ids_from_labels(samples["labels"])
        logits = model(samples["input_ids"], start).logits
    got = TASKS[task](model, samples)
    for part, wanted in zip(got, expected(logits, samples["labels"], shift), strict=True):
        torch.testing.assert_close(part.detach(), wanted, rtol=1e-4, atol=1e-5)


def test_decoder_input_ids_of_the_batch_come_first():
    samples = {**batch(), "decoder_input_ids": torch.randint(0, VOCABULARY, (3, 6))}
    model = ToySeq2Seq()
    model.prepare_decoder_input_ids_from_labels = None  # not to be called
    logits = model(samples["input_ids"], samples["decoder_input_ids"]).logits
    got = TASKS["seq2seq_lm"](model, samples).output
    torch.testing.assert_close(got, expected(logits, samples["labels"], 0)[0], rtol=1e-4, atol=1e-5)


def test_a_seq2seq_model_that_cannot_shift_labels():
    with pytest.raises(ValueError, match=r"^batch: expected 'decoder_input_ids'"):
        TASKS["seq2seq_lm"](Toy(), batch())


@pytest.mark.parametrize("task", ["causal_lm", "seq2seq_lm"])
def test_a_sample_without_targets_is_named(task):
    samples = batch()
    samples["labels"][1] = -100
    model = Toy() if task == "causal_lm" else ToySeq2Seq()
    assert TASKS[task](model, samples).output.isnan().tolist() == [False, True, False]
    with pytest.raises(ValueError, match=r"\b1\b"):
        Attributor(model, task, proj_dim=4, progress=False).fit([samples])


def test_the_first_token_alone_is_no_target_of_a_causal_model():
    samples = batch()
    samples["labels"][:, 1:] = -100
    assert TASKS["causal_lm"](Toy(), samples).output.isnan().all()


def test_a_label_that_is_no_token_is_not_a_number():
    samples = batch()
    samples["labels"][2, 3] = VOCABULARY
    assert TASKS["causal_lm"](Toy(), samples).output.isnan().tolist() == [False, False, True]


@pytest.mark.parametrize("task", ["causal_lm", "seq2seq_lm"])
def test_single_tokens_add_up_to_the_whole(task):
    model, samples = (Toy() if task == "causal_lm" else ToySeq2Seq()), batch()
    each, sample = token_targets(samples, causal=task == "causal_lm")
    assert len(sample) == len(each["target_position"]) == len(each["labels"])
    single = GradientComputer(model, TASKS[task + "_token"])
    whole = GradientComputer(model, TASKS[task])
    (tokens,), (sums,) = single({}, each), whole({}, samples)
    for name, grad in sums.grads.items():
        added = torch.zeros_like(grad).index_add(0, sample, tokens.grads[name])
        torch.testing.assert_close(added, grad, rtol=1e-4, atol=1e-4)
    added = torch.zeros(3).index_add(0, sample, tokens.output)
    torch.testing.assert_close(added, sums.output, rtol=1e-4, atol=1e-4)
    mean = torch.zeros(3).index_add(0, sample, tokens.weight) / sample.bincount()
    torch.testing.assert_close(mean, sums.weight, rtol=1e-4, atol=1e-5)


def test_which_tokens_are_targets():
    samples = batch()
    each, sample = token_targets(samples, causal=True)
    pairs = list(zip(sample.tolist(), each["target_position"].tolist(), strict=True))
    assert pairs == [
        *((0, t) for t in (1, 2, 3)),
        *((1, t) for t in (3, 4, 5)),
        *((2, t) for t in (1, 2, 3, 4, 5)),
    ]
    assert torch.equal(each["input_ids"], samples["input_ids"][sample])
    _, sample = token_targets(samples, causal=False)
    assert sample.bincount().tolist() == [4, 3, 6]
    ids, labels, position = token_targets((samples["input_ids"], samples["labels"]), causal=True)[0]
    assert torch.equal(position, each["target_position"])
    assert torch.equal(labels, each["labels"])
    model = Toy()
    paired = TASKS["causal_lm_token"](model, (ids, labels, position)).output
    assert torch.equal(paired, TASKS["causal_lm_token"](model, each).output)
    assert samples["labels"][2, 0] >= 0  # the caller's labels are left alone


@pytest.mark.parametrize("position", [-1, 0, 5, 6])
def test_a_position_without_a_target_is_not_a_number(position):
    samples = {**batch(), "target_position": torch.tensor([position, 4, 2])}
    f = TASKS["causal_lm_token"](Toy(), samples).output  # sample 0 has targets at 1, 2, 3
    assert f.isnan().tolist() == [True, False, False]


def test_a_token_task_needs_a_position():
    with pytest.raises(ValueError, match=r"^batch: expected a mapping with 'target_position'"):
        TASKS["causal_lm_token"](Toy(), batch())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["labels"].float(), "labels: expected integers"),
        (lambda s: s["labels"][:, 0], "labels: expected integers"),
        (lambda s: s["labels"][:, 1:], "model: expected logits"),
    ],
)
@pytest.mark.parametrize("task", ["causal_lm", "seq2seq_lm"])
def test_labels_that_do_not_fit(task, change, message):
    samples = batch()
    given = {**samples, "decoder_input_ids": samples["input_ids"], "labels": change(samples)}
    if task == "causal_lm":
        del given["decoder_input_ids"]
    with pytest.raises(ValueError, match="^" + message):
        TASKS[task](Toy() if task == "causal_lm" else ToySeq2Seq(), given)


def test_a_users_own_function_in_three_lines():
    def first_token(model, batch):
        logits = model(batch["input_ids"]).logits[:, 0]
        return logits.gather(1, batch["input_ids"][:, 1:2])[:, 0]

    scores = Attributor(Toy(), Task("first token", first_token), proj_dim=4, progress=False)
    scores.fit([batch()])
    assert scores.attribute([batch(2)]).shape == (3, 2)
