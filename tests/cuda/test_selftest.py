"""The known-answer self-test of CUDA paths, against a device that is played on the host.

Faults are planted in that device (cuda_host/runner.h): they give wrong results and no error, as a
GPU would.
"""

from __future__ import annotations

import re

import pytest
import torch

from children import run_python
from cuda_host.double import FAULTS, FewTiles, HostKernels, HostNative
from cuda_host.library import DTYPES
from trak_ext import _C
from trak_ext.kernels import cuda_paths
from trak_ext.kernels.cuda_paths import PathChooser
from trak_ext.known_answers import buffers, projections
from trak_ext.known_answers.cases import run_cases
from trak_ext.known_answers.kernels import is_sparse
from trak_ext.known_answers.quick import CASES, check_quickly
from trak_ext.known_answers.report import check_cases
from trak_ext.known_answers.sparse import sparse_cases
from trak_ext.known_answers.thorough import CASES as THOROUGH

pytestmark = pytest.mark.skipif(
    not hasattr(_C, "cuda_project"), reason="trak_ext was built without CUDA"
)
DEVICE = torch.device("cuda:0")
# Where a fault is planted, and what then has to find it.
PLACES = {
    "wgmma": ("projection", "wgmma"),
    "mma": ("projection", "mma"),
    "plain": ("projection", "plain"),
    "sparse": ("sparse projection", "plain"),
    "sparse matrix": ("sparse projection", "plain"),
    "scoring wgmma": ("scoring", "wgmma"),
    "scoring mma": ("scoring", "mma"),
    "scoring plain": ("scoring", "plain"),
    "scoring plain, fp64": ("scoring in fp64", "plain"),
}
# Faults of what a place does not have: no matrix instruction, descriptor or chunk, no workspace, or
# (scores of fp32 by the plain kernel) no workspace but that of the best.
ABSENT = {
    ("wrong stride", "mma"),
    ("dropped last chunk", "scoring wgmma"),
    *((fault, "sparse matrix") for fault in ("dropped last chunk", "stale workspace")),
    *(
        (fault, place)
        for fault in ("swapped halves", "wrong stride")
        for place in ("plain", "sparse", "sparse matrix")
    ),
    *((fault, "scoring mma") for fault in ("wrong stride", "dropped last chunk")),
    *(
        (fault, place)
        for fault in ("swapped halves", "wrong stride", "dropped last chunk")
        for place in ("scoring plain", "scoring plain, fp64")
    ),
}


@pytest.fixture(scope="module")
def native() -> HostNative:
    return HostNative()


@pytest.fixture
def host(native) -> HostKernels:
    native.faults = {}
    native.calls.clear()
    return HostKernels(native)


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch) -> None:
    for name in ("TRAK_EXT_CUDA_PATH", "TRAK_EXT_CUDA_SELFTEST"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("family", cuda_paths.FAMILIES)
def test_a_healthy_path_passes_in_silence(host, family):
    chooser = PathChooser(lambda device: host, check_quickly)
    for path in cuda_paths.FAMILIES[family]:
        assert chooser.choose(DEVICE, family, path) == path
        tested = len(host.native.calls)
        assert tested > 0
        assert chooser.choose(DEVICE, family, path) == path
        assert len(host.native.calls) == tested  # once a process
        host.native.calls.clear()


@pytest.mark.parametrize(
    ("fault", "place"),
    [(fault, place) for fault in FAULTS for place in PLACES if (fault, place) not in ABSENT],
)
def test_every_planted_fault_is_found(native, fault, place):
    native.faults = {place.removesuffix(", fp64"): FAULTS[fault]}
    family, path = PLACES[place]
    found = check_quickly(FewTiles(native), family, path)
    assert found is not None
    assert "results are wrong" in found or "NaN is said" in found


@pytest.mark.parametrize("fault", ["swapped halves", "missing tail", "wrong sign"])
@pytest.mark.parametrize("path", ["wgmma", "mma"])
def test_faults_in_normal_projections_are_found(native, fault, path):
    native.faults = {path: FAULTS[fault]}
    kernels = FewTiles(native)
    kernels.kind = "normal"
    found = check_quickly(kernels, "projection", path)
    assert found is not None
    assert found.startswith("normal medium, 8 rows")
    assert "results are wrong, the first at [" in found


def test_every_kernel_of_a_path_is_launched_with_every_copy(host):
    # Tiles by the rows that get them: every one of a kind and precision, and more than the largest.
    for path in ("wgmma", "mma"):
        tiles = _C.cuda_kernels(path, 227 * 1024)
        cases = projections.projection_cases(_AllTiles(host.native), path)
        for kind in ("rademacher", "normal"):
            for precision, passes in (("medium", 1), ("high", 2), ("highest", 3)):
                rows = {t["tile_rows"] for t in tiles if (t["kind"], t["passes"]) == (kind, passes)}
                batches = [c.rows for c in cases if (c.kind, c.precision) == (kind, precision)]
                assert rows <= {
                    min((r for r in rows if r >= batch), default=0) for batch in batches
                }
            largest = max(tile["tile_rows"] for tile in tiles if tile["kind"] == kind)
            assert any(c.rows > largest and c.least_workspace for c in cases if c.kind == kind)
            for tile in tiles:
                wide = [c for c in cases if c.kind == kind == tile["kind"]]
                assert all(c.proj_dim % 8 and c.proj_dim > tile["tile_columns"] for c in wide)
        seen = {(dtype, layout) for case in cases for _, dtype, layout in case.grads}
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            assert {layout for found, layout in seen if found == dtype} >= set(projections.LAYOUTS)
    for values in projections.VALUES.values():
        assert values.params % 16


def test_every_kernel_of_the_sparse_kind_is_launched(host):
    with host.native.sparse.noting_launches() as launches:
        run_cases(host, "plain", sparse_cases(host, "plain"))
    names = {launch.kernel for launch in launches}
    sums = {re.search(r"sjlt_sum_kernelILNS_5DTypeE(\d)ELi(\d)EEE", name) for name in names}
    assert {tuple(map(int, found.groups())) for found in sums if found} == {
        (dtype, rows) for dtype in DTYPES.values() for rows in (1, 2, 4, 8)
    }
    # One after each projection, and of one of them after each of 2 x 2 batches and windows.
    assert sum("sjlt_fold_kernel" in launch.kernel for launch in launches) == 11 + 2 * 2
    for kernel in ("group", "fold", "zero", "entry"):
        assert any(f"sjlt_{kernel}_kernel" in name for name in names), kernel


class _AllTiles(HostKernels):
    feature_dtypes = (torch.float32, torch.float16, torch.bfloat16)

    def tiles(self, path):
        return _C.cuda_kernels(path, 227 * 1024)


class _Counting(_AllTiles):
    """Does nothing but count: calls, bytes of buffers, multiply-adds."""

    def __init__(self, native):
        super().__init__(native)
        self.calls = self.multiply_adds = 0

    def project(self, matrix, path, grads, out, *rest, **how):
        self.calls += 1
        entries = matrix.repetitions if is_sparse(matrix) else out.shape[1]
        self.multiply_adds += sum(grad.numel() for grad, _ in grads) * entries

    def fill_matrix(self, *rest):
        self.calls += 1

    def score(self, path, features, solved, *rest):
        self.calls += 1
        self.multiply_adds += solved.numel() * sum(len(phi) for phi in features)

    top_k = score


@pytest.mark.parametrize("family", cuda_paths.FAMILIES)
def test_the_quick_form_is_little_work(host, family):
    # What known_answers says of its cost: a GPU takes at most 40 us a launch (three or so a call
    # and tensor), copies 5 GB/s at worst and multiplies 10^12 numbers a second at worst.
    kernels = _Counting(host.native)
    path = cuda_paths.FAMILIES[family][0]
    cases = CASES[family](kernels, path)
    inputs, outputs = buffers.Memory(), buffers.Memory()
    for case in cases:
        case.reserve(inputs, outputs)
    there, back = inputs.build(kernels), outputs.build(kernels)
    for case in cases:
        case.launch(kernels, path, there, back)
    assert kernels.calls <= 25
    assert kernels.multiply_adds <= 2e9
    assert there.numel() <= 10e6
    assert back.numel() <= 2e6


def test_an_exchange_of_two_entries_breaks_the_normal_bound():
    for name, (params, offset) in projections.VALUES.items():
        base = projections.base_rows(name).double()
        entries = projections.matrix_rows("normal", offset, params, 40).double()
        for step in (1, 2, 4, 8, 16, 128):
            change = (base[:, step:] - base[:, :-step])[..., None] * (
                entries[step:] - entries[:-step]
            )
            # [8, pairs, 40]: some row and column tells, whichever pair it is.
            worst = (change.abs().amax(2) / projections.tolerances(name)).amax(0)
            assert worst.min() > 1, (name, step)


@pytest.mark.parametrize("path", ["wgmma", "mma", "plain"])
def test_the_long_form_on_a_played_device(native, path):
    native.faults = {}
    kernels = FewTiles(native)
    cases = THOROUGH["projection"](kernels, path)
    assert len(cases) > 16
    checks = check_cases(kernels, "projection", path, cases[1::3])
    assert [check.problem for check in checks if check.problem is not None] == []
    native.faults = {path: FAULTS["missing tail"]}
    checks = check_cases(kernels, "projection", path, cases[2:5], "on a late stream, ")
    assert all(check.problem.startswith("on a late stream, rademacher ") for check in checks)
    assert {check.device for check in checks} == {"cuda:0 (played on the host)"}


@pytest.mark.parametrize("path", ["wgmma", "mma", "plain"])
def test_the_long_form_of_scores_on_a_played_device(native, path):
    native.faults = {}
    kernels = HostKernels(native)
    cases = [case for case in THOROUGH["scoring"](kernels, path) if case.samples < 1000]
    checks = check_cases(kernels, "scoring", path, cases[-12:])
    assert [check.problem for check in checks if check.problem is not None] == []


# --- On a GPU -------------------------------------------------------------------------------------

device = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device that torch and this build can use"
)


@device
def test_every_path_of_this_device_passes():
    kernels = cuda_paths._kernels_of(torch.device("cuda", torch.cuda.current_device()))
    best = _C.cuda_projection_path(kernels.device.index)
    for family, paths in cuda_paths.FAMILIES.items():
        for path in paths:
            if cuda_paths.PATHS.index(path) >= cuda_paths.PATHS.index(best):
                assert check_quickly(kernels, family, path) is None, (family, path)


@device
def test_a_first_use_in_a_graph_is_captured_and_tested_afterwards():
    run_python(
        """
import torch, trak_ext
from trak_ext.kernels.cuda_paths import CHOOSER
grads = torch.randn(5, 3000, device="cuda")
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    captured = trak_ext.project(grads, 256)
assert not CHOOSER._verdicts
graph.replay()
expected = trak_ext.project(grads, 256)
assert list(CHOOSER._verdicts.values()) == [None]
assert torch.equal(captured, expected)
"""
    )
