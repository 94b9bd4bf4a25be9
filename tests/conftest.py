from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import trak_ext


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    trak_ext.set_num_threads(None)
