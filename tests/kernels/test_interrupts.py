"""Long calls on the CPU are made of short ones: the same bits, and Ctrl-C between them."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest
import torch

import trak_ext
from trak_ext.kernels import operators


@pytest.fixture
def short(monkeypatch):
    """Have calls be as short as they get, and count them."""

    def shorten():
        monkeypatch.setattr(operators, "CPU_CALL_WORK", 1)
        calls = []
        native = operators._C.project
        monkeypatch.setattr(
            operators._C, "project", lambda *given: calls.append(given) or native(*given)
        )
        return calls

    return shorten


@pytest.mark.parametrize("kind", ["rademacher", "normal", "sjlt"])
@pytest.mark.parametrize("precision", ["medium", "high"])
@pytest.mark.parametrize("offset", [0, 77, 2**40 + 333])
@pytest.mark.parametrize("rows", [1, 3, 70])
def test_projections_in_pieces_have_the_same_bits(kind, precision, offset, rows, short):
    generator = torch.Generator().manual_seed(rows)
    sizes = (operators.SPAN_PARAMS + 5, 130, 2 * operators.SPAN_PARAMS - 77)
    if rows == 70:
        sizes = (900, operators.SPAN_PARAMS - 3)
    grads = {str(i): torch.randn(rows, size, generator=generator) for i, size in enumerate(sizes)}
    options = {"kind": kind, "precision": precision, "param_offset": offset, "seed": 3}
    start = torch.randn(rows, 24, generator=generator)
    whole = trak_ext.project(grads, 24, **options, out=start.clone())
    calls = short()
    pieces = trak_ext.project(grads, 24, **options, out=start.clone())
    assert torch.equal(pieces, whole)
    assert len(calls) == 1 if kind == "sjlt" else len(calls) >= 4


@pytest.mark.parametrize("kind", ["rademacher", "normal", "sjlt"])
def test_a_matrix_in_pieces_is_the_same(kind, monkeypatch):
    whole = trak_ext.projection_matrix(700, 12, kind=kind, param_offset=77)
    monkeypatch.setattr(operators, "CPU_CALL_WORK", 16 * 12 * 50)
    assert torch.equal(trak_ext.projection_matrix(700, 12, kind=kind, param_offset=77), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("leverage", [False, True])
def test_scores_in_pieces_are_the_same(dtype, leverage, monkeypatch):
    generator = torch.Generator().manual_seed(1)
    phi, targets = (
        torch.randn(2, size, 9, generator=generator).to(dtype) for size in (700, 5)
    )  # fmt: skip
    weights = torch.rand(2, 700, generator=generator)
    whole = trak_ext.score(phi, targets, weights, leverage=leverage)
    best = trak_ext.top_k(phi, targets, 100, weights, leverage=leverage, largest=False)
    monkeypatch.setattr(operators, "CPU_CALL_WORK", 1)
    assert torch.equal(trak_ext.score(phi, targets, weights, leverage=leverage), whole)
    again = trak_ext.top_k(phi, targets, 100, weights, leverage=leverage, largest=False)
    assert torch.equal(again.values, best.values)
    assert torch.equal(again.indices, best.indices)


# What would take an hour or more, in no memory to speak of.
LONG = {
    "project": "trak_ext.project(torch.ones(1).expand(8, 10**11), 4096)",
    "normal": "trak_ext.project(torch.ones(1).expand(1, 10**11), 4096, kind='normal')",
    "many rows": "trak_ext.project(torch.ones(1).expand(10**6, 10**8), 64)",
}


@pytest.mark.slow
@pytest.mark.parametrize("call", LONG)
def test_ctrl_c_ends_a_long_call(call):
    # A shell that starts the tests in the background has Ctrl-C ignored, by children too.
    code = (
        "import signal, torch, trak_ext\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"print('begins', flush=True)\n{LONG[call]}"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-P", "-c", code], **pipes) as child:
        try:
            assert child.stdout.readline() == "begins\n"
            time.sleep(1)
            assert child.poll() is None
            child.send_signal(signal.SIGINT)
            _, said = child.communicate(timeout=60)
        finally:
            child.kill()
    assert "KeyboardInterrupt" in said
    assert child.returncode != 0
