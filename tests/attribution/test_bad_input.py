"""Wrong arguments of Attributor, loaders, tasks and params: one sentence, nothing written."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from trak_ext import Attributor, Projector, StoreError
from trak_ext.gradients import GradientComputer, choose_parameters
from trak_ext.inputs.batches import batch_size, map_tensors
from trak_ext.tasks import TASKS, Task, get_task

TASK = "image_classification"
ERRORS = (ValueError, TypeError)


def net():
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))


def data(count=6):
    return torch.randn(count, 4), torch.randint(0, 3, (count,))


def make(model=None, task=TASK, **options):
    options = {"proj_dim": 4, "progress": False, **options}
    return Attributor(net() if model is None else model, task, **options)


def assert_one_sentence(error):
    text = str(error.value)
    assert "expected" in text
    assert "got" in text
    assert "\n" not in text


ARGUMENTS = [
    ({"model": 3}, "model: expected a torch.nn.Module, got 3"),
    ({"model": lambda x: x}, "model: expected a torch.nn.Module, got a function"),
    ({"model": nn.ReLU()}, "params: expected a model with a parameter that requires grad"),
    ({"task": "translation"}, "task: expected .*'image_classification'.*, got 'translation'"),
    ({"task": None}, "task: expected .*, got None"),
    ({"task": lambda model, batch: 0}, "task: expected a trak_ext.tasks.Task"),
    ({"proj_dim": 0}, "proj_dim: expected an integer from 1 to 4294967296, got 0"),
    ({"proj_dim": -1}, "proj_dim: expected an integer from 1"),
    ({"proj_dim": 2**32 + 1}, "proj_dim: expected an integer from 1 to 4294967296, got 4294967297"),
    ({"proj_dim": 8.0}, r"proj_dim: expected an integer, got 8\.0"),
    ({"proj_dim": True}, "proj_dim: expected an integer, got True"),
    ({"kind": "gaussian"}, "kind: expected one of 'rademacher', 'normal', 'sjlt', got 'gaussian'"),
    ({"kind": ""}, "kind: expected one of 'rademacher', 'normal', 'sjlt', got ''"),
    ({"seed": -1}, "seed: expected an integer from 0 to 18446744073709551615, got -1"),
    ({"seed": 2**64}, "seed: expected an integer from 0"),
    ({"seed": None}, "seed: expected an integer, got None"),
    ({"damping": -1.0}, "damping: expected a finite number that is at least 0, got -1.0"),
    ({"damping": float("inf")}, "damping: expected a finite number"),
    ({"damping": None}, "damping: expected a number, got None"),
    ({"precision": "low"}, "precision: expected one of 'medium', 'high', 'highest', got 'low'"),
    ({"chunk_size": 0}, "chunk_size: expected an integer from 1 to .*, got 0"),
    ({"chunk_size": "all"}, "chunk_size: expected an integer, got 'all'"),
    ({"device": "gpu"}, "device: expected .* got 'gpu'"),
    ({"device": [1]}, "device: expected .* got "),
    ({"store": 3}, "store: expected .* got 3"),
    ({"store": ""}, "store: expected .* got ''"),
    ({"params": "layer.*"}, r"params: expected patterns that match .*0\.weight.*, got 'layer\.\*'"),
    ({"params": ["0.*", "9.*"]}, r"params: expected patterns that match .*, got '9\.\*'"),
    ({"params": [0]}, "params: expected glob patterns as strings, got 0"),
    ({"params": 3}, "params: expected .* got 3"),
    ({"params": []}, "params: expected .* got "),
    ({"params": lambda name, parameter: False}, "params: expected a predicate that chooses"),
]


@pytest.mark.parametrize(("change", "message"), ARGUMENTS)
def test_arguments_of_attributor(change, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = {"model": net(), "task": TASK, "store": tmp_path / "store", "proj_dim": 4, **change}
    with pytest.raises(ERRORS, match=r"^" + message) as error:
        Attributor(**options)
    assert_one_sentence(error)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_device_that_is_not_there_is_refused_at_once():
    with pytest.raises((*ERRORS, RuntimeError), match=r"^device: expected .* got .*cuda"):
        make(device="cuda")


@pytest.mark.parametrize("params", ["*", "table", lambda name, parameter: True])
def test_parameters_that_cannot_be_differentiated_are_refused(params):
    model = net()
    model.table = nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False)
    assert len(choose_parameters(model, None)) == 4
    with pytest.raises(ERRORS, match=r"^params: expected .*table"):
        make(model, params=params)


@pytest.mark.parametrize("proj_dim", [0, 2**32 + 1])
def test_proj_dim_of_a_projector(proj_dim):
    with pytest.raises(ValueError, match=r"^proj_dim: expected an integer from 1"):
        Projector(8, proj_dim)


X, Y = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
LOADERS = {
    "none": (None, "train_loader: expected an iterable of batches .*, got a NoneType"),
    "tensor": (X, "train_loader: expected an iterable of batches .*, got a Tensor"),
    "mapping": ({"x": X}, "train_loader: expected an iterable of batches .*, got a dict"),
    "data set": (TensorDataset(X, Y), "train_loader: expected an iterable of .*, got a TensorDat"),
    "shuffling": (
        DataLoader(TensorDataset(X, Y), shuffle=True),
        "train_loader: expected a loader that keeps the order .*, got one with a RandomSampler",
    ),
    "one-time": (iter([(X, Y)]), "train_loader: expected an iterable that can be gone over 2"),
    "lengths": ([(X, Y[:5])], r"batch: expected .*one number of samples.*\[\[6, 4\], \[5\]\]"),
    "scalar label": ([(X, torch.tensor(1))], "batch: expected tensors with one number of samples"),
    "empty tuple": ([()], "batch: expected tensors with one number of samples"),
    "strings": (
        [(X, np.array(["a"] * 6))],
        r"batch\[1\]: expected .*, got an array of <U1",
    ),
    "objects": ([(X, np.array([None] * 6))], r"batch\[1\]: expected .*, got an array of object"),
    "no labels": ([(X, None)], r"batch\[1\]: expected tensors in tuples, .*, got a NoneType"),
    "text": (["text"], "batch: expected tensors in tuples, .*, got text"),
    "a column": ([{"x": X, "name": ["a"] * 6}], r"batch\['name'\]\[0\]: expected .*, got text"),
    "odd key": ([{3: X, "labels": Y}], "batch: expected strings as keys, .*, got 3"),
    "numbers": ([[1, 2]], r"batch\[0\]: expected tensors in tuples, .*, got a int"),
    "inputs alone": ([X], r"batch: expected \(inputs, labels\) or a mapping .*, got a Tensor"),
    "a tuple of 4": ([(X, Y, Y, Y)], r"batch: expected \(inputs, labels\) or a mapping .* of 4"),
    "ids of floats": ([(X, Y, X[:, 0])], "sample_id: expected strings or integers, got a float"),
    "no such key": ([{"x": X, "target": Y}], "batch: expected a mapping with 'labels' .*target"),
    "float labels": ([(X, Y.float())], r"labels: expected integers \[B\], got torch\.float32"),
    "bool labels": ([(X, Y > 0)], r"labels: expected integers \[B\], got torch\.bool"),
    "label vectors": ([(X, Y[:, None])], r"labels: expected integers \[B\], got .*\[1, 1\]"),
    "label of no class": ([(X, Y + 1)], r"labels: expected classes from 0 to 2.* got 3 \(2 of 6\)"),
    "ignored label": ([(X, torch.full((6,), -100))], r"labels: expected .* got -100 \(6 of 6\)"),
}


@pytest.mark.parametrize(("loader", "message"), LOADERS.values(), ids=LOADERS)
def test_training_loaders(loader, message, tmp_path):
    model = net()
    checkpoints = [net().state_dict(), net().state_dict()]
    fitted = make(model, checkpoints=checkpoints, store=tmp_path / "store")
    with pytest.raises(ERRORS, match=r"^" + message) as error:
        fitted.fit(loader)
    assert_one_sentence(error)
    assert not (tmp_path / "store").exists()
    assert model.training


@pytest.mark.parametrize(("loader", "message"), LOADERS.values(), ids=LOADERS)
def test_target_loaders(loader, message):
    fitted = make(checkpoints=[net().state_dict(), net().state_dict()])
    fitted.fit([data()])
    with pytest.raises(
        ERRORS, match=r"^" + message.replace("train_loader", "test_loader")
    ) as error:
        fitted.attribute(loader)
    assert_one_sentence(error)


class Returns(nn.Module):
    def __init__(self, outputs, change):
        super().__init__()
        self.layer = nn.Linear(4, outputs)
        self.change = change

    def forward(self, x):
        return self.change(self.layer(x))


MODELS = {
    "one class": (1, lambda y: y, TASK, r"model: expected logits \[B, C\] with at least 2 classes"),
    "sequences": (3, lambda y: y[:, None], TASK, r"model: expected logits \[B, C\].*\[1, 1, 3\]"),
    "two predictions": (2, lambda y: y, "regression", "model: expected one prediction per sample"),
    "tuple": (3, lambda y: (y,), TASK, "model: expected .*logits.* got a tuple"),
    "dict": (3, lambda y: {"scores": y}, TASK, "model: expected .*logits.* got a dict"),
    "no logits": (3, lambda y: SimpleNamespace(y=y), TASK, "model: expected .*logits.* got a "),
    "None": (3, lambda y: None, TASK, "model: expected .*logits.* got (a )?None"),
}


@pytest.mark.parametrize(("outputs", "change", "task", "message"), MODELS.values(), ids=MODELS)
def test_models_that_do_not_fit_the_task(outputs, change, task, message, tmp_path):
    fitted = make(Returns(outputs, change), task, store=tmp_path / "store")
    with pytest.raises(ERRORS, match=r"^" + message) as error:
        fitted.fit([(X, Y)])
    assert_one_sentence(error)
    assert not (tmp_path / "store").exists()


TASK_RESULTS = {
    "nothing": (lambda f: None, "task 'mine': expected f, .* got .*NoneType"),
    "number": (lambda f: 1.0, "task 'mine': expected f, .* got .*float"),
    "number for Q": (lambda f: (f, 1.0), "task 'mine': expected f, .* got .*'Tensor', 'float'"),
    "four": (lambda f: (f, f, f, f), "task 'mine': expected f, "),
    "empty": (lambda f: (), "task 'mine': expected f, "),
    "list": (lambda f: [f, f], "task 'mine': expected f, .* got .*list"),
    "Q of another length": (lambda f: (f, f.repeat(2)), "task 'mine': .*of one length, got shapes"),
    "two outputs": (
        lambda f: f.repeat(2),
        "task 'mine': expected one output for one sample, got 2",
    ),
    "no output": (lambda f: f[:0], "task 'mine': expected one output for one sample, got 0"),
}


@pytest.mark.parametrize(("change", "message"), TASK_RESULTS.values(), ids=TASK_RESULTS)
@pytest.mark.parametrize("one_by_one", [False, True])
def test_tasks_of_a_user_that_return_something_else(change, message, one_by_one):
    task = Task("mine", lambda model, batch: change(model(batch[0])[:, 0]))
    computer = GradientComputer(net(), task)
    computer._one_by_one = one_by_one
    with pytest.raises(ERRORS, match=r"^" + message) as error:
        list(computer({}, (X, Y)))
    assert_one_sentence(error)


@pytest.mark.parametrize(
    ("name", "function", "message"),
    [
        ("", print, "name: expected a non-empty string, got ''"),
        (None, print, "name: expected a non-empty string, got None"),
        ("mine", None, r"function: expected a callable of \(model, batch\), got None"),
    ],
)
def test_tasks_without_a_name_or_function(name, function, message):
    with pytest.raises(ERRORS, match=r"^" + message):
        Task(name, function)


@pytest.mark.parametrize("task", ["", "Regression", 0, None, ["regression"], TASKS])
def test_unknown_tasks(task):
    with pytest.raises(ValueError, match=r"^task: expected .*'regression'.*, got") as error:
        get_task(task)
    assert_one_sentence(error)


@pytest.mark.parametrize("top_k", [-1, 7, 2.0, "all", True])
def test_top_k(top_k):
    fitted = make()
    fitted.fit([data(6)])
    with pytest.raises(ERRORS, match=r"^top_k: expected an integer") as error:
        fitted.attribute([data(2)], top_k=top_k)
    assert_one_sentence(error)


def test_top_k_is_looked_at_before_the_targets_are_computed():
    fitted = make()
    fitted.fit([data(6)])
    with pytest.raises(ValueError, match=r"^top_k: expected an integer from 0 to 6, got 7"):
        fitted.attribute(iter(lambda: pytest.fail("asked for a batch"), None), top_k=7)


@pytest.mark.parametrize("use", ["attribute", "top_k", "self_influence"])
@pytest.mark.parametrize("in_memory", [True, False])
def test_before_fit(use, in_memory, tmp_path):
    store = None if in_memory else tmp_path / "store"
    unfitted = make(store=store)
    sentence = r"^Attributor is not fitted: call fit\(\) first( \(there is no store at .*\))?$"
    with pytest.raises(StoreError, match=sentence) as error:
        {
            "attribute": lambda: unfitted.attribute([data(2)]),
            "top_k": lambda: unfitted.attribute([data(2)], top_k=1),
            "self_influence": unfitted.self_influence,
        }[use]()
    assert "\n" not in str(error.value)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("use", [lambda a: a.attribute([data(2)]), lambda a: a.self_influence()])
def test_a_kernel_matrix_that_is_not_positive_definite_names_damping(use):
    fitted = make(damping=0.0, proj_dim=8)
    fitted.fit([data(3)])
    with pytest.raises(ValueError, match=r"^damping: expected a value that makes") as error:
        use(fitted)
    assert_one_sentence(error)


def test_a_file_in_the_place_of_the_store(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StoreError, match=r"^store: expected a folder, got the file") as error:
        make(store=tmp_path / "file")
    assert_one_sentence(error)


def test_a_folder_with_a_manifest_of_something_else(tmp_path):
    (tmp_path / "manifest.json").write_text('{"name": "a web page"}')
    with pytest.raises(StoreError, match=r"^store: expected .*manifest\.json") as error:
        make(store=tmp_path).fit([data()])
    assert_one_sentence(error)
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


@pytest.mark.parametrize(
    "value", [None, 3, "text", np.array(["a"]), object()], ids=lambda value: type(value).__name__
)
def test_helpers_name_the_batch(value):
    with pytest.raises(TypeError, match=r"^batch\['x'\]\[0\]: expected tensors in tuples, li"):
        map_tensors(lambda tensor: tensor, {"x": [value]})


@pytest.mark.parametrize("batch", [(), {}, [torch.zeros(2), torch.zeros(3)], torch.tensor(1)])
def test_batch_sizes(batch):
    with pytest.raises(ValueError, match=r"^batch: expected tensors with one number of samples"):
        batch_size(batch)
