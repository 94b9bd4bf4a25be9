"""Factors of kernel matrices are made once, and again where what they are made of is another."""

from __future__ import annotations

import pytest
import torch

from small_setting import setting
from trak_ext import Attributor
from trak_ext.estimator import formula
from trak_ext.estimator.formula import FactorCache, KernelAccumulator


@pytest.fixture
def made(monkeypatch):
    """The damping of every factor that is made."""
    calls = []
    factor = formula.factor_kernel

    def count(kernel, damping, ridge):
        calls.append(damping)
        return factor(kernel, damping, ridge)

    monkeypatch.setattr(formula, "factor_kernel", count)
    return calls


def attributor(**options):
    model, states, train, test = setting()
    own = Attributor(
        model,
        "image_classification",
        checkpoints=states,
        **{"proj_dim": 8, "progress": False, **options},
    )
    return own, train, test


@pytest.mark.parametrize("options", [{}, {"damping": 0.5}, {"leverage": True}, {"blocks": 2}])
@pytest.mark.parametrize("on_disk", [False, True])
def test_a_second_call_makes_no_factor(made, options, on_disk, tmp_path):
    store = tmp_path / "store" if on_disk else None
    own, train, test = attributor(store=store, **options)
    own.fit([train])
    first = own.attribute([test])
    count = len(made)
    assert count == 2 * options.get("blocks", 1)
    assert torch.equal(own.attribute([test]), first)
    own.attribute([test], top_k=2)
    own.self_influence()
    assert len(made) == count
    if on_disk:  # another process, which did not fit
        again, _, _ = attributor(store=store, **options)
        assert torch.equal(again.attribute([test]), first)
        assert torch.equal(again.attribute([test]), first)
        assert len(made) == 2 * count


def test_more_data_make_new_factors(made):
    own, train, test = attributor()
    own.fit([tuple(part[:10] for part in train)])
    before = own.attribute([test])
    own.fit([tuple(part[10:] for part in train)], addition=1)
    after = own.attribute([test])
    assert len(made) == 4
    whole, _, _ = attributor()
    whole.fit([train])
    torch.testing.assert_close(after, whole.attribute([test]), rtol=1e-4, atol=1e-6)
    assert before.shape != after.shape


def test_what_another_process_added_is_seen(made, tmp_path):
    own, train, test = attributor(store=tmp_path / "store")
    own.fit([tuple(part[:10] for part in train)])
    own.attribute([test])
    other, _, _ = attributor(store=tmp_path / "store")
    other.fit([tuple(part[10:] for part in train)], addition=1)
    assert torch.equal(own.attribute([test]), other.attribute([test]))


def test_what_does_not_fit_is_made_anew():
    cache, made = FactorCache(limit=8 * 16 * 2), []

    def factors(m, key="a"):
        return cache.get(m, key, lambda: made.append((m, key)) or [torch.eye(4).double()])

    for _ in range(3):
        for m in range(3):
            factors(m)
    assert made == [(0, "a"), (1, "a"), (2, "a"), (2, "a"), (2, "a")]
    factors(0, "b")
    factors(0, "b")
    assert made[5:] == [(0, "b")]
    cache.clear()
    factors(0, "b")
    assert made[6:] == [(0, "b")]


@pytest.mark.parametrize("proj_dim", [1, 511, 512, 513, 1300])
@pytest.mark.parametrize("weighted", [False, True])
def test_half_of_a_kernel_matrix_says_all_of_it(proj_dim, weighted):
    phi = torch.randn(37, proj_dim)
    weights = torch.rand(37) if weighted else None
    accumulator = KernelAccumulator(proj_dim)
    accumulator.add(phi[:20], None if weights is None else weights[:20])
    accumulator.add(phi[20:], None if weights is None else weights[20:])
    rows = phi.double()
    scale = torch.ones(37).double() if weights is None else weights.double()
    torch.testing.assert_close(accumulator.matrix, rows.T @ (rows * scale[:, None]))
    assert torch.equal(accumulator.matrix, accumulator.matrix.T)
