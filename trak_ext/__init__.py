"""TRAK data attribution for PyTorch, on compiled projection and scoring kernels."""

from importlib import import_module as _import_module
from importlib.metadata import version as _version
from typing import Any as _Any

try:
    from . import _C as _C
except ImportError as _error:
    raise ImportError(
        "trak_ext: expected the compiled module _C beside its Python files, got a folder without "
        f"it (run Python outside the source folder, or install with `pip install -e .`): {_error}"
    ) from _error

from . import baselines, evaluation, scoring, tasks
from .attribution.attributor import Attributor
from .estimator.scoring import kernel_matrix, score, top_k
from .estimator.sparsity import soft_threshold
from .kernels.cuda_paths import CudaSelfTestWarning
from .kernels.operators import get_num_threads, set_num_threads
from .kernels.projection import Projector, project, projection_matrix
from .kernels.runtime import build_info
from .kernels.score_pass import TopK
from .known_answers.report import SelfTestReport, selftest
from .store import StoreError

__version__ = _version("trak-ext")
__all__ = [
    "Attributor",
    "CudaSelfTestWarning",
    "Projector",
    "SelfTestReport",
    "StoreError",
    "TopK",
    "baselines",
    "build_info",
    "evaluation",
    "get_num_threads",
    "kernel_matrix",
    "project",
    "projection_matrix",
    "reference",
    "score",
    "scoring",
    "selftest",
    "set_num_threads",
    "soft_threshold",
    "tasks",
    "top_k",
]


def __getattr__(name: str) -> _Any:
    # The slow oracle that tests compare with: nothing else imports it.
    if name == "reference":
        return _import_module(".reference", __name__)
    raise AttributeError(f"module 'trak_ext' has no attribute {name!r}")
