"""Labels that no model output belongs to are named with the range; so are gradients of nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import trak_ext
from trak_ext.tasks import Task

X = torch.randn(30, 6, generator=torch.Generator().manual_seed(1))
Y = torch.arange(30) % 3


def net(outputs=3):
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, outputs))


class Pixels(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Conv1d(1, 4, 1)

    def forward(self, x):
        return self.layer(x[:, None])


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 9)

    def forward(self, x):
        return self.layer(x[..., None])


def changed(value, at=4):
    labels = Y.clone()
    labels[at] = value
    return labels


def pixels(value):
    labels = (torch.arange(180) % 4).reshape(30, 6)
    labels[3, 2] = value
    return labels


CLASSES = r"labels: expected classes from 0 to 2, as the model gives 3 logits, got "
PIXELS = r"labels: expected classes from 0 to 3, as the model gives 4 logits, got "
WRONG = {
    "one more": ("image_classification", net(), changed(3), CLASSES + r"3 \(1 of 30\)"),
    "from 1 on": ("text_classification", net(), Y + 1, CLASSES + r"3 \(10 of 30\)"),
    "-1": ("image_classification", net(), changed(-1), CLASSES + r"-1 \(1"),
    "-100": ("image_classification", net(), changed(-100), CLASSES + r"-100 \(1"),
    "void": ("image_classification", net(), changed(255), CLASSES + r"255 \(1"),
    "several": ("image_classification", net(), Y * 7, CLASSES + r"7, 14 \(20 of 30\)"),
    "signs": ("binary_classification", net(1), (Y > 0).long() * 2 - 1, r"0 or 1, got -1 \(10"),
    "two": ("binary_classification", net(1), Y, r"labels: expected 0 or 1, got 2 \(10 of 30\)"),
    "soft": ("binary_classification", net(1), Y / 3, r"labels: expected 0 or 1, got 0.333333"),
    "multilabel": (
        "multilabel_classification",
        net(),
        torch.stack([Y, Y * 0, Y * 0], 1).float(),
        r"labels: expected 0 or 1, got 2 \(10 of 90\)",
    ),
    "no label": (
        "multilabel_classification",
        net(),
        torch.full((30, 3), -100.0),
        r"labels: expected one at least that counts in every sample .-100 does not.*30 of 30",
    ),
    "pixel": ("pixel_classification", Pixels(), pixels(255), PIXELS + "255"),
    "void pixel": ("pixel_classification", Pixels(), pixels(4), PIXELS + "4"),
    "token": ("causal_lm", Tokens(), pixels(9), r"labels: expected classes from 0 to 8.* got 9"),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("where", ["fit", "attribute"])
def test_labels_out_of_range_are_named(case, where):
    task, model, labels, message = WRONG[case]
    attributor = trak_ext.Attributor(
        model, task, proj_dim=16, progress=False, damping=1.0, chunk_size=30
    )
    if where == "fit":
        with pytest.raises(ValueError, match=message):
            attributor.fit([(X, labels)])
        return
    right = labels.clone().float().clamp(0, 1).round().to(labels.dtype)
    attributor.fit([(X, right)])
    with pytest.raises(ValueError, match=message):
        attributor.attribute([(X, labels)])


@pytest.mark.parametrize("position", [0, 6, -1])
def test_a_target_position_outside_is_named(position):
    batch = (X, pixels(0), torch.full((30,), position))
    attributor = trak_ext.Attributor(Tokens(), "causal_lm_token", proj_dim=16, progress=False)
    message = rf"target_position: expected numbers from 1 to 5, got {position} \(30 of 30\)"
    with pytest.raises(ValueError, match=message):
        attributor.fit([batch])


def test_a_target_that_does_not_count_is_named():
    batch = (X, torch.full((30, 6), -100), torch.full((30,), 2))
    attributor = trak_ext.Attributor(Tokens(), "causal_lm_token", proj_dim=16, progress=False)
    with pytest.raises(ValueError, match=r"target_position: expected tokens that count .* got 2"):
        attributor.fit([batch])


def test_nan_of_another_cause_keeps_its_own_sentence():
    x = X.clone()
    x[7, 2] = float("nan")
    attributor = trak_ext.Attributor(net(), "image_classification", proj_dim=16, progress=False)
    with pytest.raises(ValueError, match=r"got NaN or Inf for 1 of them: 7"):
        attributor.fit([(x, Y)])


OTHER = net()
NOTHING = {
    "another model": lambda model, batch: OTHER(batch[0]).sum(1),
    "detached": lambda model, batch: model(batch[0]).detach().sum(1),
    "without gradients": lambda model, batch: torch.no_grad()(model)(batch[0]).sum(1),
    "rounded": lambda model, batch: model(batch[0]).round().sum(1),
    "a constant": lambda model, batch: batch[0].sum(1),
}


@pytest.mark.filterwarnings("ignore:trak_ext computes gradients one sample at a time")
@pytest.mark.parametrize("task", NOTHING)
@pytest.mark.parametrize("ridge", [0.0, 1.0])
@pytest.mark.parametrize("batch_size", [1, 30])
def test_gradients_that_are_all_zero_are_refused(task, ridge, batch_size):
    loader = list(zip(X.split(batch_size), Y.split(batch_size), strict=True))
    attributor = trak_ext.Attributor(
        net(), Task("own", NOTHING[task]), proj_dim=16, progress=False, ridge=ridge
    )
    with pytest.raises(ValueError, match=r"task 'own': expected gradients, got zero for every"):
        attributor.fit(loader)


def test_a_single_sample_without_a_gradient_is_one():
    def f(model, batch):
        return model(batch[0]).sum(1) * (batch[1] > 0)

    labels = changed(0, at=slice(3, 4))
    attributor = trak_ext.Attributor(
        net(), Task("own", f), proj_dim=16, progress=False, damping=1.0, chunk_size=1
    )
    attributor.fit([(X, labels)])
    scores = attributor.attribute([(X[1:3], labels[1:3])])
    assert (scores[labels == 0] == 0).all()
    assert (scores[labels > 0] != 0).any()


def test_logits_in_a_mapping_are_taken():
    class Outputs(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()

        def forward(self, x):
            return {"loss": None, "logits": self.net(x)}

    def scores(make):
        torch.manual_seed(2)
        attributor = trak_ext.Attributor(
            make(), "image_classification", proj_dim=16, progress=False, damping=1.0
        )
        attributor.fit([(X, Y)])
        return attributor.attribute([(X[:3], Y[:3])])

    assert torch.equal(scores(Outputs), scores(net))
