"""The slow and obvious oracle: the matrix's definition, projection and scores in plain NumPy.

Takes nothing of the compiled module but the table of constants of normal entries. The definition
in words is csrc/law.md.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt

from . import _C

LAW_VERSION = 1

Array = npt.NDArray[Any]

# [64, 4]: the terms c0..c3 of each row, as csrc/law/normal_table.h has them.
NORMAL_TABLE = np.array(_C.normal_table(), np.float32)

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def philox4x32(counter: Array, key: tuple[int, int]) -> Array:
    """Return Philox4x32-10 of counters [..., 4] under one key: uint64 [..., 4], each below 2**32.

    Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 4.3.
    """
    x0, x1, x2, x3 = (counter[..., i].astype(np.uint64) for i in range(4))
    for round_index in range(10):
        key0 = np.uint64((key[0] + round_index * _WEYL[0]) & _LOW)
        key1 = np.uint64((key[1] + round_index * _WEYL[1]) & _LOW)
        product0 = x0 * np.uint64(_MULTIPLIERS[0])
        product1 = x2 * np.uint64(_MULTIPLIERS[1])
        low = np.uint64(_LOW)
        shift = np.uint64(32)
        x0, x1, x2, x3 = (
            (product1 >> shift) ^ x1 ^ key0,
            product1 & low,
            (product0 >> shift) ^ x3 ^ key1,
            product0 & low,
        )
    return np.stack([x0, x1, x2, x3], axis=-1)


def block_words(blocks: Array, columns: Array, seed: int, model_id: int) -> Array:
    """Return the four words of each (block, column): uint64 [len(blocks), len(columns), 4]."""
    blocks = np.asarray(blocks, dtype=np.uint64)[:, None]
    columns = np.asarray(columns, dtype=np.uint64)[None, :]
    counter = np.zeros((blocks.shape[0], columns.shape[1], 4), dtype=np.uint64)
    counter[..., 0] = blocks & np.uint64(_LOW)
    counter[..., 1] = columns
    counter[..., 2] = blocks >> np.uint64(32)
    counter[..., 3] = model_id
    return philox4x32(counter, (seed & _LOW, seed >> 32))


def rademacher_matrix(params: Array, columns: Array, seed: int, model_id: int) -> Array:
    """Return entries +1 and -1 for parameter numbers and column numbers: fp32 [P, k]."""
    params = np.asarray(params, dtype=np.uint64)
    blocks, inverse = np.unique(params >> np.uint64(7), return_inverse=True)
    words = block_words(blocks, columns, seed, model_id)
    bit = (params & np.uint64(127)).astype(np.int64)
    word = words[inverse, :, :][np.arange(len(params)), :, bit >> 5]
    bits = (word >> (bit & 31).astype(np.uint64)[:, None]) & np.uint64(1)
    return np.where(bits == 1, np.float32(1), np.float32(-1))


def normal_entries(words: Array) -> Array:
    """Return one standard normal, rounded to bf16, for each 32-bit word: fp32 of their shape.

    x = v P(f) with w = word | 1 as a signed number, v = float(w), f = float(2**31 - |w|) and P the
    cubic of f's half octave (csrc/law.md).
    """
    w = (np.asarray(words).astype(np.uint32) | np.uint32(1)).view(np.int32)
    tail = (np.int64(2**31) - np.abs(w.astype(np.int64))).astype(np.int32)
    f = tail.astype(np.float32)
    c = NORMAL_TABLE[(f.view(np.uint32) >> np.uint32(22)).astype(np.int64) - 254]
    p = _fma(_fma(_fma(c[..., 3], f, c[..., 2]), f, c[..., 1]), f, c[..., 0])
    return _round_to_bf16(w.astype(np.float32) * p)


def _fma(a: Array, b: Array, c: Array) -> Array:
    """Return a * b + c in fp32, rounded once, which NumPy does not offer.

    The product is exact in fp64. The sum is rounded to odd there, its error being known exactly
    (Knuth's two-sum), and a number rounded to odd at 53 bits rounds to 24 bits as the exact sum
    would (Boldo and Melquiond 2008).
    """
    product = a.astype(np.float64) * b.astype(np.float64)
    addend = c.astype(np.float64)
    total = product + addend
    back = total - product
    error = (product - (total - back)) + (addend - back)
    bits = total.view(np.int64).copy()
    to_odd = (error != 0) & (bits & 1 == 0)
    bits[to_odd] += np.where((error > 0) == (total > 0), 1, -1)[to_odd]
    result: Array = bits.view(np.float64).astype(np.float32)
    return result


def _round_to_bf16(values: Array) -> Array:
    """Return the nearest bf16 values, ties to even, as fp32."""
    bits = values.view(np.uint32)
    bits = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (bits & np.uint32(0xFFFF0000)).view(np.float32)


def normal_matrix(params: Array, columns: Array, seed: int, model_id: int) -> Array:
    """Return normal entries for parameter numbers and column numbers: fp32 [P, k]."""
    params = np.asarray(params, dtype=np.uint64)
    blocks, inverse = np.unique(params >> np.uint64(2), return_inverse=True)
    words = block_words(blocks, columns, seed, model_id)
    own = (params & np.uint64(3)).astype(np.int64)
    return normal_entries(words[inverse, :, :][np.arange(len(params)), :, own])


def _sjlt_words(blocks: Array, marks: int, repetition: int, seed: int, model_id: int) -> Array:
    """Return the four words of blocks of one repetition: uint64 [len(blocks), 4]."""
    marked = np.asarray(blocks, dtype=np.uint64) | np.uint64(marks << 32)
    return block_words(marked, np.array([repetition]), seed, model_id)[:, 0]


def sjlt_entries(
    params: Array, width: int, repetition: int, seed: int, model_id: int
) -> tuple[Array, Array]:
    """Return each parameter's column, 0 to width - 1, and sign, in one repetition: [P] each."""
    params = np.asarray(params, dtype=np.uint64)
    sign_words = _sjlt_words(params >> np.uint64(7), 0x80000000, repetition, seed, model_id)
    bit = (params & np.uint64(127)).astype(np.int64)
    word = sign_words[np.arange(len(params)), bit >> 5]
    bits = (word >> (bit & 31).astype(np.uint64)) & np.uint64(1)
    chunk, place = params // np.uint64(width), params % np.uint64(width)
    words = _sjlt_words(chunk >> np.uint64(2), 0xC0000000, repetition, seed, model_id)
    own = (chunk & np.uint64(3)).astype(np.int64)
    rotation = (words[np.arange(len(params)), own] * np.uint64(width)) >> np.uint64(32)
    column = ((place + rotation) % np.uint64(width)).astype(np.int64)
    return column, np.where(bits == 1, np.float32(1), np.float32(-1))


def sjlt_scale(proj_dim: int, nnz: int) -> np.float32:
    """Return the magnitude of an entry, sqrt(proj_dim / nnz) rounded to fp32."""
    return np.float32(np.sqrt(np.float64(proj_dim // nnz)))


def sjlt_matrix(
    params: Array, proj_dim: int, nnz: int, seed: int, model_id: int
) -> npt.NDArray[np.float32]:
    """Return the sparse kind's entries for parameter numbers: fp32 [P, proj_dim]."""
    matrix = np.zeros((len(params), proj_dim), dtype=np.float32)
    width = proj_dim // nnz
    for repetition in range(nnz if proj_dim else 0):
        column, sign = sjlt_entries(params, width, repetition, seed, model_id)
        entry = sign * sjlt_scale(proj_dim, nnz)
        matrix[np.arange(len(params)), repetition * width + column] = entry
    return matrix


def _tree_sum(terms: dict[int, Array]) -> Array:
    """Return the sum of arrays in the order of the law: a tree of radix 64 over their numbers."""
    while True:
        sums: dict[int, Array] = {}
        for number in sorted(terms):
            parent = number >> 6
            before = sums.get(parent, np.zeros_like(terms[number]))
            sums[parent] = before + terms[number]
        if len(sums) == 1:
            return next(iter(sums.values()))
        terms = sums


def project_sjlt(
    grads: Array,
    proj_dim: int,
    *,
    nnz: int = 1,
    seed: int = 0,
    model_id: int = 0,
    param_offset: int = 0,
    out: Array | None = None,
) -> Array:
    """Return the sparse kind's features to the bit: fp32 [B, proj_dim], added to `out` if given."""
    with np.errstate(all="ignore"):
        values = grads.astype(np.float32)
        rows, num_params = values.shape
        result = np.zeros((rows, proj_dim), np.float32) if out is None else out.copy()
        width = proj_dim // nnz
        if num_params == 0 or proj_dim == 0:
            return result
        params = np.arange(num_params, dtype=np.uint64) + np.uint64(param_offset)
        chunks = [int(chunk) for chunk in params // np.uint64(width)]
        border = [0, *(i for i in range(1, num_params) if chunks[i] != chunks[i - 1]), num_params]
        for repetition in range(nnz):
            column, sign = sjlt_entries(params, width, repetition, seed, model_id)
            terms: dict[int, Array] = {}
            for begin, end in itertools.pairwise(border):
                term = np.zeros((rows, width), np.float32)
                term[:, column[begin:end]] = values[:, begin:end] * sign[begin:end]
                terms[chunks[begin]] = term
            mine = slice(repetition * width, (repetition + 1) * width)
            result[:, mine] = result[:, mine] + _tree_sum(terms) * sjlt_scale(proj_dim, nnz)
        result[np.isnan(result)] = np.uint32(0x7FC00000).view(np.float32)
        return result


def projection_matrix(
    num_params: int,
    proj_dim: int,
    *,
    kind: str = "rademacher",
    seed: int = 0,
    model_id: int = 0,
    param_offset: int = 0,
    nnz: int = 1,
) -> Array:
    """Return rows param_offset .. param_offset + num_params - 1 of R: fp32 [num_params, k]."""
    params = np.arange(num_params, dtype=np.uint64) + np.uint64(param_offset)
    columns = np.arange(proj_dim, dtype=np.uint64)
    if kind == "sjlt":
        return sjlt_matrix(params, proj_dim, nnz, seed, model_id)
    make = {"rademacher": rademacher_matrix, "normal": normal_matrix}[kind]
    return make(params, columns, seed, model_id)


def project(grads: Array, proj_dim: int, **law: Any) -> Array:
    """Return grads [B, P] @ R in fp64: [B, proj_dim]."""
    matrix = projection_matrix(grads.shape[1], proj_dim, **law)
    result: Array = grads.astype(np.float64) @ matrix.astype(np.float64)
    return result


def score(
    train_features: Array,
    target_features: Array,
    weights: Array,
    *,
    damping: float = 1.0,
    ridge: float = 0.0,
    curvature: Array | None = None,
    leverage: bool = False,
) -> Array:
    """Return scores [n, t] of features [M, n, k] and [M, t, k] and weights [M, n], all in fp64.

    Park et al. 2023, equation 17, with the options of `trak_ext.score`.
    """
    checkpoints, num_train, proj_dim = train_features.shape
    total = np.zeros((num_train, target_features.shape[1]))
    for m in range(checkpoints):
        phi = train_features[m].astype(np.float64)
        r = np.ones(num_train) if curvature is None else curvature[m].astype(np.float64)
        kernel = (phi * r[:, None]).T @ phi
        shift = damping * np.trace(kernel) / proj_dim + ridge
        inverse = np.linalg.inv(kernel + shift * np.eye(proj_dim))
        h = r * np.einsum("nk,kl,nl->n", phi, inverse, phi)
        term = phi @ inverse @ target_features[m].astype(np.float64).T
        total += term / (1 - h)[:, None] if leverage else term
    result: Array = total / checkpoints * weights.astype(np.float64).mean(0)[:, None]
    return result
