"""Random projection of gradients by a matrix defined to the bit: `project` and its companions."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import _check
from . import operators

MAX_SEED = 2**64 - 1
MAX_MODEL_ID = 2**32 - 1
MAX_PROJ_DIM = 2**32
MAX_PARAMS = 2**63 - 1


def _law_arguments(kind: Any, seed: Any, model_id: Any) -> tuple[str, int, int, int]:
    _check.choice("kind", kind, operators.KINDS)
    seed = _check.integer("seed", seed, 0, MAX_SEED)
    model_id = _check.integer("model_id", model_id, 0, MAX_MODEL_ID)
    return kind, seed & 0xFFFFFFFF, seed >> 32, model_id


def check_nnz(nnz: Any, kind: str, proj_dim: int) -> int:
    """Return `nnz` as an int, checked for its kind and number of columns."""
    nnz = _check.integer("nnz", nnz, 1, MAX_PROJ_DIM)
    operators.check_nnz(nnz, kind, proj_dim)
    return nnz


def _gradient_list(grads: Any) -> tuple[list[str], list[Tensor]]:
    """Return names of the gradients and tensors [B, P_i] of them, which the operator will check."""
    if isinstance(grads, Mapping):
        if not grads:
            raise ValueError("grads: expected at least one tensor, got an empty mapping")
        named = [(f"grads[{name!r}]", grad) for name, grad in grads.items()]
    else:
        named = [("grads", grads)]
    flat = []
    for name, grad in named:
        # What cannot be handed on to the operator.
        if not isinstance(grad, Tensor) or grad.dim() == 0 or grad.layout != torch.strided:
            _check.float_tensor(name, grad, "[B, P] (or a mapping to [B, *shape])", (2,))
        if (grad.requires_grad and torch.is_grad_enabled()) or _check.has_tangent(grad):
            raise ValueError(
                f"{name}: expected a tensor that does not require grad (detach it, or multiply by "
                "projection_matrix(...) where the projection itself must be differentiated), "
                "got one that does"
            )
        flatten = isinstance(grads, Mapping)
        flat.append(grad.reshape(grad.shape[0], math.prod(grad.shape[1:])) if flatten else grad)
    return [name for name, _ in named], flat


def _call(operator: Any, names: list[str], *arguments: Any) -> Any:
    """Call an operator, whose sentences say a tensor's number, and have them say its name."""
    if torch.compiler.is_compiling():  # nothing is run yet
        return operator(*arguments)
    try:
        return operator(*arguments)
    except ValueError as error:
        number = re.match(r"grads\[(\d+)\]", str(error))
        if number is None:
            raise
        name = names[int(number[1])]
        raise ValueError(name + str(error)[number.end() :]) from None


def _check_out(out: Any, grads: list[Tensor], proj_dim: int) -> None:
    if not isinstance(out, Tensor):
        raise TypeError(f"out: expected a tensor, got {_check.describe(out)}")
    expected = (grads[0].shape[0], proj_dim)
    if (
        tuple(out.shape) != expected
        or out.dtype != torch.float32
        or out.device != grads[0].device
        or out.layout != torch.strided
        or out.requires_grad
    ):
        raise ValueError(
            f"out: expected a dense torch.float32 tensor {list(expected)} on {grads[0].device} "
            f"that does not require grad, got {_check.describe(out)}"
        )


def project(
    grads: Tensor | Mapping[str, Tensor],
    proj_dim: int,
    *,
    kind: str = "rademacher",
    seed: int = 0,
    model_id: int = 0,
    param_offset: int = 0,
    precision: str = "high",
    nnz: int = 1,
    out: Tensor | None = None,
) -> Tensor:
    """Project per-sample gradients by a random matrix that is never held: features = grads @ R.

    R is [P, proj_dim] with entries of mean 0 and variance 1, the same bits on every device: entry
    (p, j) is a function of kind, seed, model_id, param_offset + p and j alone, of "sjlt" also of
    proj_dim and nnz (csrc/law.md). The result is not scaled; divide by sqrt(proj_dim) for a
    Johnson-Lindenstrauss embedding.

    Args:
        grads: Tensor [B, P], or a mapping to tensors [B, *shape] taken side by side in its order.
            fp64, fp32, fp16 or bf16, any strides; read where it lies, never concatenated.
        proj_dim: Number of columns, 0 to 2**32.
        kind: "rademacher" (+1 and -1), "normal" (standard normals rounded to bf16) or "sjlt", which
            is sparse: each parameter meets nnz columns with entries +-sqrt(proj_dim / nnz). It
            costs about as much as reading the gradients, whatever proj_dim. Its features are the
            same bits on every device, CPU level and number of threads.
        seed: 0 to 2**64 - 1.
        model_id: 0 to 2**32 - 1; another one is another, independent matrix.
        param_offset: Row of R that meets the first parameter, so that
            project([a, b]) = project(a) + project(b, param_offset=len(a)).
        precision: "medium", "high" or "highest". On a CUDA device with matrix instructions for bf16
            (compute capability 8.0 and later) gradients in fp32 are taken as one, two or three bf16
            numbers, that is to 2^-9, to 2^-17 or exactly; bf16 and fp16 always exactly, fp64
            rounded to fp32. Sums are fp32. On older devices all three are fp32. On the CPU "high"
            and "highest" are fp32, and so is "medium", but for Rademacher on machines with AVX-512
            VNNI: there gradients are rounded to fixed point, 384 parameters of a row sharing a
            power of two. A row of features then errs by about 2^-13 of its L2 norm (2^-9 is
            tested), at 1.7 times the speed.
            "sjlt" is a sum of fp32 numbers in every precision.
        nnz: Entries of a parameter that are not 0 with kind "sjlt", a divisor of proj_dim; more of
            them cost more and narrow the tail of the errors. 1 with the other kinds.
        out: fp32 [B, proj_dim], rows of any stride, apart from grads in memory; the projection is
            added to it. Unchanged on an error.

    Returns:
        `out`, or a new fp32 tensor [B, proj_dim]. A row's bits do not depend on the other rows, on
        strides, on the number of threads or on the size of a CUDA device.

    Raises:
        ValueError, TypeError: one sentence naming the argument; also for gradients that require
            grad while grad mode is on.

    On the CPU the workspace is below 1 MiB a thread, whatever P; outputs too small to be cut for
    threads (below 512 columns and 32 rows each) take 8 to 64 MiB more. "sjlt" takes 1 to 5 MiB
    a thread, and up to 32 MiB more for outputs too small to be cut. On a CUDA device it is
    256 MiB at most (`kernels.operators.CUDA_WORKSPACE_BYTES`). There the work is added to the
    current stream of the tensors' device and not waited for; a CUDA graph can capture it.
    """
    law = _law_arguments(kind, seed, model_id)
    proj_dim = _check.integer("proj_dim", proj_dim, 0, MAX_PROJ_DIM)
    nnz = check_nnz(nnz, kind, proj_dim)
    _check.choice("precision", precision, operators.PRECISIONS)
    names, tensors = _gradient_list(grads)
    params = sum(math.prod(tensor.shape[1:]) for tensor in tensors)
    param_offset = _check.integer("param_offset", param_offset, 0, MAX_PARAMS - params)
    if out is not None:
        _check_out(out, tensors, proj_dim)
    how = (*law, param_offset, precision, nnz)
    if out is None:
        made: Tensor = _call(operators.project, names, tensors, proj_dim, *how)
        return made
    _call(operators.project_, names, tensors, out, *how)
    return out


def projection_matrix(
    num_params: int,
    proj_dim: int,
    *,
    kind: str = "rademacher",
    seed: int = 0,
    model_id: int = 0,
    param_offset: int = 0,
    nnz: int = 1,
    device: str | torch.device = "cpu",
) -> Tensor:
    """Return rows param_offset .. param_offset + num_params - 1 of R: fp32 [num_params, proj_dim].

    For inspection and for small problems; `project` multiplies by it without ever holding it.
    Arguments and errors are those of `project`.
    """
    name, seed_low, seed_high, model_id = _law_arguments(kind, seed, model_id)
    num_params = _check.integer("num_params", num_params, 0, MAX_PARAMS)
    proj_dim = _check.integer("proj_dim", proj_dim, 0, MAX_PROJ_DIM)
    param_offset = _check.integer("param_offset", param_offset, 0, MAX_PARAMS - num_params)
    nnz = check_nnz(nnz, name, proj_dim)
    law = (name, seed_low, seed_high, model_id, param_offset, nnz)
    return operators.projection_matrix(num_params, proj_dim, *law, torch.device(device))


class Projector:
    """`project` with its settings bound, for gradients of one size.

    Args:
        grad_dim: Number of parameters P that every call brings.
        proj_dim: Number of columns, at least 1.
        kind, seed, precision, nnz: As in `project`.
    """

    def __init__(
        self,
        grad_dim: int,
        proj_dim: int,
        *,
        kind: str = "rademacher",
        seed: int = 0,
        precision: str = "high",
        nnz: int = 1,
    ) -> None:
        self.grad_dim = _check.integer("grad_dim", grad_dim, 0, MAX_PARAMS)
        self.proj_dim = _check.integer("proj_dim", proj_dim, 1, MAX_PROJ_DIM)
        self.kind = _check.choice("kind", kind, operators.KINDS)
        self.seed = _check.integer("seed", seed, 0, MAX_SEED)
        self.precision = _check.choice("precision", precision, operators.PRECISIONS)
        self.nnz = check_nnz(nnz, self.kind, self.proj_dim)

    def __repr__(self) -> str:
        nnz = f", nnz={self.nnz}" if self.kind == "sjlt" else ""
        return (
            f"Projector({self.grad_dim} parameters -> {self.proj_dim} features, kind={self.kind!r}"
            f"{nnz}, seed={self.seed}, precision={self.precision!r})"
        )

    def project(self, grads: Tensor | Mapping[str, Tensor], model_id: int = 0) -> Tensor:
        """Return features fp32 [B, proj_dim] of gradients with grad_dim parameters per sample."""
        tensors = grads.values() if isinstance(grads, Mapping) else [grads]
        if all(isinstance(tensor, Tensor) and tensor.dim() >= 1 for tensor in tensors):
            params = sum(math.prod(tensor.shape[1:]) for tensor in tensors)
            if params != self.grad_dim:
                raise ValueError(
                    f"grads: expected grad_dim = {self.grad_dim} parameters per sample, "
                    f"got {params}"
                )
        return project(
            grads,
            self.proj_dim,
            kind=self.kind,
            seed=self.seed,
            model_id=model_id,
            precision=self.precision,
            nnz=self.nnz,
        )
