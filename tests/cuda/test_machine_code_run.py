"""Machine code of the compiled kernels (sm_80, sm_90a), run on the CPU, makes the right sums.

Beside the kernels' source (test_host_projection.py) this covers what the compiler made of it:
inline PTX, registers, descriptors, addresses (bench/sass/machine.py). What it cannot show is times,
and orders of memory.
"""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
import torch

from trak_ext import _C, reference

PATHS = [(80, "mma"), (90, "mma"), (90, "wgmma")]


@pytest.fixture(scope="module")
def counts():
    import kernel_counts

    return kernel_counts


@pytest.fixture(scope="module")
def kernels(counts):
    if not hasattr(_C, "cuda_kernels"):
        pytest.skip("trak_ext was built without CUDA")
    import cuda_binary

    cuobjdump = cuda_binary.find_cuobjdump()
    if cuobjdump is None:
        pytest.skip("no cuobjdump (the CUDA toolkit and the triton package have one)")
    found = cuda_binary.read_kernels(cuobjdump, _C.__file__)
    return {(kernel.arch, kernel.name): kernel for kernel in found}


@pytest.fixture(params=PATHS, ids=lambda pair: f"sm_{pair[0]}-{pair[1]}")
def path(request):
    return request.param


def kernels_of(kernels, problem):
    """Return an architecture's kernels by name."""
    named = {name: kernel for (arch, name), kernel in kernels.items() if arch == problem.arch}
    if not named or (problem.path == "wgmma" and "90a" not in _C.cuda_build()["architectures"]):
        pytest.skip(f"not built for sm_{problem.arch}")
    return named


def check(counts, named, problem, dtype=torch.float32) -> None:
    """Compare with fp64: to the bit for signs, else to fp32's tolerance."""
    grads = torch.randint(-100, 101, (problem.batch, problem.params)).to(dtype)
    raw = grads.view(torch.int16) if dtype == torch.bfloat16 else grads
    got = counts.run_problem(named, problem, raw.numpy()).astype(np.float64)
    entries = reference.projection_matrix(
        problem.params, problem.proj_dim, kind=problem.kind, param_offset=problem.param_offset
    ).astype(np.float64)
    exact = grads.double().numpy() @ entries
    if problem.kind == "rademacher":
        assert np.array_equal(got, exact)
    else:
        bound = 2.0**-21 * (np.abs(grads.double().numpy()) @ np.abs(entries))
        assert (np.abs(got - exact) <= bound).all()


@pytest.mark.parametrize("kind", ["rademacher", "normal"])
@pytest.mark.parametrize("passes", [1, 2, 3])
@pytest.mark.parametrize("rows", [8, 33])
def test_the_machine_code_projects(counts, kernels, kind, path, passes, rows):
    problem = counts.Problem(*path, kind, passes, rows, 530, 40)
    check(counts, kernels_of(kernels, problem), problem)


@pytest.mark.parametrize("dtype", ["fp64", "fp16", "bf16"])
@pytest.mark.parametrize("param_offset", [8, 509])
def test_the_machine_code_reads_every_dtype_and_alignment(
    counts, kernels, path, dtype, param_offset
):
    passes = {"fp64": 2, "fp16": 2, "bf16": 1}[dtype]
    torch_dtype = {"fp64": torch.float64, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    problem = counts.Problem(
        *path, "rademacher", passes, 18, 530, 20, dtype=dtype, param_offset=param_offset
    )
    check(counts, kernels_of(kernels, problem), problem, torch_dtype)


# What is looked for in instructions, what is put in its place, and whether in all or in the first.
FAULTS = {
    "another logic function": (r"(LOP3\.LUT .*), 0xae,", r"\1, 0xea,", True),
    "halves swapped": (
        r"(F2FP\.BF16(?:\.F32)?\.PACK_AB(?:\.RZ)? R\d+), (.*), (.*)$",
        r"\1, \3, \2",
        True,
    ),
    "a matrix instruction left out": (r"HG?MMA.*", "NOP", False),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_planted_in_the_machine_code_are_seen(counts, kernels, path, fault):
    pattern, instead, everywhere = FAULTS[fault]
    problem = counts.Problem(*path, "rademacher", 2, 8, 530, 20)
    named = kernels_of(kernels, problem)
    doctored, planted = dict(named), 0
    for name in {launch.kernel for launch in counts.launches_of(problem)}:
        code = list(named[name].code)
        places = [i for i, (_, text) in enumerate(code) if re.search(pattern, text)]
        for i in places if everywhere else places[:1]:
            code[i] = (code[i][0], re.sub(pattern, instead, code[i][1]))
        doctored[name] = dataclasses.replace(named[name], code=code)
        planted += code != named[name].code
    assert planted
    with pytest.raises(AssertionError):
        check(counts, doctored, problem)
