"""kernel_matrix, score and top_k against the oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import trak_ext
from children import run_python
from trak_ext import reference
from trak_ext.kernels.score_pass import RunningTopK


def problem(m=2, n=60, t=7, k=11, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    train = torch.randn(m, n, k, generator=generator, dtype=torch.float64)
    targets = torch.randn(m, t, k, generator=generator, dtype=torch.float64)
    weights = torch.rand(m, n, generator=generator, dtype=torch.float64)
    curvature = torch.rand(m, n, generator=generator, dtype=torch.float64)
    return tuple(x.to(dtype) for x in (train, targets, weights, curvature))


def oracle(train, targets, weights, **options):
    curvature = options.pop("curvature", None)
    return reference.score(
        train.numpy(),
        targets.numpy(),
        weights.numpy(),
        curvature=None if curvature is None else curvature.numpy(),
        **options,
    )


@pytest.mark.parametrize("curved", [False, True])
@pytest.mark.parametrize("leverage", [False, True])
@pytest.mark.parametrize(("damping", "ridge"), [(1.0, 0.0), (0.0, 0.0), (0.0, 3.0), (0.1, 0.5)])
def test_every_option_in_fp64(curved, leverage, damping, ridge):
    train, targets, weights, curvature = problem()
    options = {"damping": damping, "ridge": ridge, "leverage": leverage}
    if curved:
        options["curvature"] = curvature
    got = trak_ext.score(train, targets, weights, **options)
    expected = oracle(train, targets, weights, **options)
    assert got.dtype == torch.float64
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-9, atol=1e-12 * abs(expected).max())


@given(
    m=st.integers(1, 4),
    n=st.integers(1, 130),
    t=st.integers(1, 70),
    k=st.integers(1, 40),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
)
@settings(max_examples=40, deadline=None)
def test_any_size_and_dtype(m, n, t, k, dtype):
    train, targets, weights, _ = problem(m, n, t, k, dtype)
    got = trak_ext.score(train, targets, weights, ridge=0.1)
    expected = oracle(train.double(), targets.double(), weights.double(), ridge=0.1)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # A rounding error is relative to the terms of an inner product, not to their sum.
    solved = [
        np.linalg.solve(phi.T @ phi + (np.trace(phi.T @ phi) / k + 0.1) * np.eye(k), target.T)
        for phi, target in zip(train.double().numpy(), targets.double().numpy(), strict=True)
    ]
    terms = sum(abs(phi) @ abs(w) for phi, w in zip(train.double().numpy(), solved, strict=True))
    bound = terms * weights.double().numpy().mean(0)[:, None]
    tolerance = 1e-11 if dtype == torch.float64 else 1e-6
    assert (abs(got.numpy() - expected) <= tolerance * bound).all()


@pytest.mark.parametrize(("n", "t", "k"), [(47, 511, 255), (48, 512, 256), (49, 513, 257)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_borders_of_blocks(n, t, k, dtype):
    train, targets, weights, _ = problem(1, n, t, k, dtype)
    expected = oracle(train.double(), targets.double(), weights.double())
    got = trak_ext.score(train, targets, weights)
    assert abs(got.numpy() - expected).max() <= 2e-6 * abs(expected).max()


def test_one_checkpoint_without_its_dimension():
    train, targets, weights, curvature = problem(m=1)
    stacked = trak_ext.score(train, targets, weights, curvature=curvature)
    plain = trak_ext.score(train[0], targets[0], weights[0], curvature=curvature[0])
    assert torch.equal(stacked, plain)
    assert torch.equal(trak_ext.kernel_matrix(train[0]), trak_ext.kernel_matrix(train)[0])


def test_kernel_matrix():
    train, targets, weights, curvature = problem(m=3, n=5000, k=20)
    expected = np.einsum("mn,mnk,mnl->mkl", *(x.numpy() for x in (curvature, train, train)))
    got = trak_ext.kernel_matrix(train, curvature)
    assert got.shape == (3, 20, 20)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-10, atol=1e-9)
    half = trak_ext.kernel_matrix(train.float())
    assert half.dtype == torch.float64
    np.testing.assert_allclose(
        half, trak_ext.kernel_matrix(train.float().double()), rtol=1e-12, atol=1e-9
    )
    known = trak_ext.score(train, targets, weights, curvature=curvature, kernel=got)
    assert torch.equal(known, trak_ext.score(train, targets, weights, curvature=curvature))


def test_features_of_any_stride():
    train, targets, weights, _ = problem(dtype=torch.float32)
    expected = trak_ext.score(train, targets, weights)
    for strided in (
        train.transpose(0, 1).contiguous().transpose(0, 1),
        train.transpose(1, 2).contiguous().transpose(1, 2),
        torch.cat([train, train], 2)[:, :, : train.shape[2]],
    ):
        assert torch.equal(trak_ext.score(strided, targets, weights), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_features_are_read_as_stored(dtype):
    train, targets, weights, _ = problem(m=2, n=100, t=40, k=300, dtype=dtype)
    kernel = trak_ext.kernel_matrix(train)
    got = trak_ext.score(train, targets.float(), weights.float(), kernel=kernel)
    widened = trak_ext.score(train.float(), targets.float(), weights.float(), kernel=kernel)
    assert torch.equal(got, widened)


def test_threads_do_not_change_bits():
    train, targets, weights, _ = problem(m=2, n=500, t=600, k=30, dtype=torch.float32)
    results = []
    for threads in (1, 2, 5):
        trak_ext.set_num_threads(threads)
        best = trak_ext.top_k(train, targets, 9, weights)
        results.append((trak_ext.score(train, targets, weights), *best))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("leverage", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("k", [0, 1, 10, 300])
def test_top_k_is_the_sorted_scores(largest, leverage, dtype, k):
    train, targets, weights, _ = problem(n=300, t=70, dtype=dtype)
    scores = trak_ext.score(train, targets, weights, leverage=leverage)
    best = trak_ext.top_k(train, targets, k, weights, largest=largest, leverage=leverage)
    values, indices = scores.T.sort(dim=1, descending=largest, stable=True)
    assert torch.equal(best.values, values[:, :k])
    assert torch.equal(best.indices, indices[:, :k])


@pytest.mark.parametrize("largest", [True, False])
def test_top_k_ties_go_to_the_lower_index(largest):
    train = torch.randint(0, 2, (1, 400, 3)).float()
    targets = torch.randint(-1, 2, (1, 20, 3)).float()
    scores = trak_ext.score(train, targets)
    trak_ext.set_num_threads(4)
    best = trak_ext.top_k(train, targets, 50, largest=largest)
    order = scores.T.sort(dim=1, descending=largest, stable=True).indices[:, :50]
    assert torch.equal(best.indices, order)


def test_merged_lists_are_the_list_of_all():
    values = torch.randint(0, 5, (3, 40)).float()

    def best(part, offset, k):
        found = part.sort(dim=1, descending=True, stable=True)
        return trak_ext.TopK(found.values[:, :k], found.indices[:, :k] + offset)

    running = RunningTopK(len(values), 8, True, values.dtype, values.device)
    running.add(best(values[:, :15], 0, 8))
    running.add(best(values[:, 15:], 0, 8), 15)
    merged = running.best
    expected = best(values, 0, 8)
    assert torch.equal(merged.values, expected.values)
    assert torch.equal(merged.indices, expected.indices)


def test_top_k_never_holds_all_scores():
    # 40,000 x 5,000 fp32 scores would be 800 MB; peak resident memory must not show them.
    code = """
import resource, torch, trak_ext
train, targets = torch.randn(1, 40000, 8), torch.randn(1, 5000, 8)
trak_ext.top_k(train[:, :100], targets[:, :10], 5)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
trak_ext.top_k(train, targets, 5)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    run = run_python(code)
    assert int(run.stdout) < 100  # MiB


def test_not_positive_definite_names_damping():
    train, targets, weights, _ = problem(n=5, k=11)
    with pytest.raises(
        ValueError, match=r"damping: .*positive definite, got damping=0 and ridge=0"
    ):
        trak_ext.score(train, targets, weights, damping=0.0)
    assert trak_ext.score(train, targets, weights, damping=1.0).shape == (5, 7)


@pytest.mark.parametrize("seed", range(30))
def test_leverage_of_one_is_refused(seed):
    # As many samples as features, undamped: every leverage is 1, and 1 / (1 - h) is noise.
    train, targets, _, _ = problem(m=1, n=11, k=11, seed=seed)
    with pytest.raises(ValueError, match=r"^leverage: expected every leverage below 1 - 1e-6"):
        trak_ext.score(train, targets, damping=0.0, leverage=True)


def test_negated_views_are_what_they_show():
    train, targets, weights, _ = problem()
    negated = torch._neg_view(train)
    expected = trak_ext.score(-train, targets, weights)
    assert torch.equal(trak_ext.score(negated, targets, weights), expected)


BAD = [
    ({"train_features": torch.randn(4)}, "train_features: expected a dense"),
    ({"train_features": [1]}, "train_features: expected a dense"),
    (
        {"train_features": torch.ones(2, 6, 4, dtype=torch.int64)},
        "train_features: expected a dense",
    ),
    ({"target_features": torch.randn(3, 5, 4)}, "target_features: expected"),
    ({"target_features": torch.randn(2, 5, 3)}, "target_features: expected"),
    ({"target_features": torch.randn(5, 4)}, "target_features: expected"),
    ({"target_features": torch.full((2, 5, 4), float("nan"))}, "target_features: expected finite"),
    ({"train_features": torch.full((2, 6, 4), float("nan"))}, "train_features: expected finite"),
    ({"weights": torch.rand(2, 7)}, "weights: expected"),
    ({"weights": torch.full((2, 6), float("inf"))}, "weights: expected finite"),
    ({"curvature": torch.rand(6)}, "curvature: expected"),
    ({"kernel": torch.rand(2, 4, 5)}, "kernel: expected"),
    ({"kernel": torch.full((2, 4, 4), float("nan"))}, "kernel: expected finite"),
    ({"damping": -1.0}, "damping: expected a finite number"),
    ({"damping": float("nan")}, "damping: expected a finite number"),
    ({"damping": "auto"}, "damping: expected a number"),
    ({"damping": "1.0"}, "damping: expected a number"),
    ({"ridge": -1.0}, "ridge: expected a finite number"),
    (
        {
            "train_features": torch.randn(0, 6, 4),
            "target_features": torch.randn(0, 5, 4),
            "weights": None,
        },
        "train_features: expected at least one checkpoint",
    ),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_arguments_get_one_sentence(change, message):
    arguments = {
        "train_features": torch.randn(2, 6, 4),
        "target_features": torch.randn(2, 5, 4),
        "weights": torch.rand(2, 6),
        **change,
    }
    with pytest.raises((ValueError, TypeError), match=message) as error:
        trak_ext.score(**arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("k", [-1, 7, 2.0])
def test_bad_k(k):
    with pytest.raises((ValueError, TypeError), match="k: expected an integer"):
        trak_ext.top_k(torch.randn(2, 6, 4), torch.randn(2, 5, 4), k)
