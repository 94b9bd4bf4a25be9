"""Gradients of embedding tables: of the rows that samples look up alone, without all the zeros.

A table that is looked up is held as it is, and what flows back to a lookup's output is noted with
the rows it came from. Whatever else a model does with the table, such as using it for its output
layer too, is differentiated as ever: then the gradient is dense.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class RowGradients:
    """Gradients [B, V, *row shape] of a table for B samples, zero outside a few of its rows.

    Args:
        rows: int64 [R], ascending.
        values: [B, R, *row shape].
        num_rows: V.
    """

    def __init__(self, rows: Tensor, values: Tensor, num_rows: int) -> None:
        self.rows = rows
        self.values = values
        self.num_rows = num_rows

    @property
    def nbytes(self) -> int:
        """The bytes of what is held."""
        return self.rows.nbytes + self.values.nbytes

    def dense(self) -> Tensor:
        """Return the gradients with their zeros."""
        shape = (len(self.values), self.num_rows, *self.values.shape[2:])
        return self.values.new_zeros(shape).index_copy_(1, self.rows, self.values)

    def placed(self, offset: int) -> list[tuple[Tensor, int]]:
        """Return gradients [B, P_i] of neighbouring rows, each with its first parameter's number.

        Args:
            offset: The number of the table's first parameter.
        """
        values = self.values.flatten(2)
        width = values.shape[2]
        rows = self.rows.tolist()
        borders = [i for i in range(1, len(rows)) if rows[i] != rows[i - 1] + 1]
        return [
            (values[:, first:last].flatten(1), offset + rows[first] * width)
            for first, last in zip([0, *borders], [*borders, len(rows)], strict=True)
        ]


def looked_up_tables(model: nn.Module, parameters: Mapping[str, Tensor]) -> list[str]:
    """Return those of a model's parameters by name that belong to an nn.Embedding."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return [name for name, parameter in parameters.items() if id(parameter) in tables]


class Lookups:
    """The lookups of one sample chunk in some tables, and what flowed back to them.

    Args:
        names: The tables.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._found: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in names}

    def watching(self, tables: Mapping[str, Tensor], lane: Tensor) -> TorchFunctionMode:
        """Return a context in which `torch.nn.functional.embedding` in these tables is noted.

        Args:
            tables: As the model holds them while it computes one sample, under `vmap(grad)`.
            lane: Any tensor of the sample's that this vmap has batched.
        """
        return _Watch({id(tables[name]): found for name, found in self._found.items()}, lane)

    def take_from(
        self, grads: dict[str, Tensor], weights: Iterable[Tensor]
    ) -> dict[str, RowGradients]:
        """Take tables that were looked up, and no more, from a sample chunk's gradients.

        Args:
            grads: [B, *shape] by name, lookups left out. Tables that lookups touch most rows of, or
                that the model used in another way too, stay, and get the gradients of lookups.
            weights: What gradients may share memory with.
        """
        taken = {}
        kept = [*weights, *grads.values()]
        for name, found in self._found.items():
            if not found:
                continue
            together = _with_lookups(grads[name], found, kept)
            if isinstance(together, RowGradients):
                taken[name] = together
                del grads[name]
            else:
                grads[name] = together
        return taken


def _with_lookups(
    others: Tensor, found: list[tuple[Tensor, Tensor]], kept: list[Tensor]
) -> Tensor | RowGradients:
    """Return a table's gradients [B, V, D], given those without lookups and those of lookups."""
    samples, num_rows, width = others.shape
    ids = torch.cat([ids.reshape(samples, -1) for ids, _ in found], 1)
    flowed = torch.cat([grad.reshape(samples, -1, width) for _, grad in found], 1)
    rows, place = ids.unique(return_inverse=True)
    if len(rows) == 0:
        return others
    few = 2 * len(rows) <= num_rows
    if not few:
        rows, place = torch.arange(num_rows, device=rows.device), ids
    # Samples one below another, in one table; added up as torch does for the gradient of a lookup.
    place = place + len(rows) * torch.arange(samples, device=rows.device)[:, None]
    values = torch.ops.aten.embedding_dense_backward(
        flowed.reshape(-1, width), place.reshape(-1), samples * len(rows), -1, False
    ).view(samples, len(rows), width)
    if not any(others.stride()) and not bool(others[0, 0, 0]):  # the zeros of `_Lookup`
        return RowGradients(rows, values, num_rows) if few else values
    if not few:
        return values.add_(others)
    if not _apart(others, kept):
        others = others.clone(memory_format=torch.contiguous_format)
    return others.index_add_(1, rows, values)


def _apart(tensor: Tensor, kept: list[Tensor]) -> bool:
    """Return whether a tensor may be written to: dense, in memory that no other of `kept` has."""
    memory = tensor.untyped_storage()
    sharing = sum(other.untyped_storage().data_ptr() == memory.data_ptr() for other in kept)
    return tensor.is_contiguous() and memory.nbytes() == tensor.nbytes and sharing <= 1


class _Watch(TorchFunctionMode):
    def __init__(self, found: Mapping[int, list[tuple[Tensor, Tensor]]], lane: Tensor) -> None:
        super().__init__()
        self._found = {table: _Found(lookups) for table, lookups in found.items()}
        self._lane = lane

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.embedding:
            return self._embedding(*args, **kwargs)
        return func(*args, **kwargs)

    def _embedding(
        self,
        input: Tensor,
        weight: Tensor,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
    ) -> Tensor:
        found = self._found.get(id(weight))
        if found is None or max_norm is not None or scale_grad_by_freq or sparse:
            return F.embedding(
                input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse
            )
        if padding_idx is not None and padding_idx < 0:
            padding_idx += weight.shape[0]
        first, found.first = found.first, False
        return _Lookup.apply(weight, input, self._lane, found, padding_idx, first)


class _Found:
    """Where lookups in a table are noted; not a list, which autograd would look into."""

    def __init__(self, lookups: list[tuple[Tensor, Tensor]]) -> None:
        self.lookups = lookups
        self.first = True


class _Lookup(torch.autograd.Function):
    """Rows of a table. Its gradient for the table is zero, and goes to `found` instead."""

    @staticmethod
    def forward(
        weight: Tensor, ids: Tensor, lane: Tensor, found: _Found, padding: int | None, first: bool
    ) -> Tensor:
        return F.embedding(ids, weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        weight, ids, lane, ctx.found, ctx.padding, ctx.first = inputs
        ctx.save_for_backward(ids, lane)
        ctx.table = weight.shape

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        ids, lane = ctx.saved_tensors
        flowed = grad.detach()
        if ctx.padding is not None:
            flowed = torch.where((ids == ctx.padding).unsqueeze(-1), 0, flowed)
        _Note.apply(flowed, ids, lane, ctx.found)
        # Zeros that take no memory; once, for two of them would be added up.
        zeros = torch.zeros((), dtype=grad.dtype, device=grad.device).expand(ctx.table)
        return zeros if ctx.first else None, None, None, None, None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], weight: Tensor, ids: Tensor, *others: Any
    ) -> tuple[Tensor, int | None]:
        if in_dims[0] is not None:
            raise RuntimeError("an embedding's table differs from sample to sample")
        if in_dims[1] is not None:
            ids = ids.movedim(in_dims[1], 0)
        return _Lookup.apply(weight, ids, *others), None if in_dims[1] is None else 0


class _Note(torch.autograd.Function):
    """Notes what flowed back to a lookup, [B, ..., D], and the rows that it looked up, [B, ...]."""

    @staticmethod
    def forward(flowed: Tensor, ids: Tensor, lane: Tensor, found: _Found) -> Tensor:
        raise RuntimeError("lookups are noted under vmap alone")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[Any, ...],
        flowed: Tensor,
        ids: Tensor,
        lane: Tensor,
        found: _Found,
    ) -> tuple[Tensor, None]:
        flowed, ids = (
            tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
            for tensor, dim in zip((flowed, ids), in_dims, strict=False)
        )
        if in_dims[2] is None:  # a vmap of the model's own
            return _Note.apply(flowed, ids, lane, found), None
        found.lookups.append((ids, flowed))
        return flowed.new_zeros(()), None
