"""What was built, and what this machine offers."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

import torch

from .. import _C
from .operators import get_num_threads


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
