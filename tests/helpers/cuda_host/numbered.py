"""Operands that are numbered, so that every matrix instruction shows what it multiplies by what."""

from __future__ import annotations

import numpy as np
import torch

from cuda_host.witness import Instruction, watch
from trak_ext import reference

PARAMS = 512  # whole stages: every place of the summed index is used
BASE = 256  # integers below it are bf16 numbers


def numbered(rows: int, columns: int) -> torch.Tensor:
    """Return a number for each element, from 1 on."""
    assert rows * columns < BASE * BASE
    return torch.arange(1, rows * columns + 1).view(rows, columns)


def digits(numbers: torch.Tensor) -> list[torch.Tensor]:
    """Return two numbers that one bf16 part holds, for each."""
    return [numbers % BASE, numbers // BASE]


def numbers_of(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return (low + BASE * high).astype(np.int64)


def instructions(library, rows, proj_dim, precision, dtype, **law) -> list[tuple[np.ndarray, ...]]:
    """Return (a, numbers of b) of every instruction that has gradients in it."""
    runs: list[list[Instruction]] = []
    for grads in digits(numbered(rows, PARAMS)):
        with watch(library) as seen:
            library.project(grads.to(dtype), proj_dim, precision=precision, **law)
        runs.append(seen)
    result = []
    for low, high in zip(*runs, strict=True):
        assert np.array_equal(low.a, high.a)
        numbers = numbers_of(low.b, high.b)
        if numbers.any():  # the parts after the first are zero
            result.append((low.a, numbers))
    return result


def check_projection(library, rows, precision, dtype=torch.float32, proj_dim=20, **law) -> None:
    """Every gradient meets every column once, and in its place the column's entry for it."""
    found = instructions(library, rows, proj_dim, precision, dtype, **law)
    numbers = np.stack([b for _, b in found]) - 1  # [instructions, rows of the tile, 16]
    row, param = np.divmod(numbers, PARAMS)
    live = numbers >= 0
    places = live.any(axis=1)
    assert places.all(), "a place of the summed index without gradients"
    params = np.where(live, param, 0).max(axis=1)  # [instructions, 16]
    assert (param == params[:, None])[live].all(), "a place has gradients of several parameters"
    shift = row - np.arange(row.shape[1])[:, None]
    first = np.where(live, shift, 0).max(axis=(1, 2))
    assert (shift == first[:, None, None])[live].all(), "rows are not in order"
    # Which columns an instruction's rows of `a` are, by their entries.
    a = np.stack([a for a, _ in found])
    entries = reference.projection_matrix(PARAMS, 512, **law).astype(np.float64)[params]
    distance = (a**2).sum(axis=2)[:, :, None] + (entries**2).sum(axis=1)[:, None] - 2 * a @ entries
    is_column = distance < 1e-9  # [instructions, rows of a, columns]
    assert is_column.any(axis=2).all(), "entries that are not those of the gradients beside them"
    met = np.zeros((rows, PARAMS, proj_dim), dtype=np.int64)
    for i in range(len(found)):
        columns = is_column[i, :, :proj_dim].sum(axis=0)
        np.add.at(met, (row[i][live[i]], param[i][live[i]]), columns)
    if law["kind"] == "normal":
        assert (met == 1).all()
    else:  # of 16 signs a stranger has the same, now and then
        assert met.min() == 1
        assert met.mean() < 1.1
