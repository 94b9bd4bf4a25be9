"""Argument checks that several modules share; each raises one sentence naming the argument."""

from __future__ import annotations

import math
import operator
import sys
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from . import _C

FLOAT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def warn(message: str) -> None:
    """Say a RuntimeWarning that points at the line outside this package that led here."""
    package = str(Path(__file__).parent)
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(package):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, RuntimeWarning, stacklevel=level)


def describe(value: Any) -> str:
    """Return what a value is, for the end of an error sentence."""
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {list(value.shape)} on {value.device}"
    if value is None or isinstance(value, (int, float, str)):
        return repr(value)
    return f"a {type(value).__name__}"


def instance(name: str, value: Any, kind: type, meaning: str) -> None:
    """Refuse what is not of a class; `meaning` says what was expected: "a string"."""
    if not isinstance(value, kind):
        raise TypeError(f"{name}: expected {meaning}, got {describe(value)}")


def integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    """Return `value` as an int in [low, high]; NumPy integers are welcome, bools and floats not."""
    if type(value) is not int and not isinstance(value, torch.SymInt):
        try:
            if isinstance(value, bool):
                raise TypeError
            value = operator.index(value)
        except TypeError:
            raise TypeError(f"{name}: expected an integer, got {describe(value)}") from None
    if value < low or (high is not None and value > high):
        expected = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name}: expected an integer {expected}, got {value}")
    return value


def seed(name: str, value: Any) -> int:
    """Return `value` as an int that torch's generators take."""
    return integer(name, value, -(2**63), 2**64 - 1)


def nonnegative(name: str, value: Any) -> float:
    """Return `value` as a finite float that is at least 0."""
    if isinstance(value, (bool, np.bool_, str)) or not isinstance(value, (int, float)):
        try:
            if isinstance(value, (bool, np.bool_, str)):
                raise TypeError
            value = float(value)
        except (TypeError, ValueError):
            raise TypeError(f"{name}: expected a number, got {describe(value)}") from None
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name}: expected a finite number that is at least 0, got {value}")
    return float(value)


def share(name: str, value: Any) -> float:
    """Return `value` as a float in [0, 1]."""
    value = nonnegative(name, value)
    if value > 1:
        raise ValueError(f"{name}: expected a number in [0, 1], got {value}")
    return value


def flag(name: str, value: Any) -> bool:
    """Return `value` as a bool, True or False; NumPy's are welcome."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}: expected True or False, got {describe(value)}")
    return bool(value)


def choice(name: str, value: Any, known: Collection[str]) -> str:
    """Return `value`, one of the known strings."""
    if not isinstance(value, str) or value not in known:
        expected = ", ".join(repr(item) for item in known)
        raise ValueError(f"{name}: expected one of {expected}, got {describe(value)}")
    return value


def tensor(name: str, value: Any, dims: int, kind: str = "float") -> Tensor:
    """Return `value`, a tensor of `dims` dimensions.

    Args:
        kind: "float" for any floating-point dtype and finite values, "integer", or "bool".
    """
    instance(name, value, Tensor, "a torch.Tensor")
    if value.dim() != dims:
        plural = "" if dims == 1 else "s"
        raise ValueError(f"{name}: expected {dims} dimension{plural}, got {describe(value)}")
    floating = value.is_floating_point()
    whole = not (floating or value.is_complex() or value.dtype == torch.bool)
    fits = {"float": floating, "integer": whole, "bool": value.dtype == torch.bool}[kind]
    if not fits:
        dtype = {"float": "a floating-point dtype", "integer": "an integer dtype"}
        expected = dtype.get(kind, "dtype torch.bool")
        raise TypeError(f"{name}: expected {expected}, got {describe(value)}")
    if floating and not (finite := value.isfinite()).all():
        bad = (~finite).nonzero()
        raise ValueError(
            f"{name}: expected finite values, got {len(bad)} that are NaN or Inf, the first at "
            f"{bad[0].tolist()}"
        )
    found: Tensor = value
    return found


def indices(name: str, value: Any, dims: int, stop: int) -> Tensor:
    """Return `value`, a tensor of integers in 0..stop - 1, as int64."""
    found = tensor(name, value, dims, "integer").long()
    if found.numel() and not 0 <= int(found.min()) <= int(found.max()) < stop:
        raise ValueError(
            f"{name}: expected integers in 0..{stop - 1}, got {int(found.min())}.."
            f"{int(found.max())}"
        )
    return found


def float_tensor(name: str, value: Any, shape: str, dims: tuple[int, ...]) -> Tensor:
    """Return `value`, a dense tensor of a supported dtype with one of the numbers of dimensions."""
    if (
        not isinstance(value, Tensor)
        or value.dim() not in dims
        or value.dtype not in FLOAT_DTYPES
        or value.layout != torch.strided
    ):
        raise (TypeError if not isinstance(value, Tensor) else ValueError)(
            f"{name}: expected a dense fp64, fp32, fp16 or bf16 tensor {shape}, "
            f"got {describe(value)}"
        )
    return value


def has_tangent(tensor: Tensor) -> bool:
    """Return whether forward-mode derivatives are asked for, by torch.func.jvp or a dual number."""
    return torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None


def has_values(name: str, tensor: Tensor) -> None:
    """Refuse what torch.func and tracing hand in the place of a tensor: there is nothing to read.

    Derivatives of what kernels compute would come out as zero.
    """
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor) or has_tangent(tensor):
        raise ValueError(
            f"{name}: expected a tensor outside of torch.func transforms (grad, jvp, vmap), which "
            "this function is not differentiated or mapped by, got one inside"
        )
    if isinstance(tensor, FakeTensor):
        raise ValueError(f"{name}: expected a tensor with values, got a fake one (of a trace)")


def on_device_with_kernels(name: str, tensor: Tensor) -> None:
    """Refuse a tensor that is neither on the CPU nor on a CUDA device that this build serves."""
    if tensor.device.type == "cuda" and not hasattr(_C, "cuda_project"):
        raise ValueError(
            f"{name}: expected a CPU tensor, as this build of trak_ext is without CUDA, "
            f"got {describe(tensor)}"
        )
    if tensor.device.type not in ("cpu", "cuda"):
        raise ValueError(f"{name}: expected a CPU or CUDA tensor, got {describe(tensor)}")


def on_device_of(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Refuse a tensor that is not where another one is."""
    if tensor.device != other.device:
        raise ValueError(
            f"{name}: expected a tensor on {other.device} as {other_name} is, "
            f"got {describe(tensor)}"
        )


def shape_is(name: str, tensor: Tensor, expected: tuple[int, ...], meaning: str) -> None:
    """Refuse a tensor of another shape than expected."""
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{name}: expected {meaning} = {list(expected)}, got {describe(tensor)}")
