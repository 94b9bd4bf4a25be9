"""Tasks that look at the training set: what they prepare is made once, stored, and not mixed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from trak_ext import Attributor, StoreError, reference
from trak_ext.tasks import Task, clip_task

NUM_TRAIN, NUM_TARGETS, PROJ_DIM = 21, 4, 8


class Towers(nn.Module):
    def __init__(self):
        super().__init__()
        self.image = nn.Linear(5, 3)
        self.text = nn.Linear(4, 3)
        self.logit_scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, image, text):
        return self.image(image), self.text(text)


def setting():
    torch.manual_seed(3)
    model = Towers()
    states = []
    for _ in range(2):
        states.append({n: t + 0.5 * torch.randn_like(t) for n, t in model.state_dict().items()})
    train = (torch.randn(NUM_TRAIN, 5), torch.randn(NUM_TRAIN, 4))
    test = (torch.randn(NUM_TARGETS, 5), torch.randn(NUM_TARGETS, 4))
    return model, states, train, test


def cut(data, *ends):
    starts = (0, *ends[:-1])
    return [tuple(t[a:b] for t in data) for a, b in zip(starts, ends, strict=True)]


def attributor(store=None, task="clip", **options):
    model, states, _, _ = setting()
    plain = {"damping": 1.0, "curvature": None}
    options = {"proj_dim": PROJ_DIM, "progress": False, **plain, **options}
    return Attributor(model, task, checkpoints=states, store=store, **options)


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
    monkeypatch.setattr("trak_ext.store.base.shard_rows", lambda width: 8)


def brute_force():
    """Return scores of clip with all training pairs as the sample, in fp64 by autograd loops."""
    _, states, train, test = setting()
    sides = {"train": [], "test": []}
    weights = []
    for m, state in enumerate(states):
        model = Towers().double()
        model.load_state_dict({name: t.double() for name, t in state.items()})
        images, texts = (
            F.normalize(e.detach(), dim=1) for e in model(*(t.double() for t in train))
        )
        matrix = reference.projection_matrix(
            sum(p.numel() for p in model.parameters()), PROJ_DIM, kind="sjlt", model_id=m
        )
        for side, data in (("train", train), ("test", test)):
            rows, own_weights = [], []
            for i in range(len(data[0])):
                x, y = (
                    F.normalize(e, dim=1)[0] for e in model(*(t[i : i + 1].double() for t in data))
                )
                others = [j for j in range(NUM_TRAIN) if side == "test" or j != i]
                scale = model.logit_scale.exp()
                to_texts = scale * x @ (y - texts[others]).T
                to_images = scale * (x - images[others]) @ y
                f = -torch.logsumexp(-to_texts, 0) - torch.logsumexp(-to_images, 0)
                grads = torch.autograd.grad(f, list(model.parameters()))
                rows.append(torch.cat([g.reshape(-1) for g in grads]).numpy())
                p = [
                    float(1 / (1 + torch.exp(-part.detach()).sum()))
                    for part in (to_texts, to_images)
                ]
                own_weights.append(1 - sum(p) / 2)
            sides[side].append(np.stack(rows) @ matrix)
            if side == "train":
                weights.append(own_weights)
    return reference.score(np.stack(sides["train"]), np.stack(sides["test"]), np.array(weights))


def assert_close(got, expected, tolerance=1e-4):
    difference = np.abs(np.asarray(got) - np.asarray(expected)).max(0)
    assert (difference <= tolerance * np.abs(np.asarray(expected)).max(0)).all(), difference


@pytest.mark.parametrize("where", ["memory", "folder"])
@pytest.mark.parametrize("ends", [(21,), (3, 8, 13, 21)])
def test_clip_equals_brute_force(where, ends, tmp_path):
    _, _, train, test = setting()
    fitted = attributor(tmp_path if where == "folder" else None)
    fitted.fit(cut(train, *ends))
    if where == "folder":
        fitted = attributor(tmp_path)
    assert_close(fitted.attribute(cut(test, 1, 4)), brute_force())
    assert (tmp_path / "checkpoint-0001" / "context.safetensors").exists() == (where == "folder")


def test_later_parts_keep_the_sample_of_the_first(tmp_path):
    _, _, train, test = setting()
    first, second = (tuple(t[s] for t in train) for s in (slice(0, 15), slice(15, 21)))
    grown = attributor(tmp_path)
    grown.fit([first])
    before = [
        (tmp_path / f"checkpoint-{m:04d}" / "context.safetensors").read_bytes() for m in (0, 1)
    ]
    grown.fit([second], addition=1)
    after = [
        (tmp_path / f"checkpoint-{m:04d}" / "context.safetensors").read_bytes() for m in (0, 1)
    ]
    assert before == after
    assert grown.attribute([test]).shape == (21, 4)
    # A pair that is added must not meet itself in the sample, nor another that has its place there.
    positions = grown._store.read_context(0).tensors["positions"]
    assert int(positions.max()) < 15
    alone = attributor()
    alone.fit([first])
    shards = [grown._store.read(0, 0, addition=1), None]
    targets = Attributor(
        setting()[0], "clip", checkpoints=setting()[1], proj_dim=PROJ_DIM, progress=False
    )
    targets._store = alone._store
    args = (targets._features, targets._bar("", []), alone._fitted())
    kept = targets._features_of_targets(0, [second], *args)
    assert torch.allclose(kept.features, shards[0].features, rtol=1e-5, atol=1e-5)


def test_a_context_is_made_once_and_not_of_other_data(tmp_path):
    _, _, train, test = setting()
    calls = []
    own = clip_task()

    def prepare(model, batches, checkpoint):
        calls.append(checkpoint)
        return own.prepare(model, batches, checkpoint)

    noted = Task("clip", own.function, prepare)
    attributor(tmp_path, noted).fit([train])
    assert calls == [0, 1]
    expected = attributor(tmp_path).attribute([test])
    attributor(tmp_path, noted).fit(cut(train, 10, 21))
    assert calls == [0, 1]
    # A run that was killed after the first shard of checkpoint 1.
    for name in ("finished", "features-000000000008", "features-000000000016"):
        (tmp_path / "checkpoint-0001" / f"{name}.safetensors").unlink()
    other = (train[0].clone(), train[1])
    other[0][-1] += 1
    (tmp_path / "checkpoint-0000" / "finished.safetensors").rename(tmp_path / "kept")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(StoreError, match="what the task prepared for checkpoint 0 from other data"):
        attributor(tmp_path, noted).fit([other])
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "kept").rename(tmp_path / "checkpoint-0000" / "finished.safetensors")
    attributor(tmp_path, noted).fit([train])
    assert calls == [0, 1]
    assert torch.equal(attributor(tmp_path).attribute([test]), expected)


def test_a_missing_context_is_refused(tmp_path):
    _, _, train, test = setting()
    attributor(tmp_path).fit([train])
    (tmp_path / "checkpoint-0001" / "context.safetensors").unlink()
    sentence = "expected what the task prepared for checkpoint 1, got none"
    with pytest.raises(StoreError, match=sentence):
        attributor(tmp_path).attribute([test])
    with pytest.raises(StoreError, match=sentence):
        attributor(tmp_path).fit([train])


def test_a_one_time_loader_is_refused_for_a_task_that_prepares():
    model, states, train, _ = setting()
    single = Attributor(model, "clip", checkpoints=states[:1], progress=False)
    with pytest.raises(ValueError, match="can be gone over 2 times"):
        single.fit(batch for batch in [train])


# --- targets of another task ----------------------------------------------------------------------


def first_image_coordinate(model, batch):
    return model(*batch)[0][:, 0]


def test_targets_of_another_task():
    _, states, train, test = setting()
    fitted = attributor()
    fitted.fit([train])
    target = Task("first", first_image_coordinate)
    got = fitted.attribute([test], target_task=target)
    whole = Attributor(setting()[0], target, checkpoints=states, proj_dim=PROJ_DIM, progress=False)
    whole.fit([test])
    phi, q = (
        np.stack([getattr(fitted._store.read(m, s), key).numpy() for m in range(2)])
        for key, s in (("features", 0), ("weight", 0))
    )
    for s in (8, 16):
        phi = np.concatenate(
            [phi, np.stack([fitted._store.read(m, s).features.numpy() for m in range(2)])], 1
        )
        q = np.concatenate(
            [q, np.stack([fitted._store.read(m, s).weight.numpy() for m in range(2)])], 1
        )
    targets = np.stack([whole._store.read(m, 0).features.numpy() for m in range(2)])
    assert_close(got, reference.score(phi, targets, q))
    with pytest.raises(ValueError, match=r"^target_task: expected the fitted task or one that"):
        fitted.attribute([test], target_task=clip_task(num_negatives=5))
    same = fitted.attribute([test], target_task="clip")
    assert torch.equal(same, fitted.attribute([test]))


def test_targets_of_another_task_are_of_the_parameters_that_were_fitted():
    model, states, train, test = setting()
    made = Attributor(model, "clip", checkpoints=states, proj_dim=PROJ_DIM, progress=False)
    made.fit([train])
    expected = made.attribute([test], target_task="clip")
    model.image.weight.requires_grad_(False)
    assert torch.equal(made.attribute([test], target_task="clip"), expected)
