"""A few samples computed again show that model and task are those that were fitted."""

from __future__ import annotations

import json
import re
import shutil
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch import nn

from trak_ext import Attributor, StoreError
from trak_ext.attribution import probe
from trak_ext.inputs.batches import put_together, take_apart
from trak_ext.tasks import Task, clip_task

NAME = "checkpoint-0000/probe.safetensors"


class Net(nn.Module):
    """A classifier with all that a state dict and a printout do not show."""

    def __init__(self, scale=1.0, fn=torch.tanh):
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)
        self.scale, self.fn = scale, fn

    def forward(self, x):
        return self.second(self.fn(self.first(x))) * self.scale


def data(start=0, stop=12):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(40, 4, generator=generator)
    return [(x[a : a + 4], torch.arange(a, a + 4) % 3) for a in range(start, stop, 4)]


def own(factor=1.0, weight=1.0):
    def function(model, batch):
        f = factor * model(batch[0])[:, 0]
        return f, weight * torch.sigmoid(-f), torch.ones_like(f)

    return Task("mine", function)


def attributor(store, model=None, task=None, **options):
    torch.manual_seed(0)
    made = Net()
    states = [made.state_dict(), {n: t + 0.1 for n, t in made.state_dict().items()}]
    options = {"checkpoints": states, "proj_dim": 8, "progress": False, **options}
    return Attributor(model or made, task or own(), store=store, **options)


@pytest.fixture
def fitted(tmp_path):
    attributor(tmp_path / "store").fit(data())
    return tmp_path / "store"


def hooked():
    model = Net()
    model.first.register_forward_hook(lambda module, args, output: output * 1.1)
    return model


def replaced():
    model = Net()
    forward = model.second.forward
    model.second.forward = lambda x: forward(x).clamp(-0.2, 0.2)
    return model


def a_part_of_it_replaced():
    model = Net()
    model.second.__class__ = type(
        "Linear", (nn.Linear,), {"forward": lambda s, x: s.bias + x[:, :3]}
    )
    return model


OTHERS = {
    "a hook": {"model": hooked},
    "another forward": {"model": replaced},
    "another class of the same name": {"model": a_part_of_it_replaced},
    "an attribute": {"model": lambda: Net(scale=1.02)},
    "a function that it holds": {"model": lambda: Net(fn=torch.sin)},
    "another task of the same name": {"task": lambda: own(1.01)},
    "another Q": {"task": lambda: own(weight=1.01)},
}


def other(store, name, **options):
    made = {key: make() for key, make in OTHERS[name].items()}
    return attributor(store, **made, **options)


def contents(path):
    return {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}


@pytest.mark.parametrize("name", OTHERS)
def test_what_no_state_dict_shows_is_refused(fitted, name):
    before = contents(fitted)
    changed = other(fitted, name)
    for use in (changed.attribute, changed.fit, lambda loader: changed.fit(loader, addition=1)):
        with pytest.raises(
            StoreError, match=r"^store: expected the .* that the fit of ch"
        ) as error:
            use(data(12, 20) if use is not changed.fit else data())
        assert str(fitted / NAME) in str(error.value)
        assert "probe=False" in str(error.value)
        assert "\n" not in str(error.value)
    assert contents(fitted) == before


@pytest.mark.parametrize("name", OTHERS)
def test_a_run_that_was_stopped_is_not_continued_by_another_function(tmp_path, name):
    class Stopped:
        def __iter__(self):
            yield data()[0]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attributor(tmp_path).fit(Stopped())
    with pytest.raises(StoreError, match="that the fit of checkpoint 0 gave"):
        other(tmp_path, name).fit(data())
    attributor(tmp_path).fit(data())


def test_a_shard_of_another_function_is_refused_while_nothing_vouches_for_it(tmp_path, monkeypatch):
    monkeypatch.setattr("trak_ext.store.base.shard_rows", lambda width: 4)
    other(tmp_path / "theirs", "an attribute").fit(data())

    class Stopped:
        def __iter__(self):
            yield from data()[:2]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attributor(tmp_path / "mine").fit(Stopped())
    name = "checkpoint-0000/features-000000000008.safetensors"
    (tmp_path / "mine" / name).write_bytes((tmp_path / "theirs" / name).read_bytes())
    with pytest.raises(StoreError, match=r"expected features of the run that began .*000008"):
        attributor(tmp_path / "mine").fit(data())


def test_without_the_probe_nothing_is_kept_or_looked_at(tmp_path):
    first = attributor(tmp_path, probe=False)
    first.fit(data())
    file = tmp_path / NAME
    assert file.stat().st_size < 2000
    changed = other(tmp_path, "an attribute")
    changed.attribute(data())
    assert not changed._store.read_probe(0).batch
    for call in (lambda: attributor(None, probe=1), lambda: attributor(None).fit(data(), probe=1)):
        with pytest.raises(TypeError, match=r"^probe: expected True or False, got 1$"):
            call()


def test_a_call_of_fit_may_go_without(tmp_path):
    attributor(tmp_path / "none").fit(data(), probe=False)
    other(tmp_path / "none", "an attribute").attribute(data())
    attributor(tmp_path / "one", probe=False).fit(data(), probe=True)
    changed = other(tmp_path / "one", "an attribute")
    with pytest.raises(StoreError, match="that the fit of checkpoint 0 gave"):
        changed.attribute(data())
    changed.fit(data(12, 20), addition=1, probe=False)


def test_probe_false_goes_on_all_the_same(fitted):
    changed = other(fitted, "an attribute", probe=False)
    changed.attribute(data())
    changed.fit(data(12, 20), addition=1)


def test_in_memory_too():
    model = Net()
    fitted = attributor(None, model)
    fitted.fit(data())
    fitted.attribute(data())
    model.scale = 1.1
    with pytest.raises(StoreError, match="got others by 0"):
        fitted.attribute(data())


def test_a_deleted_probe_of_a_run_that_was_stopped_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr("trak_ext.store.base.shard_rows", lambda width: 8)
    attributor(tmp_path / "whole").fit(data())
    other(tmp_path / "other", "an attribute").fit(data())
    for after in (1, 2):  # a journal, and a shard

        class Stopped:
            def __iter__(self, after=after):
                yield from data()[:after]
                raise KeyboardInterrupt

        store = tmp_path / str(after)
        with pytest.raises(KeyboardInterrupt):
            attributor(store).fit(Stopped())
        (store / NAME).unlink()
        with pytest.raises(StoreError, match="other data in samples 0"):
            attributor(store).fit([(x + 1, y) for x, y in data()])
        assert not (store / NAME).exists()
        attributor(store).fit(data())
        assert contents_by_name(store) == contents_by_name(tmp_path / "whole")
    shard = "checkpoint-0000/features-000000000000.safetensors"
    shutil.rmtree(tmp_path / "2" / "checkpoint-0001")
    for path in (tmp_path / "2" / "checkpoint-0000").iterdir():
        path.unlink()
    (tmp_path / "2" / shard).write_bytes((tmp_path / "other" / shard).read_bytes())
    with pytest.raises(StoreError, match=rf"that the fit of checkpoint 0 gave .*{shard}"):
        attributor(tmp_path / "2").fit(data())
    assert not (tmp_path / "2" / NAME).exists()


def contents_by_name(store):
    return {path.relative_to(store): data for path, data in contents(store).items()}


@pytest.mark.parametrize("deleted", [["probe"], ["probe", "features-000000000000"]])
def test_a_deleted_probe_is_named_and_made_again(fitted, deleted):
    before = contents(fitted)
    for name in deleted:
        (fitted / "checkpoint-0000" / f"{name}.safetensors").unlink()
    with pytest.raises(StoreError, match=re.escape(str(fitted / NAME))):
        attributor(fitted).attribute(data())
    attributor(fitted).fit(data())
    assert contents(fitted) == before


# --- what is no other function --------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"chunk_size": 1}, {"precision": "medium"}, {"kind": "sjlt"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_other_chunks_batches_and_dtypes_are_within_tolerance(tmp_path, options, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3)
    )
    model = model.to(dtype)
    batches = [(x.to(dtype), y) for x, y in data()]
    options = {"store": tmp_path, "proj_dim": 8, "progress": False, **options}
    Attributor(model, "image_classification", **options).fit(batches)
    for chunk_size in (None, 2, 5):
        options["chunk_size"] = chunk_size
        again = Attributor(model, "image_classification", **options)
        again.fit([tuple(torch.cat(part) for part in zip(*batches, strict=True))])
        again.attribute(batches)


def test_under_autocast(tmp_path):
    with torch.autocast("cpu", torch.bfloat16):
        fitted = attributor(tmp_path)
        fitted.fit(data())
        fitted.attribute(data())
        with pytest.raises(StoreError, match="got others by"):
            other(tmp_path, "a function that it holds").attribute(data())


def test_tolerances_are_stated_for_each_dtype():
    assert probe.TOLERANCES.keys() == {torch.float64, torch.float32, torch.float16, torch.bfloat16}
    model, features = Net(), attributor(None)._features
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert probe.tolerance(features, cpu, "cpu") == 1e-3
    assert probe.tolerance(features, cuda, "cpu") == probe.tolerance(features, cpu, "cuda") == 1e-2
    features.gradients.model.half()
    assert probe.tolerance(features, cpu, "cpu") == 2e-2
    assert attributor(None, model, precision="medium")._features.precision == "medium"


def test_a_sample_of_vanishing_gradient_is_no_reason(tmp_path):
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0], [1e-9, 0.0, 0.0, 0.0], [1.0, 0.0, 1.0, 0.0]])
    model = nn.Linear(4, 3, bias=False)
    options = {"store": tmp_path, "proj_dim": 8, "progress": False}
    fitted = Attributor(model, "image_classification", **options)
    fitted.fit([(x, torch.arange(3))])
    fitted.attribute([(x, torch.arange(3))])


def test_samples_without_a_gradient_are_no_reason_and_their_outputs_are_looked_at(tmp_path):
    def task(bias=0.0):
        def function(model, batch):
            f = (model(batch[0]) * batch[0][:, :3]).sum(1)
            return f + bias, torch.ones_like(f), torch.ones_like(f)

        return Task("mine", function)

    x = torch.cat([torch.zeros(2, 4), data()[0][0]])  # the first two samples have none
    attributor(tmp_path, task=task()).fit([(x, x)])
    attributor(tmp_path, task=task()).attribute([(x[2:], x[2:])])
    with pytest.raises(StoreError, match="expected the output f that the fit"):
        attributor(tmp_path, task=task(0.1)).attribute([(x[2:], x[2:])])


# --- batches --------------------------------------------------------------------------------------


class Pair(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


class Towers(nn.Module):
    def __init__(self):
        super().__init__()
        self.image, self.text = nn.Linear(5, 3), nn.Linear(4, 3)
        self.logit_scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, image, text):
        return SimpleNamespace(image_embeds=self.image(image), text_embeds=self.text(text))


def test_a_task_with_a_context_is_probed_in_its_place(tmp_path):
    torch.manual_seed(0)
    model, pairs = Towers(), [(torch.randn(9, 5), torch.randn(9, 4))]
    options = {"proj_dim": 8, "progress": False, "store": tmp_path}
    fitted = Attributor(model, "clip", **options)
    fitted.fit(pairs)
    fitted.attribute(pairs)
    scaled = Task("clip", lambda m, b, c, i: clip_task().function(m, (b[0] * 1.1, b[1]), c, i),
                  clip_task().prepare)  # fmt: skip
    with pytest.raises(StoreError, match="that the fit of checkpoint 0 gave"):
        Attributor(model, scaled, **options).attribute(pairs)


@pytest.mark.parametrize(
    "batch",
    [
        (torch.ones(2, 3), torch.zeros(2)),
        {"a": torch.ones(2), 3: torch.zeros(2, 1), None: torch.ones(2), True: torch.zeros(2)},
        ({"a": (torch.ones(2), {"b": torch.zeros(2)})}, torch.ones(2)),
        Pair(torch.ones(2), torch.zeros(2)),
        {"nested": Pair(torch.ones(2), torch.zeros(2))},
    ],
    ids=["pair", "keys", "nested", "named tuple", "named tuple within"],
)
def test_batches_are_put_together_from_tensors_and_json(batch):
    structure, tensors = take_apart(batch)
    built = put_together(json.loads(json.dumps(structure)), tensors)
    assert type(built) is type(batch)
    assert str(built) == str(batch)


@pytest.mark.parametrize(
    ("structure", "count"),
    [("tensor", 0), ("tensor", 2), ({"mapping": [[{"other": "(1, 2)"}, "tensor"]]}, 1),
     ({"sequence": ["tensor"], "type": "os.system"}, 1), ({"other": "str"}, 0), ("text", 0),
     ({"sequence": ["tensor"], "type": "not.imported.Class"}, 1)],
)  # fmt: skip
def test_nothing_else_is_put_together(structure, count):
    with pytest.raises(ValueError, match=r"."):
        put_together(structure, [torch.zeros(1)] * count)


def test_batches_of_hugging_face_and_named_tuples_keep_their_class(tmp_path):
    from transformers import BatchEncoding

    def of_attribute(model, batch):
        return model(batch.x)[:, 0]

    x, y = data()[0]
    for name, batch in (("pair", Pair(x, y)), ("encoding", BatchEncoding({"x": x, "y": y}))):
        for task, refused in ((of_attribute, False), (lambda m, b: m(b.x)[:, 1], True)):
            changed = attributor(tmp_path / name, task=Task("of an attribute", task))
            if not refused:
                changed.fit([batch])
                changed.attribute([batch])
                continue
            with pytest.raises(StoreError, match="that the fit of checkpoint 0 gave"):
                changed.attribute([batch])


def test_a_class_that_is_gone_is_said_and_nothing_else_happens(tmp_path, monkeypatch):
    x, y = data()[0]
    task = Task("first", lambda model, batch: model(batch[0])[:, 0])
    attributor(tmp_path, task=task).fit([Pair(x, y)])
    monkeypatch.delattr(f"{__name__}.Pair")
    with pytest.warns(
        RuntimeWarning, match=r"the classes that the probe's batch is made of, got a"
    ):
        attributor(tmp_path, task=task).attribute([(x, y)])


def test_a_batch_that_cannot_be_kept_is_said_once(tmp_path):
    class Odd:
        def __hash__(self):
            return 3

        def __eq__(self, other):
            return isinstance(other, Odd)

        def __repr__(self):
            return "odd"

    task = Task("odd", lambda model, batch: model(batch[Odd()])[:, 0])
    batches = [{Odd(): x} for x, _ in data()]
    fitted = attributor(tmp_path, task=task)
    with pytest.warns(RuntimeWarning, match=r"tensors and JSON.*got the key odd") as caught:
        fitted.fit(batches)
    assert len(caught) == 1
    fitted.attribute(batches)
