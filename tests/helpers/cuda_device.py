"""Marks of tests that need CUDA: in the build, or a device too."""

from __future__ import annotations

import pytest
import torch

from trak_ext import _C

BUILT = hasattr(_C, "cuda_project")
built = pytest.mark.skipif(not BUILT, reason="trak_ext was built without CUDA")
device = pytest.mark.skipif(
    not (BUILT and torch.cuda.is_available()),
    reason="no CUDA device that torch and this build of trak_ext can use",
)
