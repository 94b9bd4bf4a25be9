"""Labels drawn at random, in every task with labels: right by the definition, or one sentence.

The scores are those of a task that writes p, log(p/(1-p)) and the means out over all classes.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import trak_ext
from trak_ext.tasks import Task

SAMPLES, PLACES, CLASSES, IGNORED = 4, 3, 3, -100
DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class Each(nn.Module):
    """Logits [B, T, C] of inputs [B, T, 2]; causal, as each place sees itself alone."""

    def __init__(self, outputs=CLASSES):
        super().__init__()
        self.layer = nn.Linear(2, outputs)

    def forward(self, x):
        return self.layer(x)


class Pixels(Each):
    def forward(self, x):
        return super().forward(x).movedim(-1, 1)


class Column(Each):
    """One logit for each place, [B, T]."""

    def __init__(self):
        super().__init__(1)

    def forward(self, x):
        return super().forward(x)[..., 0]


class First(Each):
    def forward(self, x):
        return super().forward(x[:, 0])


class FirstColumn(Column):
    def forward(self, x):
        return super().forward(x)[:, 0]


def of_probability(p, counted):
    """Return the sum of log(p/(1-p)), and the means of 1-p and p(1-p), over what counts."""
    p = torch.where(counted, p, 0.5)
    f, q, r = (
        torch.where(counted, part, 0).sum(1) for part in ((p / (1 - p)).log(), 1 - p, p * (1 - p))
    )
    return f, q / counted.sum(1), r / counted.sum(1)


def of_classes(logits, labels):
    """For logits [B, T, C] and labels [B, T]."""
    labels = labels.long()
    p = logits.double().softmax(-1)
    own = sum(p[..., c] * (labels == c) for c in range(CLASSES))
    return tuple(part.float() for part in of_probability(own, labels != IGNORED))


def of_two(logits, labels):
    """For logits [B, L] and labels [B, L]."""
    labels = labels.long()
    p = 1 / (1 + (-logits.double()).exp())
    own = p * (labels == 1) + (1 - p) * (labels == 0)
    return tuple(part.float() for part in of_probability(own, labels != IGNORED))


def classification(model, batch):
    return of_classes(model(batch[0])[:, None], batch[1][:, None])


def binary(model, batch):
    return of_two(model(batch[0])[:, None], batch[1][:, None])


def multilabel(model, batch):
    return of_two(model(batch[0]), batch[1])


def pixels(model, batch):
    return of_classes(model(batch[0]).movedim(1, -1), batch[1])


def causal(model, batch):
    return of_classes(model(batch[0])[:, :-1], batch[1][:, 1:])


# Task: model, the definition, classes, whether -100 is left out, and the places that are looked at.
KINDS = {
    "image_classification": (First, classification, CLASSES, False, None),
    "binary_classification": (FirstColumn, binary, 2, False, None),
    "multilabel_classification": (Column, multilabel, 2, True, slice(None)),
    "pixel_classification": (Pixels, pixels, CLASSES, True, slice(None)),
    "causal_lm": (Each, causal, CLASSES, True, slice(1, None)),
}


def scores(model, task, batch):
    torch.manual_seed(0)
    attributor = trak_ext.Attributor(model(), task, proj_dim=8, damping=1.0, progress=False)
    attributor.fit([batch])
    return attributor.attribute([batch])


@pytest.mark.parametrize("name", KINDS)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_labels_are_right_or_named(name, data):
    model, definition, classes, ignores, places = KINDS[name]
    dtype = data.draw(st.sampled_from(DTYPES))
    info = torch.iinfo(dtype)
    fair = st.integers(0, classes - 1)
    odd = st.sampled_from([v for v in (-1, classes, 255, IGNORED) if info.min <= v <= info.max])
    label = data.draw(st.sampled_from([fair, fair | odd]))
    count = SAMPLES * (1 if places is None else PLACES)
    drawn = data.draw(st.lists(label, min_size=count, max_size=count))
    y = torch.tensor(drawn, dtype=dtype)
    y = y if places is None else y.reshape(SAMPLES, PLACES)
    x = torch.randn(SAMPLES, PLACES, 2, generator=torch.Generator().manual_seed(1))

    seen = y[:, None] if places is None else y[:, places]
    allowed = {*range(classes), IGNORED} if ignores else set(range(classes))
    wrong = sorted(set(seen.flatten().tolist()) - allowed)
    without = ignores and bool((seen == IGNORED).all(1).any())
    if not wrong and not without:
        found = scores(model, name, (x, y))
        expected = scores(model, Task("definition", definition), (x, y))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        return
    with pytest.raises(ValueError, match=r"^labels: expected") as caught:
        scores(model, name, (x, y))
    said = str(caught.value)
    assert "\n" not in said
    if "one at least that counts" in said:
        assert without
    else:
        assert any(f"{value}" in said.split("got ")[1] for value in wrong)
        top = "0 or 1" if classes == 2 else f"classes from 0 to {classes - 1}"
        assert top in said
