"""The host build of the CUDA kernels, which lies with the tests that it was made for."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "tests" / "helpers" / "cuda_host"


def _find_package() -> None:
    """Make `cuda_host` importable by its folder, where pytest's settings have not."""
    if importlib.util.find_spec("cuda_host") is None:
        spec = importlib.util.spec_from_file_location(
            "cuda_host", FOLDER / "__init__.py", submodule_search_locations=[str(FOLDER)]
        )
        assert spec is not None
        assert spec.loader is not None
        sys.modules["cuda_host"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["cuda_host"])


_find_package()
library = importlib.import_module("cuda_host.library")
