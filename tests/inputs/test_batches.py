"""Batches of any nesting."""

from __future__ import annotations

import torch

from trak_ext.inputs.batches import batch_size, batch_tensors, map_tensors


def test_helpers_for_batches():
    batch = {"a": torch.zeros(3, 2), "b": [torch.ones(3), (torch.zeros(3, 1, 1),)]}
    assert batch_size(batch) == 3
    assert [tuple(tensor.shape) for tensor in batch_tensors(batch)] == [(3, 2), (3,), (3, 1, 1)]
    mapped = map_tensors(lambda tensor: tensor[:2], batch)
    assert set(mapped) == {"a", "b"}
    assert batch_size(mapped) == 2
    assert mapped["b"][1][0].shape == (2, 1, 1)
