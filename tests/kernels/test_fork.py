"""Kernels run in a forked child and in the parent afterwards: no thread outlives a call."""

from __future__ import annotations

import os

import pytest
import torch

import trak_ext
from trak_ext.kernels.score_pass import SolvedTargets


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_project_and_score_after_fork():
    trak_ext.set_num_threads(3)
    grads = torch.randn(8, 30000)
    expected = trak_ext.project(grads, 300)
    train, targets = torch.randn(1, 200, 16), torch.randn(1, 30, 16)
    # Solved beforehand: torch's own solver may not run in a forked child, our kernel may.
    prepared = SolvedTargets(targets.double(), torch.float32)
    weights = torch.ones(200)
    best = prepared.top_k([train[0]], weights, 5)
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # torch's own pool does not survive a fork; ours has none
        trak_ext.set_num_threads(3)
        ok = torch.equal(trak_ext.project(grads, 300), expected)
        found = prepared.top_k([train[0]], weights, 5)
        ok = ok and torch.equal(found.indices, best.indices)
        os._exit(0 if ok else 1)
    _, status = os.waitpid(child, 0)
    assert status == 0
    assert torch.equal(trak_ext.project(grads, 300), expected)
    assert torch.equal(prepared.top_k([train[0]], weights, 5).indices, best.indices)


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="the system does not list threads")
def test_no_thread_outlives_a_call():
    trak_ext.set_num_threads(4)
    grads, train, targets = torch.randn(8, 30000), torch.randn(1, 200, 16), torch.randn(1, 30, 16)
    trak_ext.top_k(train, targets, 5)  # torch's own threads are there from now on
    before = len(os.listdir("/proc/self/task"))
    trak_ext.project(grads, 4096)
    trak_ext.top_k(train, targets, 5)
    assert len(os.listdir("/proc/self/task")) == before
