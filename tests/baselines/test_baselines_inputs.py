"""What the baselines take: contexts, tied weights, ids, no targets; torch with other defaults."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn

from baseline_methods import GRADIENT_METHODS, METHODS, make, make_model
from trak_ext.baselines import GradientProduct, Random, RepresentationSimilarity, TracIn
from trak_ext.gradients import GradientComputer
from trak_ext.tasks import clip_task

TASK = clip_task(4)


class Towers(nn.Module):
    def __init__(self):
        super().__init__()
        self.image, self.text = nn.Linear(3, 4), nn.Linear(2, 4)
        self.logit_scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, images, texts):
        return self.image(images), self.text(texts)


def pairs(count, size=3):
    data = torch.randn(count, 3), torch.randn(count, 2)
    return list(zip(*(part.split(size) for part in data), strict=True))


def joined(batches):
    return tuple(torch.cat(part) for part in zip(*batches, strict=True))


def clip_case():
    return Towers(), [Towers().state_dict() for _ in range(2)], pairs(7), pairs(4)


@pytest.mark.parametrize("proj_dim", [None, 16])
def test_a_context_is_prepared_for_each_checkpoint(proj_dim):
    model, states, train, test = clip_case()
    baseline = GradientProduct(
        model, TASK, checkpoints=states, proj_dim=proj_dim, chunk_size=2, progress=False
    )
    baseline.fit(train)
    computer = GradientComputer(model, TASK)
    expected, for_train = 0, 0
    for m, state in enumerate(states):
        context = computer.prepare(state, [(0, joined(train))], m)
        assert set(context["positions"].tolist()) != set(range(7))
        rows = []
        for batches, index in ((train, torch.arange(7)), (test, None), (train, None)):
            (part,) = computer(state, joined(batches), context, index)
            rows.append(
                (torch.cat([g.reshape(len(g), -1) for g in part.grads.values()], 1), part.weight)
            )
        (g, q), (h, _), (other, _) = rows
        assert not torch.allclose(g, other)  # a sample's own embedding counts as none
        expected = expected + g @ h.T * q[:, None] / 2
        for_train = for_train + g @ other.T * q[:, None] / 2
    if proj_dim is None:
        torch.testing.assert_close(baseline.attribute(test), expected)
        torch.testing.assert_close(baseline.attribute(train), for_train)
    else:
        assert baseline.attribute(test).shape == (7, 4)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_takes_a_task_that_prepares(method):
    model, states, train, test = clip_case()
    baseline = make(method, model, states, task=TASK)
    baseline.fit(train)
    scores = baseline.attribute(test)
    assert scores.shape == (7, 4)
    again = make(method, model, states, task=TASK)
    again.fit([joined(train)])
    torch.testing.assert_close(again.attribute([joined(test)]), scores)
    assert len(scores.unique()) > 20
    if method is RepresentationSimilarity:  # of the last linear layer, the text's
        a, b = (joined(batches)[1] for batches in (train, test))
        torch.testing.assert_close(scores, nn.functional.cosine_similarity(a[:, None], b, 2))


class PreparesOnly:
    """A loader whose data differ between the pass that prepares and the next one."""

    def __init__(self, batches):
        self.passes = [batches] * 3 + [[batches[0], *pairs(7)]]  # two looks at the first batch

    def __iter__(self):
        return iter(self.passes.pop(0))


def test_loaders_of_a_task_that_prepares():
    model, states, train, test = clip_case()
    baseline = make(GradientProduct, model, states[:1], task=TASK)
    with pytest.raises(ValueError, match=r"train_loader: expected .* gone over 2 times"):
        baseline.fit(iter(train))
    with pytest.raises(ValueError, match=r"train_loader: expected the same samples .* 0 to 10"):
        baseline.fit(PreparesOnly(train))
    with pytest.raises(ValueError, match="fit: expected a call of it before this one"):
        baseline.attribute(test)
    ignorant = make(Random, model, states[:1], task=TASK)
    ignorant.fit(iter(train))  # it prepares nothing
    assert ignorant.attribute(iter(test)).shape == (7, 4)


class Tied(nn.Module):
    """Two names for one weight, and two for one module."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.inner = nn.Linear(3, 3)
        self.again = self.inner

    def forward(self, x):
        return self.head(self.again(self.embed(x).mean(1)))


def test_representations_of_a_model_with_tied_weights():
    model, states = Tied(), [Tied().state_dict() for _ in range(2)]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train, test = ((torch.randint(0, 5, (n, 4)), torch.randint(0, 5, (n,))) for n in (6, 3))
    baseline = make(RepresentationSimilarity, model, states, similarity="dot", module="head")
    baseline.fit([train])
    got = baseline.attribute([test])
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    expected = 0
    for state in states:
        model.load_state_dict(state)
        a, b = (model.inner(model.embed(x).mean(1)).detach() for x, _ in (train, test))
        expected = expected + a @ b.T / 2
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("kind", ["T5", "GPT2"])
def test_representations_of_language_models(kind):
    transformers = pytest.importorskip("transformers")
    if kind == "T5":
        config = transformers.T5Config(
            vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2,
            decoder_start_token_id=0,
        )  # fmt: skip
        model, task = transformers.T5ForConditionalGeneration(config).eval(), "seq2seq_lm"
    else:
        config = transformers.GPT2Config(
            vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2,
            bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        model, task = transformers.GPT2LMHeadModel(config).eval(), "causal_lm"
    ids = torch.randint(1, 20, (5, 6))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    baseline = RepresentationSimilarity(
        model, task, checkpoints=[model.state_dict()], similarity="dot", progress=False
    )
    assert baseline.module == "lm_head"
    baseline.fit([batch])
    found = baseline.attribute([{name: tensor[:2] for name, tensor in batch.items()}])
    with torch.no_grad():
        arguments = batch if kind == "T5" else {"input_ids": ids}
        last = model(**arguments, output_hidden_states=True)
    hidden = (last.decoder_hidden_states if kind == "T5" else last.hidden_states)[-1].flatten(1)
    if kind == "T5":
        hidden = hidden * (8**-0.5 if config.tie_word_embeddings else 1)
    torch.testing.assert_close(found, hidden @ hidden[:2].T, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_no_targets_give_no_scores(method):
    baseline = make(method, make_model(), None)
    baseline.fit([(torch.randn(5, 4), torch.zeros(5, dtype=torch.int64))])
    empty = (torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    for loader in ([], [empty]):
        assert baseline.attribute(loader).shape == (5, 0)
        best = baseline.attribute(loader, top_k=2)
        assert best.values.shape == best.indices.shape == (0, 2)


def labelled(count, ids=None):
    batch = {"input": torch.randn(count, 4), "labels": torch.randint(0, 3, (count,))}
    return batch if ids is None else {**batch, "sample_id": ids}


@pytest.mark.parametrize("method", METHODS)
def test_top_k_carries_the_loaders_ids(method):
    train = [labelled(2, ["a", "b"]), labelled(3, ["c", "d", "e"])]
    test = [labelled(2, torch.tensor([7, 9]))]
    baseline = make(method, make_model(), [make_model().state_dict() for _ in range(2)])
    baseline.fit(train)
    best = baseline.attribute(test, top_k=3)
    assert best.target_ids == [7, 9]
    assert best.ids == [["abcde"[i] for i in row] for row in best.indices.tolist()]
    baseline.fit([labelled(5)])
    best = baseline.attribute([labelled(2)], top_k=3)
    assert best.ids is None
    assert best.target_ids is None


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("default", ["dtype", "device"])
def test_results_do_not_follow_torchs_defaults(method, default):
    model, states = make_model(), [make_model().state_dict() for _ in range(2)]
    train = [(torch.randn(5, 4), torch.randint(0, 3, (5,)))]
    test = [(torch.randn(2, 4), torch.randint(0, 3, (2,)))]
    proj_dim = {"proj_dim": 8} if method in GRADIENT_METHODS else {}
    torch.set_default_dtype(torch.float64 if default == "dtype" else torch.float32)
    torch.set_default_device("meta" if default == "device" else None)
    try:
        baseline = make(method, model, states, **proj_dim)
        baseline.fit(train)
        found = [baseline.attribute(test), baseline.attribute(test, top_k=2).values]
        found.append(baseline.attribute([]))
        if method in (GradientProduct, TracIn):
            found.append(baseline.self_influence())
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    assert {(tensor.dtype, tensor.device.type) for tensor in found} == {(torch.float32, "cpu")}
    usual = make(method, model, states, **proj_dim)
    usual.fit(train)
    assert torch.equal(found[0], usual.attribute(test))


def test_a_fitted_baseline_of_clip_can_be_pickled():
    model, states, train, test = clip_case()
    baseline = make(GradientProduct, model, states, task=TASK)
    baseline.fit(train)
    again = pickle.loads(pickle.dumps(baseline))
    assert torch.equal(again.attribute(test), baseline.attribute(test))
