"""The oracle against published known answers and against itself spelled out bit by bit."""

from __future__ import annotations

import math

import numpy as np
import pytest

from trak_ext import reference

# Philox4x32-10 known answers of Random123 (counter, key, output).
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, expected):
    got = reference.philox4x32(np.array(counter, dtype=np.uint64), key)
    assert tuple(int(word) for word in got) == expected


def test_rademacher_matrix_is_the_law_read_bit_by_bit():
    seed, model_id, offset = 0x0123456789ABCDEF, 7, (5 << 39) + 126
    matrix = reference.projection_matrix(5, 3, seed=seed, model_id=model_id, param_offset=offset)
    for i in range(5):
        for j in range(3):
            param = offset + i
            block = param // 128
            counter = np.array([block % 2**32, j, block // 2**32, model_id], dtype=np.uint64)
            words = reference.philox4x32(counter, (seed % 2**32, seed // 2**32))
            number = sum(int(word) << (32 * w) for w, word in enumerate(words))
            assert matrix[i, j] == (1 if number >> (param % 128) & 1 else -1)


@pytest.mark.parametrize("kind", ["rademacher", "normal"])
def test_entries_are_independent_of_each_other(kind):
    # ||R^T x||^2 / k has mean ||x||^2 and variance 2 ||x||^4 / k for independent entries (up to the
    # kurtosis term, which is below 1 / P of it); columns that correlate would make it larger.
    num_params, proj_dim, repeats = 1000, 256, 40
    x = np.random.default_rng(0).standard_normal(num_params)
    x /= np.linalg.norm(x)
    norms = [
        np.square(
            x @ reference.projection_matrix(num_params, proj_dim, kind=kind, seed=seed)
        ).mean()
        for seed in range(repeats)
    ]
    assert np.mean(norms) == pytest.approx(1, abs=5 * math.sqrt(2 / proj_dim / repeats))
    assert np.var(norms) == pytest.approx(2 / proj_dim, rel=5 * math.sqrt(2 / repeats))


def test_score_is_the_formula_for_one_number():
    # One checkpoint, k = 1: score = Q phi_z phi_i / (sum phi^2 + damping * sum phi^2).
    phi, target, weight = np.array([[[1.0], [2.0]]]), np.array([[[3.0]]]), np.array([[0.5, 4.0]])
    got = reference.score(phi, target, weight, damping=1.0)
    assert got[:, 0].tolist() == pytest.approx([0.5 * 3 / 10, 4 * 6 / 10])
