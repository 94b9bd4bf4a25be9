"""CLIP's f, Q and R, the sample that stands for the batch, and tasks with a context."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from trak_ext.gradients import GradientComputer
from trak_ext.tasks import TASKS, Task, clip_output, clip_task


def unit(*shape):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def context(count=6, width=4):
    return {
        "positions": torch.arange(count) * 2,
        "images": unit(count, width),
        "texts": unit(count, width),
    }


@pytest.mark.parametrize("own", [-1, 3, 4])
def test_f_q_and_r_against_softmax(own):
    """f is the sum of both log-odds of softmax over the sample and the pair itself."""
    image, text, scale, others = unit(1, 4), unit(1, 4), torch.tensor(5.0), context()
    f, q, r = clip_output(image, text, scale, others, torch.tensor([own]))
    kept = others["positions"] != own  # position 4 is in it, 3 is not
    assert int(kept.sum()) == (5 if own == 4 else 6)
    p = []
    for mine, other, candidates in ((image, text, "texts"), (text, image, "images")):
        rows = torch.cat([other, others[candidates][kept]])
        p.append(float((scale * rows @ mine[0]).softmax(0)[0]))
    p = torch.tensor(p, dtype=torch.float64)
    torch.testing.assert_close(f[0], (p / (1 - p)).log().sum())
    torch.testing.assert_close(q[0], 1 - p.mean())
    torch.testing.assert_close(r[0], (p * (1 - p)).mean())


def test_q_and_r_are_derivatives_along_equal_moves_of_both_halves():
    # The loss, half the sum of both cross-entropies, as a function of t: both log-odds plus t.
    image, text, scale, others = unit(1, 4), unit(1, 4), torch.tensor(3.0), context()
    _, q, r = clip_output(image, text, scale, others, torch.tensor([-1]))
    pair = scale * (image * text).sum()
    halves = [
        pair - (scale * others[name] @ mine[0]).logsumexp(0)
        for mine, name in ((image, "texts"), (text, "images"))
    ]
    t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    loss = sum(F.softplus(-(half + t)) for half in halves) / 2
    (first,) = torch.autograd.grad(loss, t, create_graph=True)
    (second,) = torch.autograd.grad(first, t)
    torch.testing.assert_close(q[0], -first.detach())
    torch.testing.assert_close(r[0], second)


class Towers(nn.Module):
    def __init__(self, scale=True):
        super().__init__()
        self.image, self.text = nn.Linear(3, 4), nn.Linear(2, 4)
        self.rows = []
        if scale:
            self.logit_scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, images, texts):
        self.rows.append(len(images))
        return self.image(images), self.text(texts), "more"


def split(images, texts, size):
    starts = range(0, len(images), size)
    return [(a, (images[a : a + size], texts[a : a + size])) for a in starts]


def prepared(task, model, batches, checkpoint=0):
    return GradientComputer(model, task).prepare({}, batches, checkpoint)


def test_the_sample_does_not_depend_on_batches():
    model, data = Towers(), (torch.randn(50, 3), torch.randn(50, 2))
    task = clip_task(10)
    whole = prepared(task, model, split(*data, 50))
    assert len(whole["positions"]) == len(set(whole["positions"].tolist())) == 10
    for size in (1, 7, 16):
        other = prepared(task, model, split(*data, size))
        assert torch.equal(other["positions"], whole["positions"])
        torch.testing.assert_close(other["images"], whole["images"])
        torch.testing.assert_close(other["texts"], whole["texts"])
    chosen = whole["positions"]
    torch.testing.assert_close(whole["images"], F.normalize(model.image(data[0][chosen])).detach())
    torch.testing.assert_close(whole["texts"], F.normalize(model.text(data[1][chosen])).detach())
    assert not any(tensor.requires_grad for tensor in whole.values())


def test_what_the_sample_depends_on():
    model, data = Towers(), (torch.randn(50, 3), torch.randn(50, 2))

    def positions(task, checkpoint=0, count=50):
        batches = split(*(part[:count] for part in data), 8)
        return prepared(task, model, batches, checkpoint)["positions"].tolist()

    first = positions(clip_task(10))
    assert positions(clip_task(10)) == first
    assert positions(clip_task(10), checkpoint=1) != first
    assert positions(clip_task(10, seed=1)) != first
    assert set(positions(clip_task(5))) < set(first)
    assert positions(clip_task(128)) == list(range(50))
    # More data at the end takes places, and leaves the rest as it was.
    assert {p for p in first if p < 40} <= set(positions(clip_task(10), count=40))


def test_positions_are_chosen_evenly():
    model, data = Towers(), (torch.randn(100, 3), torch.randn(100, 2))
    counts = torch.zeros(100)
    for m in range(60):
        counts[prepared(clip_task(20), model, [(0, data)], m)["positions"]] += 1
    assert counts.sum() == 1200
    # Binomial(60, 0.2): mean 12, standard deviation 3.1; the means of halves 0.31.
    assert abs(float(counts[:50].mean()) - 12) < 1.3
    assert counts.min() >= 1
    assert counts.max() <= 27


def test_few_samples_are_embedded_that_are_not_kept():
    model, data = Towers(), (torch.randn(2000, 3), torch.randn(2000, 2))
    prepared(clip_task(10), model, split(*data, 20))
    # 10 (1 + ln(2000/10)) = 63 are expected ever to be among the ten smallest.
    assert sum(model.rows) < 200


def test_names_tell_settings_apart():
    assert clip_task().name == TASKS["clip"].name == "clip"
    names = [clip_task(*given).name for given in ((), (64,), (128, 1), (64, 1), (128, 0, 3.0))]
    assert len(set(names)) == 5
    assert names[3] == "clip(num_negatives=64,seed=1)"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_negatives": 1}, "num_negatives: expected an integer from 2 to"),
        ({"num_negatives": 2.5}, "num_negatives: expected an integer, got 2.5"),
        ({"seed": -1}, "seed: expected an integer from 0"),
        ({"logit_scale": 0.0}, "logit_scale: expected None or a positive number"),
    ],
)
def test_settings_that_are_refused(given, message):
    with pytest.raises((TypeError, ValueError), match="^" + message):
        clip_task(**given)


def test_models_without_a_scale():
    model, data = Towers(scale=False), (torch.randn(5, 3), torch.randn(5, 2))
    index = torch.arange(5)
    made = prepared(clip_task(), model, [(0, data)])
    with pytest.raises(TypeError, match=r"^model: expected a parameter logit_scale"):
        list(GradientComputer(model, clip_task())({}, data, made, index))
    with_scale = Towers()
    with_scale.load_state_dict({**model.state_dict(), "logit_scale": torch.tensor(20.0).log()})
    (fixed,) = GradientComputer(model, clip_task(logit_scale=20.0))({}, data, made, index)
    (own,) = GradientComputer(with_scale, clip_task())({}, data, made, index)
    torch.testing.assert_close(fixed.output, own.output)
    assert float(own.grads["logit_scale"].abs().min()) > 0


def test_too_few_training_samples():
    data = (torch.randn(1, 3), torch.randn(1, 2))
    with pytest.raises(ValueError, match=r"^train_loader: expected at least 2 samples"):
        prepared(clip_task(), Towers(), [(0, data)])


def test_models_and_batches_of_another_kind():
    data = (torch.randn(4, 3), torch.randn(4, 3))
    with pytest.raises(TypeError, match=r"^model: expected image and text embeddings"):
        prepared(clip_task(), nn.Bilinear(3, 3, 4), [(0, data)])
    with pytest.raises(ValueError, match=r"^batch: expected \(images, texts\)"):
        prepared(clip_task(), Towers(), [(0, (*data, data[0]))])


def test_a_context_is_required_by_its_task_alone():
    data = (torch.randn(4, 3), torch.randn(4, 2))
    with pytest.raises(ValueError, match=r"^task 'clip': expected the context"):
        list(GradientComputer(Towers(), TASKS["clip"])({}, data))
    plain = GradientComputer(nn.Linear(3, 2), TASKS["image_classification"])
    assert plain.prepare({}, iter(()), 0) == {}


def with_mean():
    """A task of the distance to the training mean, whose own sample is left out."""

    def prepare(model, batches, checkpoint):
        outputs = torch.cat([model(x) for _, (x, _) in batches])
        return {"sum": outputs.sum(0), "each": outputs, "m": torch.tensor([checkpoint])}

    def function(model, batch, context, index):
        known = index >= 0
        own = context["each"][index.clamp(min=0)] * known[:, None]
        mean = (context["sum"] - own) / (len(context["each"]) - known.int())[:, None]
        return ((model(batch[0]) - mean) ** 2).sum(1)

    return Task("distance to the mean", function, prepare)


@pytest.mark.parametrize("chunk_size", [1, 2, None])
@pytest.mark.parametrize("one_by_one", [False, True])
def test_a_users_task_with_a_context(chunk_size, one_by_one):
    model, x = nn.Linear(3, 2), torch.randn(5, 3)
    weights = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    batches = [(0, (x[:3], torch.zeros(3))), (3, (x[3:], torch.zeros(2)))]
    computer = GradientComputer(model, with_mean(), chunk_size=chunk_size)
    computer._one_by_one = one_by_one
    made = computer.prepare(weights, iter(batches), 4)
    assert int(made["m"]) == 4
    index = torch.tensor([4, -1, 0])
    parts = list(computer(weights, (x[[4, 1, 0]], torch.zeros(3)), made, index))
    model.load_state_dict(weights)
    y = model(x)
    means = [y[:4].mean(0), y.mean(0), y[1:].mean(0)]
    for i, mean in enumerate(means):
        f = ((y[[4, 1, 0][i]] - mean.detach()) ** 2).sum()
        (grad,) = torch.autograd.grad(f, [model.weight], retain_graph=True)
        torch.testing.assert_close(torch.cat([part.output for part in parts])[i], f.detach())
        torch.testing.assert_close(torch.cat([part.grads["weight"] for part in parts])[i], grad)


def test_what_a_users_prepare_returns_is_checked():
    task = Task("mine", lambda *a: None, lambda model, batches, checkpoint: [torch.zeros(1)])
    with pytest.raises(TypeError, match=r"^task 'mine': expected prepare\(\) to return tensors"):
        prepared(task, nn.Linear(1, 1), [])
    with pytest.raises(TypeError, match=r"^prepare: expected None or a callable"):
        Task("mine", lambda *a: None, 3)


def test_positions_of_another_number_of_samples():
    data = (torch.randn(4, 3), torch.randn(4, 2))
    with pytest.raises(ValueError, match=r"^index: expected one position for each of 4 samples"):
        list(GradientComputer(Towers(), TASKS["clip"])({}, data, context(), torch.arange(3)))


def test_equal_settings_are_equal_tasks_that_can_be_pickled():
    assert clip_task() == TASKS["clip"]
    assert hash(clip_task(64, 1, 3.0)) == hash(clip_task(64, 1, 3.0))
    assert clip_task(64) != clip_task(64, 1)
    for task in (clip_task(), clip_task(64, 1, 3.0)):
        assert pickle.loads(pickle.dumps(task)) == task
