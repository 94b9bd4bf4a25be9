"""The law of the matrix: golden digests, and the statistics that its entries must have."""

from __future__ import annotations

import hashlib
import json
import math

import numpy as np
import pytest
import torch

import trak_ext
from folders import CSRC, VECTORS
from trak_ext import _C, reference

DIGESTS = json.loads((VECTORS / f"law_v{_C.law_version()}.json").read_text())
SJLT_FEATURES = json.loads((VECTORS / f"sjlt_features_v{_C.law_version()}.json").read_text())
LAW_SOURCES = CSRC / "law"


@pytest.mark.parametrize("vector", DIGESTS)
@pytest.mark.parametrize("make", [trak_ext.projection_matrix, reference.projection_matrix])
def test_golden_digests(vector, make):
    law = {key: value for key, value in vector.items() if key not in ("first_row", "sha256")}
    matrix = np.asarray(make(**law))
    assert matrix[0, :6].tolist() == vector["first_row"]
    digest = hashlib.sha256(matrix.astype("<f4").tobytes()).hexdigest()
    assert digest == vector["sha256"], "the law has changed: that takes a new version number"


def sjlt_feature_gradients(num_params: int) -> np.ndarray:
    """Return gradients [2, P] from the law itself, of wide range, whose sum shows its order."""
    normal = reference.projection_matrix(num_params, 6, kind="normal", seed=11).T
    a, b, c = normal.reshape(3, 2, num_params)
    return a * b**3 * (c**3 + np.float32(0.1))


@pytest.mark.parametrize("vector", SJLT_FEATURES)
def test_golden_digests_of_sparse_features(vector):
    law = {k: v for k, v in vector.items() if k not in ("num_params", "first_row", "sha256")}
    grads = sjlt_feature_gradients(vector["num_params"])
    kernel = trak_ext.project(torch.from_numpy(grads), kind="sjlt", **law).numpy()
    for features in (reference.project_sjlt(grads, **law), kernel):
        assert features[0, :6].tolist() == vector["first_row"]
        digest = hashlib.sha256(features.astype("<f4").tobytes()).hexdigest()
        assert digest == vector["sha256"], "the law has changed: that takes a new version number"
    # Another order of the sum would have shown.
    matrix = reference.projection_matrix(grads.shape[1], kind="sjlt", **law)
    assert not np.array_equal(grads @ matrix, kernel)


def test_the_module_hands_out_the_table_that_is_written_in_the_header():
    text = (LAW_SOURCES / "normal_table.h").read_text()
    rows = [line.strip(" \\{},") for line in text.splitlines() if line.startswith("    {")]
    table = [[float.fromhex(c.strip().rstrip("f")) for c in row.split(",")] for row in rows]
    assert np.array_equal(np.array(table, np.float32), reference.NORMAL_TABLE)


def test_normal_entries_of_extreme_words():
    words = np.array([0, 0xFFFFFFFF, 0x7FFFFFFF, 0x80000000, 0x40000000, 0x70000000], np.uint32)
    tiny = 1.25 * 2.0**-31
    expected = [tiny, -tiny, 6.21875, -6.21875, 0.67578125, 1.53125]
    assert reference.normal_entries(words).tolist() == expected


def test_normal_entries_are_odd_in_the_word():
    words = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype=np.uint32) | np.uint32(1)
    entries = reference.normal_entries(words)
    assert np.array_equal(reference.normal_entries(0 - words), -entries)


def test_normal_entries_are_bf16():
    matrix = trak_ext.projection_matrix(5000, 100, kind="normal")
    assert torch.equal(matrix, matrix.bfloat16().float())


def normal_cdf(x: np.ndarray) -> np.ndarray:
    return np.array([0.5 * math.erfc(-value / math.sqrt(2)) for value in x])


def rounded_normal_cdf(support: np.ndarray) -> np.ndarray:
    """P(X <= v) of a standard normal rounded to bf16, at bf16 values v in ascending order."""
    following = torch.from_numpy(support).bfloat16().view(torch.int16).to(
        torch.int32
    ) + torch.where(torch.from_numpy(support) >= 0, 1, -1)
    upper = following.to(torch.int16).view(torch.bfloat16).double().numpy()
    return normal_cdf((support.astype(np.float64) + upper) / 2)


@pytest.mark.parametrize("seed", [0, 2**63 + 7])
def test_normal_passes_kolmogorov_smirnov_at_a_million_draws(seed):
    draws = trak_ext.projection_matrix(1000, 1000, kind="normal", seed=seed).numpy().ravel()
    support, counts = np.unique(draws, return_counts=True)
    empirical = np.cumsum(counts) / draws.size
    distance = abs(empirical - rounded_normal_cdf(support)).max()
    assert distance < 1.63 / math.sqrt(draws.size)  # the 1 % point of the Kolmogorov distribution


@pytest.mark.parametrize("kind", ["rademacher", "normal"])
def test_moments_at_a_hundred_million_draws(kind):
    blocks, rows, columns = 20, 1250, 4000
    sums = np.zeros(4)
    largest = 0.0
    for i in range(blocks):
        x = trak_ext.projection_matrix(
            rows, columns, kind=kind, seed=2024, param_offset=i * rows
        ).double()
        square = x * x
        sums += [x.sum(), square.sum(), (square * x).sum(), (square * square).sum()]
        largest = max(largest, float(x.abs().max()))
    count = blocks * rows * columns
    mean, variance, skew, kurtosis = sums / count
    error = 1 / math.sqrt(count)
    assert count == 10**8
    assert abs(mean) < 4 * error
    if kind == "rademacher":
        assert (variance, kurtosis) == (1, 1)
    else:
        assert abs(variance - 1) < 4 * math.sqrt(2) * error
        assert abs(skew) < 4 * math.sqrt(15) * error
        assert abs(kurtosis - 3 * variance**2) < 4 * math.sqrt(24) * error
        assert largest >= 5


@pytest.mark.parametrize("kind", ["rademacher", "normal"])
def test_columns_rows_seeds_and_models_do_not_correlate(kind):
    # Each sum of products is a mean of 2**17 independent terms of variance 1.
    def matrix(**law) -> torch.Tensor:
        return trak_ext.projection_matrix(2**17, 8, kind=kind, **law).double()

    plain = matrix()
    bound = 5 / math.sqrt(2**17)
    gram = plain.T @ plain / 2**17
    assert (gram - gram.diag().diag()).abs().max() < bound
    shifted = (plain[1:] * plain[:-1]).mean(0)
    assert shifted.abs().max() < bound
    for other in (
        matrix(seed=1),
        matrix(seed=2**32),
        matrix(model_id=1),
        matrix(param_offset=2**17),
    ):
        assert (plain.T @ other / 2**17).abs().max() < bound
