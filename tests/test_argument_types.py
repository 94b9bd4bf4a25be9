"""NumPy's integers, floats and bools are as welcome as Python's; a bool is no integer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import trak_ext
from trak_ext import Attributor, Projector, baselines, evaluation, report, tasks

TASK = "image_classification"
GRADS = torch.arange(24.0).reshape(3, 8)
FEATURES, TARGETS = torch.eye(6)[:5], torch.arange(18.0).reshape(3, 6)
SCORES = torch.arange(15.0).reshape(5, 3).cos()
MASKS = torch.tensor([[1, 1, 0, 0, 1], [0, 1, 1, 0, 1], [1, 0, 1, 1, 0], [0, 0, 1, 1, 1]]).bool()
OUTPUTS = torch.arange(12.0).reshape(4, 3).sin()


def data(rows: int = 5) -> list[tuple[Tensor, Tensor]]:
    return [(torch.arange(rows * 4.0).reshape(rows, 4).sin(), torch.arange(rows) % 3)]


def make(method: Any = Attributor, **options: Any) -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    if method is Attributor:
        options = {"proj_dim": 6, **options}
    return method(model, TASK, **{"progress": False, **options})


def fitted(method: Any = Attributor, **options: Any) -> Any:
    made = make(method, **options)
    made.fit(data())
    return made


def scores(method: Any = Attributor, **options: Any) -> Tensor:
    return fitted(method, **options).attribute(data(2))


def scores_of_addition(addition: Any) -> Tensor:
    made = fitted()
    made.fit(data(4), addition=addition)
    return made.attribute(data(2))


def threads(num_threads: Any) -> int:
    trak_ext.set_num_threads(num_threads)
    return trak_ext.get_num_threads()


def flips(masks: Tensor, seeds: list[int]) -> Tensor:
    assert all(type(seed) is int for seed in seeds)
    return (masks.sum(1)[:, None] + torch.tensor(seeds)[:, None] + torch.arange(3)) % 2


def outputs(masks: Tensor, seeds: list[int]) -> Tensor:
    assert all(type(seed) is int for seed in seeds)
    return (masks.float() @ SCORES) + torch.tensor(seeds)[:, None]


def brittleness(**options: Any) -> Any:
    arguments = {"num_seeds": 2, "num_resamples": 10, **options}
    return evaluation.counterfactual_brittleness(
        SCORES, flips, arguments.pop("counts", [2]), **arguments
    )


def changes(num_train: Any = 5, **options: Any) -> Tensor:
    return evaluation.leave_one_out_changes(outputs, num_train, **options)


def flipped(**options: Any) -> Any:
    return evaluation.flip_labels(
        torch.arange(9) % 3, **{"num_classes": 3, "share": 0.4, **options}
    )


# Argument of a call: the call, and a value for it.
INTEGERS: dict[str, tuple[Callable[[Any], Any], int]] = {
    "Attributor proj_dim": (lambda x: scores(proj_dim=x), 4),
    "Attributor seed": (lambda x: scores(seed=x), 7),
    "Attributor blocks": (lambda x: scores(blocks=x), 2),
    "Attributor chunk_size": (lambda x: scores(chunk_size=x), 2),
    "Attributor nnz": (lambda x: scores(kind="sjlt", nnz=x), 3),
    "fit addition": (scores_of_addition, 1),
    "attribute top_k": (lambda x: fitted().attribute(data(2), top_k=x), 2),
    "project proj_dim": (lambda x: trak_ext.project(GRADS, x), 5),
    "project seed": (lambda x: trak_ext.project(GRADS, 5, seed=x), 9),
    "project model_id": (lambda x: trak_ext.project(GRADS, 5, model_id=x), 2),
    "project param_offset": (lambda x: trak_ext.project(GRADS, 5, param_offset=x), 77),
    "project nnz": (lambda x: trak_ext.project(GRADS, 6, kind="sjlt", nnz=x), 3),
    "projection_matrix num_params": (lambda x: trak_ext.projection_matrix(x, 5), 8),
    "projection_matrix proj_dim": (lambda x: trak_ext.projection_matrix(8, x), 5),
    "projection_matrix seed": (lambda x: trak_ext.projection_matrix(8, 5, seed=x), 5),
    "projection_matrix model_id": (lambda x: trak_ext.projection_matrix(8, 5, model_id=x), 5),
    "projection_matrix param_offset": (
        lambda x: trak_ext.projection_matrix(8, 5, param_offset=x),
        5,
    ),
    "projection_matrix nnz": (lambda x: trak_ext.projection_matrix(8, 6, kind="sjlt", nnz=x), 2),
    "Projector grad_dim": (lambda x: Projector(x, 5).project(GRADS), 8),
    "Projector proj_dim": (lambda x: Projector(8, x).project(GRADS), 5),
    "Projector seed": (lambda x: Projector(8, 5, seed=x).project(GRADS), 5),
    "Projector nnz": (lambda x: Projector(8, 6, kind="sjlt", nnz=x).project(GRADS), 2),
    "Projector.project model_id": (lambda x: Projector(8, 5).project(GRADS, x), 5),
    "top_k k": (lambda x: trak_ext.top_k(FEATURES, TARGETS, x), 2),
    "soft_threshold keep": (lambda x: trak_ext.soft_threshold(SCORES, keep=x), 2),
    "set_num_threads num_threads": (threads, 2),
    "clip_task num_negatives": (lambda x: tasks.clip_task(x), 5),
    "clip_task seed": (lambda x: tasks.clip_task(5, seed=x), 5),
    "lds num_resamples": (
        lambda x: evaluation.lds(SCORES, MASKS, OUTPUTS, num_resamples=x),
        20,
    ),
    "lds seed": (lambda x: evaluation.lds(SCORES, MASKS, OUTPUTS, num_resamples=20, seed=x), 5),
    "lds_difference num_resamples": (
        lambda x: evaluation.lds_difference(SCORES, -SCORES, MASKS, OUTPUTS, num_resamples=x),
        20,
    ),
    "lds_difference seed": (
        lambda x: evaluation.lds_difference(
            SCORES, -SCORES, MASKS, OUTPUTS, num_resamples=20, seed=x
        ),
        5,
    ),
    "counterfactual_brittleness counts": (lambda x: brittleness(counts=[x]), 2),
    "counterfactual_brittleness num_seeds": (lambda x: brittleness(num_seeds=x), 3),
    "counterfactual_brittleness models_at_once": (lambda x: brittleness(models_at_once=x), 3),
    "counterfactual_brittleness num_resamples": (lambda x: brittleness(num_resamples=x), 30),
    "counterfactual_brittleness seed": (lambda x: brittleness(seed=x), 5),
    "leave_one_out_changes num_train": (lambda x: changes(x), 5),
    "leave_one_out_changes seeds": (lambda x: changes(seeds=[x]), 3),
    "leave_one_out_changes models_at_once": (lambda x: changes(models_at_once=x), 2),
    "leave_one_out_correlation num_resamples": (
        lambda x: evaluation.leave_one_out_correlation(SCORES, changes(), num_resamples=x),
        20,
    ),
    "leave_one_out_correlation seed": (
        lambda x: evaluation.leave_one_out_correlation(SCORES, changes(), num_resamples=20, seed=x),
        5,
    ),
    "flip_labels num_classes": (lambda x: flipped(num_classes=x), 3),
    "flip_labels seed": (lambda x: flipped(seed=x), 5),
    "GradientProduct proj_dim": (lambda x: scores(baselines.GradientProduct, proj_dim=x), 4),
    "GradientCosine seed": (lambda x: scores(baselines.GradientCosine, proj_dim=4, seed=x), 4),
    "TracIn nnz": (lambda x: scores(baselines.TracIn, kind="sjlt", proj_dim=6, nnz=x), 2),
    "TracIn chunk_size": (lambda x: scores(baselines.TracIn, chunk_size=x), 2),
    "Random seed": (lambda x: scores(baselines.Random, seed=x), 4),
    "baseline's top_k": (lambda x: fitted(baselines.TracIn).attribute(data(2), top_k=x), 2),
}
FLOATS: dict[str, Callable[[Any], Any]] = {
    "Attributor damping": lambda x: scores(damping=x),
    "Attributor ridge": lambda x: scores(ridge=x),
    "score damping": lambda x: trak_ext.score(FEATURES, TARGETS, damping=x),
    "score ridge": lambda x: trak_ext.score(FEATURES, TARGETS, ridge=x),
    "top_k damping": lambda x: trak_ext.top_k(FEATURES, TARGETS, 2, damping=x),
    "top_k ridge": lambda x: trak_ext.top_k(FEATURES, TARGETS, 2, ridge=x),
    "soft_threshold threshold": lambda x: trak_ext.soft_threshold(SCORES, x),
    "clip_task logit_scale": lambda x: tasks.clip_task(logit_scale=x),
    "flip_labels share": lambda x: flipped(share=x),
    "TracIn learning_rates": lambda x: scores(baselines.TracIn, learning_rates=[x]),
    "Item label": lambda x: report.Item(text="a", label=x).label,
}
FLAGS: dict[str, Callable[[Any], Any]] = {
    "Attributor leverage": lambda x: (fitted(leverage=x).fingerprint, scores(leverage=x)),
    "Attributor progress": lambda x: scores(progress=x),
    "attribute largest": lambda x: fitted().attribute(data(2), top_k=2, largest=x),
    "score leverage": lambda x: trak_ext.score(FEATURES, TARGETS, leverage=x),
    "top_k leverage": lambda x: trak_ext.top_k(FEATURES, TARGETS, 2, leverage=x),
    "top_k largest": lambda x: trak_ext.top_k(FEATURES, TARGETS, 2, largest=x),
    "baseline's largest": lambda x: fitted(baselines.Random).attribute(data(2), top_k=2, largest=x),
}


def assert_same(got: Any, expected: Any) -> None:
    """Compare results to the bit, however they are nested."""
    assert type(got) is type(expected)
    if isinstance(expected, Tensor):
        assert torch.equal(got, expected)
    elif isinstance(expected, (tuple, list)):
        for a, b in zip(got, expected, strict=True):
            assert_same(a, b)
    elif isinstance(expected, trak_ext.TopK):
        assert_same((got.values, got.indices), (expected.values, expected.indices))
    else:
        assert got == expected


@pytest.mark.parametrize("argument", INTEGERS)
@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8])
def test_integers_of_numpy_are_integers(argument, dtype):
    call, value = INTEGERS[argument]
    assert_same(call(dtype(value)), call(value))


@pytest.mark.parametrize("argument", INTEGERS)
@pytest.mark.parametrize("value", [True, np.bool_(True), 2.0, np.float64(2), "2"], ids=repr)
def test_what_is_no_integer_is_refused_by_name(argument, value):
    call, _ = INTEGERS[argument]
    name = argument.split()[-1]
    with pytest.raises((TypeError, ValueError), match=rf"^{name}.*: expected .*integer") as error:
        call(value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("argument", FLOATS)
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_floats_of_numpy_are_numbers(argument, dtype):
    call = FLOATS[argument]
    assert_same(call(dtype(0.375)), call(0.375))


@pytest.mark.parametrize("argument", FLAGS)
@pytest.mark.parametrize("value", [True, False])
def test_bools_of_numpy_are_flags(argument, value):
    assert_same(FLAGS[argument](np.bool_(value)), FLAGS[argument](value))


@pytest.mark.parametrize("argument", FLAGS)
@pytest.mark.parametrize("value", [1, 0.0, "no", None, np.int64(1)], ids=repr)
def test_what_is_no_bool_is_refused_by_name(argument, value):
    name = argument.split()[-1]
    with pytest.raises(TypeError, match=f"^{name}: expected True or False, got "):
        FLAGS[argument](value)
