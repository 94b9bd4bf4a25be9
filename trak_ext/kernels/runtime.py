"""What was built, what this machine offers, and how many threads the CPU kernels use."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

import torch

from .. import _C, _check

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


def build_info() -> dict[str, Any]:
    """Return what was built and what it runs on.

    Keys: "version", "law_version", "torch", "python", "machine", "compiler", "cpu_level" (in use),
    "cpu_levels" (that this machine runs), "cpu_fixed_point" (whether precision "medium" is its own
    kernel there), "threads", "cuda" (bool: built in), "cuda_runtime",
    "cuda_architectures", "cuda_devices" (a list of dicts) and "cuda_status" ("ok", or why there are
    no devices; None where CUDA is not built in).

    Raises ValueError where TRAK_EXT_CPU_LEVEL names a level that this machine does not run.
    """
    cuda = _C.cuda_build()
    return {
        "version": metadata.version("trak-ext"),
        "law_version": _C.law_version(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "compiler": _C.compiler(),
        "cpu_level": _C.cpu_level(),
        "cpu_levels": _C.available_cpu_levels(),
        "cpu_fixed_point": _C.has_fixed_point(),
        "threads": get_num_threads(),
        "cuda": cuda is not None,
        "cuda_runtime": cuda and cuda_version(cuda["runtime_version"]),
        "cuda_architectures": cuda and cuda["architectures"],
        "cuda_devices": cuda["devices"] if cuda else [],
        "cuda_status": cuda and cuda["status"],
    }


def cuda_version(number: int) -> str:
    """Return what the CUDA runtime calls a version, "13.0" for 13000."""
    return f"{number // 1000}.{number % 1000 // 10}"
