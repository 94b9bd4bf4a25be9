"""What surrounds an Attributor's calls: dtypes, changing loaders, the model's state, progress."""

from __future__ import annotations

import copy

import pytest
import torch

import trak_ext
from attributor_cases import (
    assert_scores,
    attributor,
    brute_force,
    conv_net,
    images,
    mlp,
    states_of,
    vectors,
)


def test_gradients_meet_the_matrix_a_parameter_at_a_time_without_a_copy(monkeypatch):
    made, projected, order = [], [], []
    compute = trak_ext.attribution.features.GradientComputer.__call__
    project = trak_ext.attribution.features.operators.project

    def noted_compute(self, weights, batch, *context):
        for part in compute(self, weights, batch, *context):
            made.append([grad.data_ptr() for grad in part.grads.values()])
            order.append(list(part.grads))
            yield part

    def noted_project(grads, *args):
        projected.append([grad.data_ptr() for grad in grads])
        assert not any(grad.requires_grad for grad in grads)
        return project(grads, *args)

    monkeypatch.setattr(trak_ext.attribution.features.GradientComputer, "__call__", noted_compute)
    monkeypatch.setattr(trak_ext.attribution.features.operators, "project", noted_project)
    model = conv_net()
    attributor(model, chunk_size=4).fit([images(9)])
    assert len(projected) == 3
    assert projected == made
    names = [name for name, _ in model.named_parameters()]
    assert all(list(grads) == names for grads in order)


def test_the_model_is_as_it_was():
    model = conv_net()
    model[1].eval()
    before = copy.deepcopy(model.state_dict())
    fitted = attributor(model, checkpoints=states_of(model))
    fitted.fit([images(9)])
    fitted.attribute([images(2)])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model] == [True, False, True, True, True, True]
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_models_of_other_dtypes(dtype):
    model = mlp().to(dtype)
    (x, y), (x_test, y_test) = vectors(20), vectors(3)
    x, x_test = x.to(dtype), x_test.to(dtype)
    fitted = attributor(model)
    fitted.fit([(x, y)])
    expected, _ = brute_force("any", model, [model.state_dict()], (x, y), (x_test, y_test))
    got = fitted.attribute([(x_test, y_test)])
    assert_scores(got, expected, {torch.float64: 1e-5, torch.bfloat16: 0.1}[dtype])


def test_results_are_fp32_under_another_default_dtype(tmp_path):
    model, train, test = mlp(), vectors(9), vectors(3)
    attributor(model, store=tmp_path).fit([train])
    torch.set_default_dtype(torch.float64)
    try:
        fitted = attributor(model)
        fitted.fit([train])
        results = [
            fitted._store.read(0, 0).features,
            fitted.attribute([test]),
            fitted.attribute([test], top_k=2).values,
            fitted.attribute([test], top_k=0).values,
            fitted.self_influence(),
        ]
    finally:
        torch.set_default_dtype(torch.float32)
    assert [result.dtype for result in results] == [torch.float32] * 5
    expected = attributor(model, store=tmp_path).attribute([test])
    assert torch.equal(results[1].float(), expected)


class Shuffled:
    """Another order at every pass, in a form that no look at the loader tells."""

    def __init__(self, data):
        self.data = data

    def __iter__(self):
        yield tuple(tensor[:2] for tensor in self.data)
        order = 2 + torch.randperm(len(self.data[0]) - 2)
        yield tuple(tensor[order] for tensor in self.data)


def test_a_train_loader_that_changes_between_passes_is_refused():
    model = mlp()
    fitted = attributor(model, checkpoints=states_of(model))
    with pytest.raises(ValueError, match=r"^train_loader: expected the same samples in the same"):
        fitted.fit(Shuffled(vectors(20)))


def test_a_test_loader_that_changes_between_passes_is_refused():
    model = mlp()
    fitted = attributor(model, checkpoints=states_of(model))
    fitted.fit([vectors(20)])
    with pytest.raises(ValueError, match=r"^test_loader: expected the same samples in the same"):
        fitted.attribute(Shuffled(vectors(20)))


def test_a_test_loader_of_changing_length_is_refused():
    class Growing(list):
        def __iter__(self):
            self.append(vectors(2))
            return super().__iter__()

    model = mlp()
    fitted = attributor(model, checkpoints=states_of(model))
    fitted.fit([vectors(20)])
    with pytest.raises(ValueError, match=r"^test_loader: expected (?!.*None).*, got"):
        fitted.attribute(Growing())


def test_progress_goes_to_stderr_and_can_be_silent(capsys, monkeypatch):
    monkeypatch.setattr("trak_ext.attribution.progress._on_terminal", lambda: True)
    for progress in (False, True):
        fitted = attributor(mlp(), progress=progress)
        fitted.fit([vectors(9)])
        fitted.attribute([vectors(2)])
        captured = capsys.readouterr()
        assert captured.out == ""
        assert ("fit" in captured.err and "9 samples" in captured.err) == progress
        assert ("targets" in captured.err) == progress
