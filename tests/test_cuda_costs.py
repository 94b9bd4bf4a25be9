"""What projections cost by count of the compiled machine code: never more than before.

Counts are of machine code run on the CPU (bench/kernel_counts.py), against those of 0.1.0.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from trak_ext import _C

BENCH = Path(__file__).resolve().parents[1] / "bench"
BEFORE = BENCH / "results" / "machine_code_0.1.0.json"
# At most: issue slots at 64 rows beside those of 0.1.0; the binding pipe's time of 65 rows beside
# that of 64; and of an odd `param_offset` beside an even one.
OF_BEFORE, OF_64_ROWS, OF_EVEN = 1.0, 2.0, 2.4
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
    if "90a" not in _C.cuda_build()["architectures"]:
        pytest.skip("not built for sm_90a")
    sys.path.insert(0, str(BENCH))
    try:
        import machine_code
    finally:
        sys.path.remove(str(BENCH))
    if machine_code.find_cuobjdump() is None:
        pytest.skip("no cuobjdump (the CUDA toolkit and the triton package have one)")
    return machine_code


@pytest.fixture(scope="module")
def kernels(report):
    return report.read_kernels(report.find_cuobjdump(), _C.__file__)


def problem_of(report, path, **rest):
    return report.Problem(90, path, "rademacher", rest.pop("passes", 2), 64, 10**8, 8192, **rest)


@pytest.mark.parametrize("path", ["mma", "wgmma"])
def test_issue_slots_at_64_rows(report, kernels, path):
    problem = problem_of(report, path)
    wanted = dataclasses.asdict(problem)
    before = [
        one["milliseconds"]["issue"]
        for one in json.loads(BEFORE.read_text())["settings"]["times"]
        if all(one[name] == value for name, value in wanted.items())
    ]
    assert len(before) == 1
    now = report.times(kernels, problem)["milliseconds"]["issue"]
    assert now <= OF_BEFORE * before[0] * (1 + 1e-9)


@pytest.mark.parametrize("path", ["mma", "wgmma"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_cost_little_more(report, kernels, path, variant):
    changed, base, limit = VARIANTS[variant]
    problem = problem_of(report, path, **base)
    plain = report.times(kernels, problem)["milliseconds"]
    varied = report.times(kernels, dataclasses.replace(problem, **changed))["milliseconds"]
    assert max(varied.values()) <= limit * max(plain.values()) * (1 + 1e-9)
