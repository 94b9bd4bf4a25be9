"""When CUDA paths are tested, once a device and process, and what replaces a failing one.

The device is played on the host, where one is needed, and faults are planted in it.
"""

from __future__ import annotations

import math
import os
import threading
import warnings

import pytest
import torch

from cuda_host.double import FAULTS, FewTiles, HostKernels, HostNative
from trak_ext import _C
from trak_ext.kernels import cuda_paths
from trak_ext.kernels.cuda_paths import CudaSelfTestWarning, PathChooser, default_path
from trak_ext.known_answers.quick import check_quickly

pytestmark = pytest.mark.skipif(
    not hasattr(_C, "cuda_project"), reason="trak_ext was built without CUDA"
)
DEVICE = torch.device("cuda:0")


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
