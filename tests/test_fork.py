"""Kernels run in a forked child and in the parent afterwards: no thread outlives a call."""

from __future__ import annotations

import os

import pytest
import torch

import trak_ext


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_project_and_score_after_fork():
    trak_ext.set_num_threads(3)
    grads = torch.randn(8, 30000)
    expected = trak_ext.project(grads, 300)
    train, targets = torch.randn(1, 200, 16), torch.randn(1, 30, 16)
    best = trak_ext.top_k(train, targets, 5, kernel=torch.eye(16)[None])
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # torch's own pool does not survive a fork; ours has none
        trak_ext.set_num_threads(3)
        ok = torch.equal(trak_ext.project(grads, 300), expected)
        os._exit(0 if ok else 1)
    _, status = os.waitpid(child, 0)
    assert status == 0
    assert torch.equal(trak_ext.project(grads, 300), expected)
    again = trak_ext.top_k(train, targets, 5, kernel=torch.eye(16)[None])
    assert torch.equal(again.indices, best.indices)
