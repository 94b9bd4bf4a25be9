"""What projections cost by count of the compiled machine code, beside limits and what it was.

Counts are of machine code run on the CPU (bench/kernel_counts.py), against those of 0.1.0.
"""

from __future__ import annotations

import dataclasses
import functools
import json

import pytest

from folders import BENCH
from trak_ext import _C

BEFORE = {
    80: BENCH / "results" / "machine_code_0.1.0_sm_80.json",
    90: BENCH / "results" / "machine_code_0.1.0.json",
}
PATHS = [(80, "mma"), (90, "mma"), (90, "wgmma")]
# At most: issue slots at 64 rows beside those of 0.1.0; the binding pipe's time of 65 rows beside
# that of 64; and of an odd `param_offset` beside an even one.
OF_BEFORE, OF_64_ROWS, OF_EVEN = 0.75, 1.4, 1.2
VARIANTS = {
    "65 rows": ({"batch": 65}, {}, OF_64_ROWS),
    "fp32": ({"param_offset": 1}, {}, OF_EVEN),
    "fp16": ({"param_offset": 1}, {"dtype": "fp16"}, OF_EVEN),
    "bf16": ({"param_offset": 1}, {"dtype": "bf16", "passes": 1}, OF_EVEN),
}


@pytest.fixture(scope="module")
def report():
    if not hasattr(_C, "cuda_kernels"):
        pytest.skip("trak_ext was built without CUDA")
    import machine_code

    if machine_code.find_cuobjdump() is None:
        pytest.skip("no cuobjdump (the CUDA toolkit and the triton package have one)")
    return machine_code


@pytest.fixture(scope="module")
def kernels(report):
    return report.read_kernels(report.find_cuobjdump(), _C.__file__)


@pytest.fixture(scope="module")
def milliseconds(report, kernels):
    return functools.cache(lambda problem: report.times(kernels, problem)["milliseconds"])


@pytest.fixture(params=PATHS, ids=lambda pair: f"sm_{pair[0]}-{pair[1]}")
def path(report, kernels, request):
    arch, name = request.param
    if name not in report.paths_of(kernels, arch):
        pytest.skip(f"not built for sm_{arch}{'a' if name == 'wgmma' else ''}")
    return request.param


def problem_of(report, path, **rest):
    limit, passes = report.SHARED_LIMITS[path[0]], rest.pop("passes", 2)
    shape = (64, 10**8, 8192)
    return report.Problem(*path, "rademacher", passes, *shape, shared_limit=limit, **rest)


def test_issue_slots_at_64_rows(report, milliseconds, path):
    problem = problem_of(report, path)
    wanted = dataclasses.asdict(problem)
    before = [
        one["milliseconds"]["issue"]
        for one in json.loads(BEFORE[problem.arch].read_text())["settings"]["times"]
        if all(one[name] == value for name, value in wanted.items())
    ]
    assert len(before) == 1
    now = milliseconds(problem)["issue"]
    assert now <= OF_BEFORE * before[0], now / before[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_cost_little_more(report, milliseconds, path, variant):
    changed, base, wanted = VARIANTS[variant]
    problem = problem_of(report, path, **base)
    plain = milliseconds(problem)
    varied = milliseconds(dataclasses.replace(problem, **changed))
    ratio = max(varied.values()) / max(plain.values())
    assert ratio <= wanted
