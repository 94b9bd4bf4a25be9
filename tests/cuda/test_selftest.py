"""The known-answer self-test of CUDA paths, against a device that is played on the host.

Faults are planted in that device (cuda_host/runner.h): they give wrong results and no error, as a
GPU would.
"""

from __future__ import annotations

import math
import os
import re
import threading
import warnings

import pytest
import torch

from children import run_python
from cuda_host.double import FAULTS, HostKernels, HostNative
from cuda_host.library import DTYPES, FEW_PASSES
from trak_ext import _C
from trak_ext.kernels import cuda_paths
from trak_ext.kernels.cuda_paths import CudaSelfTestWarning, PathChooser, default_path
from trak_ext.known_answers import buffers, projections
from trak_ext.known_answers.cases import run_cases
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


class FewTiles(HostKernels):
    """Of a path only the smallest tile of one kind, and what its remainder gets: sooner done."""

    kind = "rademacher"

    def tiles(self, path):
        return [
            tile
            for tile in super().tiles(path)
            if (tile["kind"], tile["tile_rows"]) == (self.kind, 8)
            and tile["passes"] == FEW_PASSES[self.kind]
        ]


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

    def project(self, path, grads, out, *rest):
        self.calls += 1
        self.multiply_adds += sum(grad.numel() for grad, _ in grads) * out.shape[1]

    def fill_matrix(self, *rest):
        self.calls += 1

    def project_sparse(self, grads, out, law, *rest):
        self.calls += 1
        self.multiply_adds += sum(grad.numel() for grad, _ in grads) * law[1]

    fill_sparse_matrix = fill_matrix

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
        entries = torch.empty(params, 40)
        law = projections.law_of("normal")
        _C.fill_matrix(*law, offset, params, 40, entries.data_ptr(), 1)
        entries = entries.double()
        for step in (1, 2, 4, 8, 16, 128):
            change = (base[:, step:] - base[:, :-step])[..., None] * (
                entries[step:] - entries[:-step]
            )
            # [8, pairs, 40]: some row and column tells, whichever pair it is.
            worst = (change.abs().amax(2) / projections.tolerances(name)).amax(0)
            assert worst.min() > 1, (name, step)


def test_a_failing_path_falls_back_and_warns_once(native):
    native.faults = {"wgmma": FAULTS["swapped halves"]}
    native.calls.clear()
    chooser = PathChooser(lambda device: FewTiles(native), check_quickly)
    with pytest.warns(CudaSelfTestWarning) as caught:
        assert chooser.choose(DEVICE, "projection", "wgmma") == "mma"
    assert len(caught) == 1
    message = str(caught[0].message)
    assert message.startswith(
        "trak_ext: the known-answer self-test of projection found that on cuda:0 (played on the "
        "host) the path wgmma failed (rademacher high, "
    )
    assert message.endswith("; mma is used instead, from now on")
    assert "\n" not in message
    tested = len(native.calls)
    assert chooser.choose(DEVICE, "projection", "wgmma") == "mma"
    assert chooser.choose(DEVICE, "projection", "mma") == "mma"
    assert len(native.calls) == tested


def test_paths_are_tested_in_turn_until_none_is_left(native):
    native.faults = {"wgmma": RuntimeError("CUDA: the launch of a kernel failed: trap"), "mma": 4}
    chooser = PathChooser(lambda device: FewTiles(native), check_quickly)
    with pytest.warns(CudaSelfTestWarning, match="the launch of a kernel failed") as caught:
        assert chooser.choose(DEVICE, "projection", "wgmma") == "plain"
    assert len(caught) == 1
    assert "; mma failed (rademacher" in str(caught[0].message)
    native.faults["plain"] = FAULTS["missing tail"]
    chooser = PathChooser(lambda device: FewTiles(native), check_quickly)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"plain failed .*; nothing was computed"):
            chooser.choose(DEVICE, "projection", "wgmma")


def test_scoring_falls_back_too(native):
    fault = FAULTS["stale workspace"]
    native.faults = {"scoring wgmma": fault, "scoring mma": fault}
    chooser = PathChooser(lambda device: HostKernels(native), check_quickly)
    said = r"of scoring found .* path wgmma failed .*; mma failed .*; plain is used instead"
    with pytest.warns(CudaSelfTestWarning, match=said):
        assert chooser.choose(DEVICE, "scoring", "wgmma") == "plain"


def test_a_failing_sparse_kind_computes_nothing(native):
    native.faults = {"sparse": FAULTS["wrong sign"]}
    chooser = PathChooser(lambda device: HostKernels(native), check_quickly)
    with pytest.raises(RuntimeError, match=r"plain failed \(sjlt, .*; nothing was computed"):
        chooser.choose(DEVICE, "sparse projection", "plain")


def chooser_of(wrong: set[str], checked: list[str], kernels: object = None) -> PathChooser:
    """Return a chooser whose self-test only says that some paths are wrong."""

    def check(kernels, family, path):
        checked.append(path)
        return "1 of 1 results are wrong" if path in wrong else None

    class Kernels:
        capturing = False

        def describe(self):
            return "cuda:0 (some GPU)"

        def is_capturing(self):
            return self.capturing

    kernels = kernels or Kernels()
    return PathChooser(lambda device: kernels, check)


def test_error_raises_and_off_does_not_test(monkeypatch):
    checked: list[str] = []
    chooser = chooser_of({"wgmma", "mma"}, checked)
    monkeypatch.setenv("TRAK_EXT_CUDA_SELFTEST", "error")
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"the path wgmma failed .*; nothing was computed"):
            chooser.choose(DEVICE, "projection", "wgmma")
    assert checked == ["wgmma"]
    monkeypatch.setenv("TRAK_EXT_CUDA_SELFTEST", "off")
    assert chooser.choose(DEVICE, "projection", "mma") == "mma"
    assert checked == ["wgmma"]
    monkeypatch.setenv("TRAK_EXT_CUDA_SELFTEST", "warn")
    with pytest.warns(CudaSelfTestWarning):
        assert chooser.choose(DEVICE, "projection", "wgmma") == "plain"
    monkeypatch.setenv("TRAK_EXT_CUDA_SELFTEST", "loud")
    with pytest.raises(
        ValueError, match="TRAK_EXT_CUDA_SELFTEST: expected off, warn or error, got loud"
    ):
        chooser.choose(DEVICE, "projection", "wgmma")


def test_nothing_is_tested_while_a_graph_is_captured(host):
    checked: list[str] = []
    chooser = chooser_of({"mma"}, checked, host)
    host.capturing = True
    assert chooser.choose(DEVICE, "projection", "mma") == "mma"
    assert not checked
    host.capturing = False
    with pytest.warns(CudaSelfTestWarning):
        assert chooser.choose(DEVICE, "projection", "mma") == "plain"
    host.capturing = True
    assert chooser.choose(DEVICE, "projection", "mma") == "plain"  # known by now
    assert checked == ["mma", "plain"]


def test_each_device_is_tested_for_itself():
    checked: list[str] = []
    chooser = chooser_of(set(), checked)
    for index in (0, 1, 1, 0):
        chooser.choose(torch.device("cuda", index), "projection", "mma")
    assert checked == ["mma", "mma"]


def test_threads_share_one_test():
    checked: list[str] = []
    started, release = threading.Event(), threading.Event()

    def check(kernels, family, path):
        started.set()
        assert release.wait(30)
        checked.append(path)

    chooser = PathChooser(lambda device: chooser_kernels, check)
    chooser_kernels = HostKernels(None)
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda: found.append(chooser.choose(DEVICE, "projection", "mma")))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    assert started.wait(30)
    release.set()
    for thread in threads:
        thread.join()
    assert found == ["mma"] * 4
    assert checked == ["mma"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_child_tests_for_itself(monkeypatch):
    # The parent forks while another thread is in the middle of a test and holds the lock.
    started, release = threading.Event(), threading.Event()

    def check(kernels, family, path):
        if not in_child:
            started.set()
            assert release.wait(30)

    in_child = False
    kernels = HostKernels(None)
    chooser = cuda_paths.CHOOSER
    monkeypatch.setattr(chooser, "_kernels_of", lambda device: kernels)
    monkeypatch.setattr(chooser, "_check", check)
    thread = threading.Thread(target=chooser.choose, args=(DEVICE, "projection", "mma"))
    thread.start()
    assert started.wait(30)
    child = os.fork()
    if child == 0:
        in_child = True
        os._exit(0 if chooser.choose(DEVICE, "projection", "mma") == "mma" else 1)
    release.set()
    thread.join()
    try:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        chooser.forget()


def test_running_out_of_memory_is_no_failure():
    def check(kernels, family, path):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    chooser = PathChooser(lambda device: HostKernels(None), check)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        chooser.choose(DEVICE, "projection", "mma")
    chooser._check = lambda kernels, family, path: None
    assert chooser.choose(DEVICE, "projection", "mma") == "mma"


def test_the_callers_modes_do_not_reach_the_test(native):
    native.faults = {}
    before = torch.random.get_rng_state()
    chooser = PathChooser(lambda device: FewTiles(native), check_quickly)

    def first_use(x):
        assert chooser.choose(DEVICE, "projection", "mma") == "mma"
        return x

    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"), torch.inference_mode():
            torch.vmap(first_use)(torch.ones(3, device="cpu"))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_test_runs_outside_the_callers_modes():
    seen = []

    def check(kernels, family, path):
        seen.append((torch.empty(0).device.type, torch.is_inference_mode_enabled()))

    chooser = PathChooser(lambda device: HostKernels(None), check)
    with torch.device("meta"), torch.inference_mode():
        chooser.choose(DEVICE, "projection", "mma")
    assert seen == [("cpu", False)]


def test_a_warning_that_is_an_error_leaves_the_fallback_in_place():
    chooser = chooser_of({"wgmma"}, [])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(CudaSelfTestWarning):
            chooser.choose(DEVICE, "projection", "wgmma")
        assert chooser.choose(DEVICE, "projection", "wgmma") == "mma"


def test_a_table_says_which_path_is_the_default(monkeypatch):
    # As measured on an H200: wgmma from nine rows on.
    for rows, path in ((1, "mma"), (8, "mma"), (9, "wgmma"), (1000, "wgmma")):
        assert default_path("wgmma", 90, rows) == path
        assert default_path("mma", 90, rows) == "mma"  # a build without code for sm_90a
        assert default_path("plain", 90, rows) == "plain"  # a build without code for sm_80 and up
        assert default_path("mma", 100, rows) == "mma"
    monkeypatch.setitem(cuda_paths.DEFAULT_PATHS, 90, ((math.inf, "mma"),))
    assert default_path("wgmma", 90, 1000) == "mma"


def test_the_path_can_be_asked_for(monkeypatch):
    monkeypatch.setattr(cuda_paths, "_facts", lambda index: ("wgmma", 90))
    monkeypatch.setattr(cuda_paths, "CHOOSER", chooser_of(set(), []))
    assert cuda_paths.projection_path(DEVICE, 64) == "wgmma"
    assert cuda_paths.projection_path(DEVICE, 8) == "mma"
    assert cuda_paths.scoring_path(DEVICE, torch.float32) == "wgmma"
    for path in cuda_paths.PATHS:
        monkeypatch.setenv("TRAK_EXT_CUDA_PATH", path)
        assert cuda_paths.projection_path(DEVICE, 64) == path
        assert cuda_paths.scoring_path(DEVICE, torch.float32) == path
        assert cuda_paths.scoring_path(DEVICE, torch.float64) == "plain"
    monkeypatch.setenv("TRAK_EXT_CUDA_PATH", "")
    assert cuda_paths.projection_path(DEVICE, 64) == "wgmma"
    monkeypatch.setenv("TRAK_EXT_CUDA_PATH", "wgmma")
    monkeypatch.setattr(cuda_paths, "_facts", lambda index: ("mma", 80))
    with pytest.raises(
        ValueError,
        match="TRAK_EXT_CUDA_PATH: expected plain or mma for this device and build, got wgmma",
    ):
        cuda_paths.projection_path(DEVICE, 64)
    monkeypatch.delenv("TRAK_EXT_CUDA_PATH")
    assert cuda_paths.scoring_path(DEVICE, torch.float32) == "mma"


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
