"""What a user sees of an Attributor: how it prints, the damping it chose, and what fit it lacks."""

from __future__ import annotations

import pytest
import torch

import trak_ext
from small_setting import fitted, setting
from trak_ext import Attributor, StoreError
from trak_ext.estimator import formula


def make(**options):
    model, states, _, _ = setting()
    options = {"checkpoints": states, "proj_dim": 6, "progress": False, **options}
    return Attributor(model, "image_classification", **options)


# --- repr -----------------------------------------------------------------------------------------


def test_an_attributor_prints_what_it_computes():
    assert repr(make()) == (
        "Attributor(Sequential, task 'image_classification', 2 checkpoints, 59 parameters -> "
        "proj_dim 6, sjlt, nnz 1, seed 0, features in memory, on cpu)"
    )


def test_an_attributor_prints_what_is_not_as_usual(tmp_path):
    options = {"kind": "sjlt", "nnz": 3, "blocks": 2, "seed": 5, "store": tmp_path / "store"}
    assert repr(make(checkpoints=None, params="2.*", **options)) == (
        "Attributor(Sequential, task 'image_classification', 1 checkpoints, 24 parameters -> "
        "proj_dim 6, 2 projection blocks, sjlt, nnz 3, seed 5, "
        f"features in {str(tmp_path / 'store')!r}, on cpu)"
    )


def test_printing_neither_fits_nor_writes(tmp_path):
    repr(make(store=tmp_path / "store"))
    assert not (tmp_path / "store").exists()


def test_the_best_samples_print_as_index_and_score():
    values = torch.tensor([[2.0, 0.123456], [-1e-7, float("inf")]])
    best = trak_ext.TopK(values, torch.tensor([[3, 10], [0, 7]]))
    assert repr(best) == (
        "TopK: 2 targets, 2 training samples each: index (score)\n"
        "  target 0: 3 (2), 10 (0.1235)\n"
        "  target 1: 0 (-1e-07), 7 (inf)"
    )


def test_many_best_samples_print_in_short():
    best = trak_ext.TopK(torch.ones(4, 6), torch.arange(24).reshape(4, 6))
    best.ids = [["a"] * 6] * 4
    lines = repr(best).splitlines()
    assert lines[0] == "TopK: 4 targets, 6 training samples each, with their ids: index (score)"
    assert lines[1] == "  target 0: 0 (1), 1 (1), 2 (1), 3 (1), 4 (1)"
    assert [line[:10] for line in lines[2:]] == ["  target 1", "  target 2", "  ..."]


@pytest.mark.parametrize("shape", [(0, 0), (0, 3), (2, 0)])
def test_no_best_samples_print_too(shape):
    best = trak_ext.TopK(torch.ones(shape), torch.ones(shape, dtype=torch.int64))
    assert repr(best).startswith(f"TopK: {shape[0]} targets, {shape[1]} training samples each: ")


# --- damping_ -------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("options", [{}, {"curvature": None}, {"ridge": 0.5}, {"damping": 0.75}])
def test_damping_is_what_every_kernel_was_damped_by(blocks, options, monkeypatch):
    used = []

    def factor_kernel(kernel, damping, ridge):
        used.append(damping)
        return formula_factor_kernel(kernel, damping, ridge)

    formula_factor_kernel = formula.factor_kernel
    monkeypatch.setattr(formula, "factor_kernel", factor_kernel)
    made = fitted(**{"damping": "auto", "curvature": "mean", "blocks": blocks, **options})
    found = made.damping_
    assert found.dtype == torch.float64
    assert found.shape == ((2,) if blocks == 1 else (2, blocks))
    used.clear()
    made.attribute([setting()[3]])
    assert found.flatten().tolist() == used
    assert torch.equal(made.damping_, found)
    if "damping" in options:
        assert (found == 0.75).all()


@pytest.mark.parametrize("options", [{}, {"curvature": None}, {"ridge": 0.5}])
def test_the_chosen_damping_given_by_hand_makes_the_same_scores(options):
    _, states, train, test = setting()

    def scores(damping):
        made = make(checkpoints=states[:1], damping=damping, **options)
        made.fit([train])
        return made.attribute([test]), made.damping_

    expected, chosen = scores("auto")
    assert chosen.shape == (1,)
    assert torch.equal(scores(float(chosen))[0], expected)
    assert not torch.equal(scores(2 * float(chosen))[0], expected)


def test_damping_follows_samples_that_are_added():
    train = setting()[2]
    made = make()
    made.fit([tuple(tensor[:10] for tensor in train)])
    before = made.damping_
    made.fit([tuple(tensor[10:] for tensor in train)], addition=1)
    whole = make()
    whole.fit([train])
    assert not torch.equal(made.damping_, before)
    torch.testing.assert_close(made.damping_, whole.damping_, rtol=1e-5, atol=0)


# --- before fit -----------------------------------------------------------------------------------

CALLS = {
    "attribute": lambda made: made.attribute([setting()[3]]),
    "top_k": lambda made: made.attribute([setting()[3]], top_k=1),
    "self_influence": lambda made: made.self_influence(),
    "damping_": lambda made: made.damping_,
    "fingerprint": lambda made: made.fingerprint,
    "sample_ids": lambda made: made.sample_ids(),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("where", ["memory", "no folder", "an empty folder"])
def test_calls_before_fit_say_what_to_call(call, where, tmp_path):
    store = None if where == "memory" else tmp_path / ("none" if where == "no folder" else "")
    with pytest.raises(StoreError, match=r"^Attributor is not fitted: call fit\(\) first") as error:
        CALLS[call](make(store=store))
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_fit_of_an_addition_needs_the_training_set_first():
    with pytest.raises(StoreError, match=r"^Attributor is not fitted: call fit"):
        make().fit([setting()[2]], addition=1)
