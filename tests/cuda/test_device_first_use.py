"""The first calls of a process on a CUDA device; skipped where there is none."""

from __future__ import annotations

import pytest
import torch

from children import run_python
from cuda_device import device

# Every graph meets kernels that the process has neither launched nor loaded before.
CAPTURED_FIRST = """
import sys

import torch

import trak_ext
from trak_ext.kernels.score_pass import SolvedTargets

grads = torch.randn(5, 30000, device="cuda")
features = [torch.randn(100, 70, device="cuda")]
weights = torch.rand(100, device="cuda")
solved = torch.randn(1, 9, 70, dtype=torch.float64, device="cuda")
single, double = (SolvedTargets(solved, dtype) for dtype in (torch.float32, torch.float64))
wide = [features[0].double()], weights.double()
calls = [
    lambda: trak_ext.project(grads, 256),
    lambda: trak_ext.project(grads, 256, kind="normal"),
    lambda: trak_ext.projection_matrix(300, 40, device="cuda"),
    lambda: trak_ext.projection_matrix(300, 40, kind="normal", device="cuda"),
    lambda: single.score(features, weights),
    lambda: double.score(*wide),
]
torch.cuda.synchronize()
for call in calls:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode=sys.argv[1]):
        captured = call()
    captured.fill_(float("nan"))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, call())
print("all captured")
"""


@device
@pytest.mark.parametrize(
    ("mode", "loading"), [("global", "LAZY"), ("thread_local", "LAZY"), ("global", "EAGER")]
)
def test_first_calls_are_captured_in_a_graph(mode, loading):
    run = run_python(CAPTURED_FIRST, mode, check=False, CUDA_MODULE_LOADING=loading)
    assert run.stdout == "all captured\n", run.stderr


# Torch makes no context on device 0 either, and its current device stays 0.
ON_DEVICE_1 = """
import threading

import torch

import trak_ext
from trak_ext.kernels.score_pass import SolvedTargets

grads = torch.randn(5, 3000, device="cuda:1")
features, weights = [torch.randn(100, 70, device="cuda:1")], torch.rand(100, device="cuda:1")
solved = SolvedTargets(torch.randn(1, 9, 70, dtype=torch.float64).to("cuda:1"), torch.float32)
made = torch._C._cuda_hasPrimaryContext
before = made(0)


def work():
    trak_ext.projection_matrix(30, 40, device="cuda:1")
    trak_ext.project(grads, 40)
    solved.score(features, weights)
    solved.top_k(features, weights, 3)
    trak_ext._C.cuda_projection_path(1)
    solved.score([torch.randn(100, 70)], torch.rand(100))
    seen.append(torch.cuda.current_device())


seen = []
for call in (threading.Thread(target=work), threading.Thread(target=work)):
    call.start()
    call.join()
work()
print(before, made(0), seen)
"""


@device
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_device_that_nobody_uses_gets_no_context():
    run = run_python(ON_DEVICE_1, check=False)
    if run.stdout.startswith("True"):
        pytest.skip("torch itself has made a context on device 0")
    assert run.stdout == "False False [0, 0, 0]\n", run.stderr
