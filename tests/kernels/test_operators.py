"""The operators as torch sees them: opcheck, torch.compile, vmap, the GIL."""

from __future__ import annotations

import threading
import time

import pytest
import torch

import trak_ext
from children import run_python
from trak_ext.kernels import operators

LAW = ("rademacher", 5, 6, 7, 0, "high")


def test_opcheck_functional():
    grads = [torch.randn(3, 10), torch.randn(3, 4).half()]
    torch.library.opcheck(operators.project, (grads, 16, *LAW))


def test_opcheck_mutating():
    grads = [torch.randn(3, 10).bfloat16(), torch.randn(3, 4).double()]
    torch.library.opcheck(operators.project_, (grads, torch.zeros(3, 16), *LAW))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic):
    def features(grads, seed_holder):
        scaled = {name: grad * 2 for name, grad in grads.items()}
        return trak_ext.project(scaled, 24, seed=2**63 + 1, model_id=3) + seed_holder

    compiled = torch.compile(features, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (3, 4):
        grads = {"a": torch.randn(rows, 5, 2), "b": torch.randn(rows, 7)}
        assert torch.equal(compiled(grads, torch.ones(1)), features(grads, torch.ones(1)))


def test_compile_fullgraph_with_out():
    def accumulate(grads, out):
        trak_ext.project(grads, 8, out=out)
        return out * 2

    compiled = torch.compile(accumulate, fullgraph=True, backend="aot_eager")
    grads = torch.randint(-5, 5, (3, 40)).float()
    first, second = torch.ones(3, 8), torch.ones(3, 8)
    assert torch.equal(compiled(grads, first), accumulate(grads, second))
    assert torch.equal(first, second)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # inductor's own imports
def test_compile_with_inductor():
    compiled = torch.compile(lambda g: trak_ext.project(g * 2, 8), fullgraph=True)
    grads = torch.randn(3, 40)
    assert torch.equal(compiled(grads), trak_ext.project(grads * 2, 8))


@pytest.mark.parametrize("in_dim", [0, 1, 2])
def test_vmap_functional(in_dim):
    grads = torch.randn(4, 3, 50)
    expected = torch.stack([trak_ext.project(grad, 16, seed=2) for grad in grads])
    mapped = torch.vmap(lambda g: trak_ext.project(g, 16, seed=2), in_dims=in_dim)
    assert torch.equal(mapped(grads.movedim(0, in_dim)), expected)


def test_vmap_of_a_mapping_with_one_shared_tensor():
    grads, shared = torch.randn(4, 3, 50), torch.randn(3, 9)
    got = torch.vmap(lambda g: trak_ext.project({"a": g, "b": shared}, 16))(grads)
    expected = torch.stack([trak_ext.project({"a": g, "b": shared}, 16) for g in grads])
    assert torch.equal(got, expected)


def test_vmap_of_a_gradient():
    weights = torch.randn(6)
    data = torch.randn(5, 6)

    def features(x):
        grad = torch.func.grad(lambda w: (w * x).sum().tanh())(weights)
        return trak_ext.project(grad[None], 8)[0]

    expected = torch.stack([features(x) for x in data])
    assert torch.equal(torch.vmap(features)(data), expected)


def test_vmap_mutating():
    grads = torch.randint(-5, 5, (4, 3, 50)).float()
    out = torch.ones(4, 3, 16)
    torch.vmap(lambda g, o: trak_ext.project(g, 16, out=o))(grads, out)
    assert torch.equal(out, 1 + torch.stack([trak_ext.project(grad, 16) for grad in grads]))
    with pytest.raises(ValueError, match="out: expected a tensor mapped by vmap"):
        torch.vmap(lambda g: trak_ext.project(g, 16, out=out[0]))(grads)


def test_operator_does_not_pretend_to_have_a_gradient():
    grads = torch.randn(2, 5, requires_grad=True)
    result = operators.project([grads], 4, *LAW)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        result.sum().backward()


def test_the_gil_is_released():
    # A thread that needs the interpreter makes progress while a kernel runs on another.
    trak_ext.set_num_threads(1)
    grads = torch.randn(16, 2**18)
    done = threading.Event()
    ticks = []

    def count() -> None:
        while not done.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.001)

    counter = threading.Thread(target=count)
    counter.start()
    begin = time.perf_counter()
    trak_ext.project(grads, 4096)
    end = time.perf_counter()
    done.set()
    counter.join()
    inside = [tick for tick in ticks if begin < tick < end]
    assert len(inside) >= 5


WRONG = [
    ([torch.ones(2, 5), torch.ones(1, 5)], torch.zeros(2, 4), r"grads\[1\]: expected 2 rows"),
    ([torch.ones(2, 5)], torch.zeros(2, 4).half(), "out: expected a torch.float32"),
    ([torch.ones(2, 5)], torch.zeros(8), "out: expected a torch.float32"),
    ([torch.ones(5)], torch.zeros(5, 4), r"grads\[0\]: expected a dense"),
    ([torch.ones(2, 5, dtype=torch.int32)], torch.zeros(2, 4), r"grads\[0\]: expected a dense"),
]


@pytest.mark.parametrize(("grads", "out", "message"), WRONG)
def test_the_operator_itself_refuses_what_its_kernel_cannot_take(grads, out, message):
    with pytest.raises(ValueError, match=message):
        torch.ops.trak_ext.project_(grads, out, *LAW)
    assert (out == 0).all()


@pytest.mark.parametrize("place", [0, 5])
def test_the_operator_refuses_unknown_names(place):
    law = list(LAW)
    law[place] = "none"
    with pytest.raises(ValueError, match="expected one of"):
        torch.ops.trak_ext.project_([torch.ones(2, 5)], torch.zeros(2, 4), *law)


def test_the_operator_refuses_no_tensors():
    with pytest.raises(ValueError, match="grads: expected at least one tensor"):
        torch.ops.trak_ext.project([], 4, *LAW)


SPARSE = ("sjlt", 5, 6, 7, 0, "high", 4)


def test_opcheck_of_the_sparse_kind():
    grads = [torch.randn(3, 10), torch.randn(3, 4).half()]
    torch.library.opcheck(operators.project, (grads, 16, *SPARSE))
    torch.library.opcheck(operators.project_, (grads, torch.zeros(3, 16), *SPARSE))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_and_vmap_of_the_sparse_kind(dynamic):
    def features(grads):
        return trak_ext.project({"a": grads, "b": grads * 2}, 24, kind="sjlt", nnz=3)

    compiled = torch.compile(features, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (3, 4):
        grads = torch.randn(rows, 50)
        assert torch.equal(compiled(grads), features(grads))
    batched = torch.randn(4, 3, 50)
    expected = torch.stack([features(grads) for grads in batched])
    assert torch.equal(torch.vmap(features)(batched), expected)
    out = torch.ones(4, 3, 24)
    torch.vmap(lambda g, o: trak_ext.project(g, 24, kind="sjlt", nnz=3, out=o))(batched, out)
    alone = torch.stack([trak_ext.project(g, 24, kind="sjlt", nnz=3) for g in batched])
    assert torch.equal(out, 1 + alone)


def test_the_operator_refuses_an_nnz_that_does_not_divide():
    with pytest.raises(ValueError, match="nnz: expected a positive divisor of proj_dim = 4"):
        torch.ops.trak_ext.project([torch.ones(2, 5)], 4, *SPARSE[:-1], 3)


def test_the_first_call_does_not_import_torchs_compiler():
    run_python(
        "import sys, torch, trak_ext\n"
        "before = len(sys.modules)\n"
        "grads = torch.ones(2, 9)\n"
        "trak_ext.project(grads, 4, out=torch.zeros(2, 4))\n"
        "trak_ext.project(grads, 4, kind='sjlt')\n"
        "trak_ext.projection_matrix(3, 4)\n"
        "trak_ext.score(grads, grads)\n"
        "assert 'torch._dynamo' not in sys.modules\n"
        "assert len(sys.modules) - before < 20, sorted(sys.modules)[before:]\n"
    )
