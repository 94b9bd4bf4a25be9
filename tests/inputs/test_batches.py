"""Batches of any nesting, and what a batch may be."""

from __future__ import annotations

import warnings
from collections import OrderedDict, UserDict, namedtuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import trak_ext
from trak_ext.inputs.batches import (
    batch_size,
    batch_tensors,
    in_containers,
    map_tensors,
    plain_containers,
    segments,
)
from trak_ext.tasks import Task

CPU = torch.device("cpu")
X, Y = torch.randn(6, 4, generator=torch.Generator().manual_seed(1)), torch.arange(6) % 3
Pair = namedtuple("Pair", "first second")


class Fields(UserDict):
    """As Hugging Face's BatchEncoding."""


def test_helpers_for_batches():
    batch = {"a": torch.zeros(3, 2), "b": [torch.ones(3), (torch.zeros(3, 1, 1),)]}
    assert batch_size(batch) == 3
    assert [tuple(tensor.shape) for tensor in batch_tensors(batch)] == [(3, 2), (3,), (3, 1, 1)]
    mapped = map_tensors(lambda tensor: tensor[:2], batch)
    assert set(mapped) == {"a", "b"}
    assert batch_size(mapped) == 2
    assert mapped["b"][1][0].shape == (2, 1, 1)


# --- NumPy arrays ---------------------------------------------------------------------------------

ARRAYS = {
    "plain": lambda a: a,
    "other byte order": lambda a: a.astype(a.dtype.newbyteorder("S")),
    "reversed": lambda a: a[::-1].copy()[::-1],
    "transposed": lambda a: np.asfortranarray(a),
    "every other": lambda a: np.repeat(a, 2, axis=0)[::2],
    "read-only": lambda a: np.frombuffer(a.tobytes(), a.dtype).reshape(a.shape),
    "narrow": lambda a: a.astype(np.float32 if a.dtype.kind == "f" else np.uint16),
}


def fit_and_attribute(train, targets, task="image_classification"):
    torch.manual_seed(0)
    attributor = trak_ext.Attributor(nn.Linear(4, 3), task, proj_dim=8, damping=1.0, progress=False)
    attributor.fit(train)
    return attributor.attribute(targets)


@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays_of_any_layout_are_taken_as_their_numbers(kind):
    x, y = ARRAYS[kind](X.numpy()), ARRAYS[kind](Y.numpy())
    before = x.tobytes(), y.tobytes()
    expected = fit_and_attribute([(X, Y)], [(X[:2], Y[:2])])
    torch.testing.assert_close(fit_and_attribute([(x, y)], [(x[:2], y[:2])]), expected)
    assert (x.tobytes(), y.tobytes()) == before


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (np.ma.masked_array(X.numpy(), mask=X.numpy() > 0), "a masked array of float32"),
        (X.numpy().astype("c8"), "an array of complex64"),
        (np.array([object()] * 6), "an array of object"),
        (np.array(list("abcdef")), "an array of <U1"),
        (np.zeros(6, "M8[s]"), r"an array of datetime64\[s\]"),
        (np.zeros(6, [("a", "i4")]), r"an array of \[\('a', '<i4'\)\]"),
        (np.float32(3), "a float32"),
    ],
)
def test_arrays_that_no_tensor_is_for_are_named(array, said):
    with pytest.raises(TypeError, match=rf"^batch\['x'\]: expected tensors in .*, got {said} \("):
        fit_and_attribute([{"x": array, "labels": Y}], [(X, Y)])


@pytest.mark.skipif(np.dtype(np.longdouble).itemsize == 8, reason="long double is double here")
def test_an_array_wider_than_any_tensor_is_named():
    with pytest.raises(TypeError, match=r"^batch\[0\]: .*got an array of float"):
        fit_and_attribute([(X.numpy().astype(np.longdouble), Y)], [(X, Y)])


@pytest.mark.filterwarnings("ignore")  # torch's, about kinds that it gives up
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: X.to_sparse(), "sparse"),
        (lambda: X.to_sparse_csr(), "sparse"),
        (lambda: torch.nested.nested_tensor(list(X)), "nested"),
        (lambda: torch.nested.nested_tensor(list(X), layout=torch.jagged), "nested"),
        (lambda: X.to("meta"), "meta"),
        (lambda: torch.quantize_per_tensor(X, 0.1, 0, torch.qint8), "quantized"),
    ],
)
@pytest.mark.parametrize("where", ["fit", "attribute"])
def test_tensors_that_cannot_be_cut_are_named(make, said, where):
    good, bad = [(X, Y)], [(make(), Y)]
    train, targets = (bad, good) if where == "fit" else (good, bad)
    with pytest.raises(
        TypeError, match=rf"^batch\[0\]: expected a dense tensor .*got a {said} one"
    ):
        fit_and_attribute(train, targets)


# --- containers -----------------------------------------------------------------------------------


class Halves(UserDict):
    def __init__(self, fields):
        super().__init__({key: value / 2 for key, value in fields.items()})


class Adds(UserDict):
    def __init__(self, fields):
        super().__init__({**fields, "more": torch.zeros(6)})


class WantsMore(UserDict):
    def __init__(self, fields, more):
        super().__init__(fields)


@pytest.mark.parametrize("make", [Halves, Adds, lambda f: WantsMore(f, 1)])
def test_a_mapping_that_would_change_when_made_anew_is_refused(make):
    task = Task("sum", lambda model, batch: model(batch["x"]).sum(1))
    with pytest.raises(TypeError, match=r"^batch: expected mappings whose class .*got a \w+ \(let"):
        fit_and_attribute([make({"x": X})], [{"x": X}], task)


def test_a_column_of_text_is_warned_about_once_a_pass():
    batch = {"input_ids": X, "labels": Y, "text": ["a"] * 6}
    other = {"input_ids": X, "labels": Y, "text": ["a"] * 6, "name": ["b"] * 6}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = list(segments([batch, batch, other, batch, other], CPU, 4))
    assert [str(w.message).rsplit(": ", 1)[1] for w in caught] == ["text", "text, name"]
    assert all(set(segment.batch) == {"input_ids", "labels"} for segment in found)


def test_a_task_with_context_gives_its_ids_by_their_names():
    def prepare(model, batches, checkpoint):
        return {"mean": torch.cat([batch["x"] for _, batch in batches]).mean(0)}

    def f(model, batch, context, index):
        return model(batch["x"] - context["mean"]).sum(1)

    def scores(ids_as, more):
        task = Task("centred", f, prepare, ids_as=ids_as)
        return fit_and_attribute([{"x": X, **more}], [{"x": X[:2]}], task)

    expected = scores((), {})
    torch.testing.assert_close(scores(("name",), {"name": list("abcdef")}), expected)


KEYS = st.text(max_size=3) | st.integers(-3, 3) | st.none() | st.tuples(st.integers(0, 2))
LEAVES = st.tuples(st.sampled_from(["tensor", "array"]), st.integers(0, 9), st.integers(0, 2))


def deeper(inner):
    return (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.builds(Pair, inner, inner)
        | st.dictionaries(KEYS, inner, max_size=3)
        | st.dictionaries(KEYS, inner, max_size=3).map(OrderedDict)
        | st.dictionaries(KEYS, inner, max_size=3).map(Fields)
    )


def filled(plan, count):
    """Return a drawn plan's batch of `count` samples, and its leaves in order as tensors."""
    leaves = []

    def fill(plan):
        if isinstance(plan, (dict, UserDict)):
            return type(plan)({key: fill(value) for key, value in plan.items()})
        if type(plan) is tuple and len(plan) == 3 and plan[0] in ("tensor", "array"):
            kind, seed, dims = plan
            generator = torch.Generator().manual_seed(seed)
            leaf = torch.randn(count, *[2] * dims, generator=generator)
            leaves.append(leaf)
            return leaf if kind == "tensor" else leaf.numpy()
        if isinstance(plan, Pair):
            return Pair(fill(plan.first), fill(plan.second))
        return type(plan)(fill(part) for part in plan)

    return fill(plan), leaves


def unfold(value):
    """Yield a batch's leaves in order."""
    if isinstance(value, torch.Tensor):
        yield value
        return
    for part in value.values() if isinstance(value, (dict, UserDict)) else value:
        yield from unfold(part)


def shape_of(value):
    """Return a batch's containers: what a task is promised of them, and the leaves as one word."""
    if isinstance(value, (dict, UserDict)):
        kind = type(value) if isinstance(value, UserDict) else dict
        return kind, [(key, shape_of(part)) for key, part in value.items()]
    if isinstance(value, (tuple, list)):
        kind = type(value) if isinstance(value, Pair) else tuple
        return kind, [shape_of(part) for part in value]
    return "leaf"


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(plan=st.recursive(LEAVES, deeper, max_leaves=5), cut=st.integers(1, 5))
def test_a_batch_of_any_nesting_reaches_the_task_as_it_was(plan, cut):
    batch, leaves = filled(
        [plan], 6
    )  # of a mapping at the top, columns without numbers are left out
    expected_shape = shape_of(batch)
    if not leaves:
        with pytest.raises(
            ValueError, match=r"^batch: expected tensors with one number of samples"
        ):
            list(segments([batch], CPU, cut))
        return
    assert shape_of(in_containers(plain_containers(batch), batch)) == expected_shape

    def features(parts):
        return torch.stack(
            [part.reshape(len(part), -1).sum(1) * (i + 1) for i, part in enumerate(parts)], 1
        )

    def nested(model, given):
        assert shape_of(given) == expected_shape
        return model(features(list(unfold(given))).sum(1, keepdim=True))[:, 0]

    plain = Task("plain", lambda model, x: model(x)[:, 0])
    x = features(leaves).sum(1, keepdim=True)
    found = []
    for task, loader in ((Task("nested", nested), [batch]), (plain, [x])):
        torch.manual_seed(0)
        attributor = trak_ext.Attributor(
            nn.Linear(1, 1), task, proj_dim=8, damping=1.0, chunk_size=cut, progress=False
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a key that JSON has no word for
            attributor.fit(loader)
        found.append(attributor.attribute(loader))
    torch.testing.assert_close(*found)
