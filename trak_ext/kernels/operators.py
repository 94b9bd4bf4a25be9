"""The projection as torch operators: `trak_ext::project_`, `project` and `projection_matrix`.

The operators are what torch.compile, vmap and the dispatcher see; `trak_ext.project` is what people
call. Schemas carry the 64-bit seed as two 32-bit words, since an operator's int is signed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _C, _check
from . import cuda_paths

# Codes of the dense kinds' kernels; the sparse kind "sjlt" has entry points of its own.
DENSE_KINDS = {"rademacher": 0, "normal": 1}
KINDS = (*DENSE_KINDS, "sjlt")
# Names as in torch.set_float32_matmul_precision; on CUDA the bf16 parts of an fp32 gradient.
PRECISIONS = {"medium": 1, "high": 2, "highest": 3}
# What a projection on a CUDA device takes at most for bf16 parts and partial sums.
CUDA_WORKSPACE_BYTES = 256 * 2**20
# Multiply-adds a thread of a call on the CPU: a third of a second on slow ones.
CPU_CALL_WORK = 2**33
# A multiple of what the CPU's kernels of every level sum before they add to the result.
SPAN_PARAMS = 3 * 2**16
DTYPE_CODES = {torch.float64: 0, torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}

_num_threads: int | None = None


def set_num_threads(num_threads: int | None) -> None:
    """Set the number of threads of the CPU kernels; None follows `torch.get_num_threads()`.

    Results do not depend on it.
    """
    global _num_threads
    if num_threads is not None:
        num_threads = _check.integer("num_threads", num_threads, 1, 4096)
    _num_threads = num_threads


def get_num_threads() -> int:
    """Return the number of threads that the next CPU kernel will use at most."""
    return torch.get_num_threads() if _num_threads is None else _num_threads


def _byte_range(tensor: Tensor) -> tuple[int, int]:
    last = sum(
        (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def _interleaved(a: Tensor, b: Tensor) -> bool:
    """Return whether two 2-D tensors are disjoint column ranges of one row-major buffer."""
    pitch = a.stride(0) * a.element_size()
    if pitch != b.stride(0) * b.element_size() or a.stride(1) != 1 or b.stride(1) != 1:
        return False
    first, second = (a, b) if a.data_ptr() <= b.data_ptr() else (b, a)
    gap = (second.data_ptr() - first.data_ptr()) % pitch
    width_first = first.shape[1] * first.element_size()
    width_second = second.shape[1] * second.element_size()
    return width_first <= gap and gap + width_second <= pitch


def _check_memory(grads: Sequence[Tensor], out: Tensor) -> None:
    """Refuse an `out` that shares memory with itself or with a gradient."""
    if out.numel() == 0:
        return
    dims = sorted(
        (stride, size) for size, stride in zip(out.shape, out.stride(), strict=True) if size > 1
    )
    reach = 1
    for stride, size in dims:
        if stride < reach:
            raise ValueError(
                "out: expected rows that do not overlap in memory, got strides "
                f"{list(out.stride())} for shape {list(out.shape)}"
            )
        reach = stride * (size - 1) + reach
    low, high = _byte_range(out)
    for grad in grads:
        if grad.numel() == 0:
            continue
        grad_low, grad_high = _byte_range(grad)
        if grad_low < high and low < grad_high and not _interleaved(grad, out):
            raise ValueError("out: expected memory apart from grads, got overlapping tensors")


def _operator(name: str, mutates_args: Iterable[str] = ()) -> Callable[[Callable[..., Any]], Any]:
    """Register an operator, as `torch.library.custom_op` does.

    That wraps the function to be left alone by dynamo, which imports all of torch's compiler at the
    first call: 1 to 2 seconds, for a function whose inside no compiler sees. So it is put back as
    it was, where torch keeps it in the place that it does today.
    """

    def register(function: Callable[..., Any]) -> Any:
        operator = torch.library.custom_op(name, function, mutates_args=mutates_args)
        kernels = getattr(operator, "_backend_fns", None)
        if isinstance(kernels, dict) and None in kernels:
            kernels[None] = function
        return operator

    return register


@_operator("trak_ext::project_", mutates_args={"out"})
def project_(
    grads: Sequence[Tensor],
    out: Tensor,
    kind: str,
    seed_low: int,
    seed_high: int,
    model_id: int,
    param_offset: int,
    precision: str,
    nnz: int = 1,
) -> None:
    """Add the projection of gradients [B, P_i], side by side, to `out` [B, proj_dim] (fp32)."""
    _check.choice("kind", kind, KINDS)
    _check.choice("precision", precision, PRECISIONS)
    if out.dim() == 2:
        check_nnz(nnz, kind, out.shape[1])
    if out.dim() != 2 or out.dtype != torch.float32:
        raise ValueError(
            f"out: expected a torch.float32 tensor [B, proj_dim], got {_check.describe(out)}"
        )
    for i, grad in enumerate(grads):
        _check.float_tensor(f"grads[{i}]", grad, "[B, P]", (2,))
        if grad.shape[0] != out.shape[0]:
            raise ValueError(
                f"grads[{i}]: expected {out.shape[0]} rows as the others or out have, "
                f"got {_check.describe(grad)}"
            )
        _check.on_device_with_kernels(f"grads[{i}]", grad)
        if grad.device != out.device:
            raise ValueError(
                f"grads[{i}]: expected a tensor on {out.device} as out is, "
                f"got {_check.describe(grad)}"
            )
    _check.on_device_with_kernels("out", out)
    _check_memory(grads, out)
    matrix = native_matrix(kind, seed_low, seed_high, model_id, out.shape[1], nnz)
    placed = []
    for grad in grads:
        placed.append((grad, param_offset))
        param_offset += grad.shape[1]
    if out.device.type == "cpu":
        _project_on_cpu(matrix, placed, out, precision)
        return
    projection = native_projection(matrix, placed, out, precision)
    size = _C.cuda_workspace_bytes(projection, CUDA_WORKSPACE_BYTES)
    workspace = torch.empty(size // 4, dtype=torch.float32, device=out.device)
    place = {"workspace": workspace.data_ptr(), "workspace_bytes": size}
    if isinstance(projection, _C.Projection):
        path = cuda_paths.projection_path(out.device, out.shape[0])
        _C.cuda_project(projection, path=path, **place, **cuda_queue(out.device))
    else:
        cuda_paths.check_sparse(out.device)
        _C.cuda_project(projection, full_blocks=False, **place, **cuda_queue(out.device))


def project_placed(
    placed: Sequence[tuple[Tensor, int]],
    out: Tensor,
    kind: str,
    seed_low: int,
    seed_high: int,
    model_id: int,
    precision: str,
    nnz: int = 1,
) -> None:
    """Add to `out` the projection of gradients on the CPU, as `project_` does, with gaps.

    Args:
        placed: Gradients [B, P_i], each with its param_offset, in the order of those and apart from
            one another. Parameters of none have gradients of zero.
        out: fp32 [B, proj_dim] that shares no memory with them.
    """
    matrix = native_matrix(kind, seed_low, seed_high, model_id, out.shape[1], nnz)
    _project_on_cpu(matrix, placed, out, precision)


def _project_on_cpu(
    matrix: _C.Matrix | _C.SparseMatrix,
    placed: Sequence[tuple[Tensor, int]],
    out: Tensor,
    precision: str,
) -> None:
    for some, rows in _cpu_pieces(placed, out, sparse=isinstance(matrix, _C.SparseMatrix)):
        _C.project(native_projection(matrix, some, rows, precision), get_num_threads())


def pieces(size: int, work: int, unit: int = 1) -> Iterator[slice]:
    """Yield slices of a size, each of whose 1 costs `work` multiply-adds: short calls on the CPU.

    Between two calls Python sees Ctrl-C. Slices begin at multiples of the unit.
    """
    step = max(1, CPU_CALL_WORK * get_num_threads() // max(work, 1) // unit) * unit
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))


def _cpu_pieces(
    placed: Sequence[tuple[Tensor, int]], out: Tensor, sparse: bool
) -> Iterator[tuple[Sequence[tuple[Tensor, int]], Tensor]]:
    """Yield gradients with their param_offset, and rows of `out`, of one call after another.

    Where nothing is long, or the sum of a sparse kind is one, everything at once.
    """
    rows, proj_dim = out.shape
    params = sum(grad.shape[1] for grad, _ in placed)
    least = 16  # rows: making the matrix's entries costs about as much as multiplying those
    if sparse or params * proj_dim * max(rows, least) <= CPU_CALL_WORK * get_num_threads():
        yield placed, out
        return
    for some in pieces(rows, SPAN_PARAMS * proj_dim, 64):
        work = proj_dim * max(some.stop - some.start, least)
        for grad, param_offset in placed:
            # Sums go to `out` at spans counted from the block of 128 that has the first parameter.
            before = param_offset % 128
            for part in pieces(before + grad.shape[1], work, SPAN_PARAMS):
                first, last = max(part.start - before, 0), part.stop - before
                yield [(grad[some, first:last], param_offset + first)], out[some]


def native_matrix(
    kind: str, seed_low: int, seed_high: int, model_id: int, proj_dim: int, nnz: int
) -> _C.Matrix | _C.SparseMatrix:
    """Return a matrix as the kernels take it."""
    identity = {"seed_low": seed_low, "seed_high": seed_high, "model_id": model_id}
    if kind == "sjlt":
        return _C.SparseMatrix(width=proj_dim // nnz, repetitions=nnz, **identity)
    return _C.Matrix(kind=DENSE_KINDS[kind], **identity)


def native_projection(
    matrix: _C.Matrix | _C.SparseMatrix,
    grads: Sequence[tuple[Tensor, int]],
    out: Tensor,
    precision: str,
) -> _C.Projection | _C.SparseProjection:
    """Return a projection of gradients [B, P_i], each with its param_offset, to `out` [B, k].

    It holds addresses: the tensors must outlive it.
    """
    views = [
        _C.Gradient(
            address=grad.data_ptr(),
            dtype=DTYPE_CODES[grad.dtype],
            params=grad.shape[1],
            row_stride=grad.stride(0),
            param_stride=grad.stride(1),
            param_offset=param_offset,
        )
        for grad, param_offset in grads
    ]
    rows, proj_dim = out.shape
    output = _C.Output(
        address=out.data_ptr(), row_stride=out.stride(0), column_stride=out.stride(1)
    )
    if isinstance(matrix, _C.SparseMatrix):
        return _C.SparseProjection(matrix=matrix, grads=views, rows=rows, out=output)
    return _C.Projection(
        matrix=matrix,
        grads=views,
        rows=rows,
        proj_dim=proj_dim,
        out=output,
        precision=PRECISIONS[precision],
    )


def matrix_rows(
    matrix: _C.Matrix | _C.SparseMatrix, param_offset: int, out: Tensor
) -> dict[str, int]:
    """Return the arguments of `_C.fill_matrix` for rows param_offset .. of R, `out` [P, k]."""
    rows = {"param_offset": param_offset, "params": out.shape[0], "out": out.data_ptr()}
    if isinstance(matrix, _C.Matrix):
        rows["proj_dim"] = out.shape[1]
    return rows


def check_nnz(nnz: int, kind: str, proj_dim: int) -> None:
    """Refuse nonzeros a parameter that the kind or the number of columns cannot have."""
    if kind != "sjlt":
        if nnz != 1:
            raise ValueError(f"nnz: expected 1 with kind {kind!r} (it is for 'sjlt'), got {nnz}")
    elif nnz < 1 or proj_dim % nnz != 0:
        raise ValueError(
            f"nnz: expected a positive divisor of proj_dim = {proj_dim} with kind 'sjlt', got {nnz}"
        )


def cuda_queue(device: torch.device) -> dict[str, int]:
    """Return the device's number and the address of the stream that its work goes to now."""
    stream = torch.cuda.current_stream(device)
    return {"device": stream.device_index, "stream": stream.cuda_stream}


@_operator("trak_ext::project")
def project(
    grads: Sequence[Tensor],
    proj_dim: int,
    kind: str,
    seed_low: int,
    seed_high: int,
    model_id: int,
    param_offset: int,
    precision: str,
    nnz: int = 1,
) -> Tensor:
    """Return the projection of gradients [B, P_i], side by side: fp32 [B, proj_dim]."""
    if not grads:
        raise ValueError("grads: expected at least one tensor, got an empty list")
    rows = grads[0].shape[0]
    out = torch.zeros((rows, proj_dim), dtype=torch.float32, device=grads[0].device)
    project_(grads, out, kind, seed_low, seed_high, model_id, param_offset, precision, nnz)
    return out


@_operator("trak_ext::projection_matrix")
def projection_matrix(
    num_params: int,
    proj_dim: int,
    kind: str,
    seed_low: int,
    seed_high: int,
    model_id: int,
    param_offset: int,
    nnz: int,
    device: torch.device,
) -> Tensor:
    """Return rows param_offset .. of R: fp32 [num_params, proj_dim]."""
    _check.choice("kind", kind, KINDS)
    check_nnz(nnz, kind, proj_dim)
    out = torch.empty((num_params, proj_dim), dtype=torch.float32, device=device)
    _check.on_device_with_kernels("device", out)
    matrix = native_matrix(kind, seed_low, seed_high, model_id, proj_dim, nnz)
    if out.device.type == "cpu":
        for some in pieces(num_params, 16 * proj_dim):
            rows = matrix_rows(matrix, param_offset + some.start, out[some])
            _C.fill_matrix(matrix, **rows, num_threads=get_num_threads())
        return out
    check = cuda_paths.check_sparse if kind == "sjlt" else cuda_paths.check_matrix
    check(out.device)
    rows = matrix_rows(matrix, param_offset, out)
    _C.cuda_fill_matrix(matrix, **rows, **cuda_queue(out.device))
    return out


@projection_matrix.register_fake
def _(
    num_params: int,
    proj_dim: int,
    kind: str,
    seed_low: int,
    seed_high: int,
    model_id: int,
    param_offset: int,
    nnz: int,
    device: torch.device,
) -> Tensor:
    return torch.empty((num_params, proj_dim), dtype=torch.float32, device=device)


@project_.register_fake
def _(
    grads: Sequence[Tensor],
    out: Tensor,
    kind: str,
    seed_low: int,
    seed_high: int,
    model_id: int,
    param_offset: int,
    precision: str,
    nnz: int = 1,
) -> None:
    return None


@project.register_fake
def _(
    grads: Sequence[Tensor],
    proj_dim: int,
    kind: str,
    seed_low: int,
    seed_high: int,
    model_id: int,
    param_offset: int,
    precision: str,
    nnz: int = 1,
) -> Tensor:
    return grads[0].new_empty((grads[0].shape[0], proj_dim), dtype=torch.float32)


def _batch_first(tensor: Tensor, dim: int | None, batch_size: int) -> Tensor:
    if dim is None:
        return tensor.unsqueeze(0).expand(batch_size, *tensor.shape)
    return tensor.movedim(dim, 0)


@project.register_vmap
def _(info: Any, in_dims: Any, grads: Sequence[Tensor], proj_dim: int, *law: Any) -> Any:
    # A row's features do not depend on its batch, so the mapped dimension joins the rows.
    batched = [_batch_first(g, d, info.batch_size) for g, d in zip(grads, in_dims[0], strict=True)]
    rows = batched[0].shape[1]
    flat = [g.reshape(info.batch_size * rows, g.shape[2]) for g in batched]
    out = project(flat, proj_dim, *law)
    return out.reshape(info.batch_size, rows, proj_dim), 0


@project_.register_vmap
def _(info: Any, in_dims: Any, grads: Sequence[Tensor], out: Tensor, *law: Any) -> Any:
    if in_dims[1] is None:
        raise ValueError("out: expected a tensor mapped by vmap like grads, got one shared by all")
    batched = [_batch_first(g, d, info.batch_size) for g, d in zip(grads, in_dims[0], strict=True)]
    for i, rows in enumerate(out.movedim(in_dims[1], 0).unbind(0)):
        project_([g[i] for g in batched], rows, *law)
    return None, None
