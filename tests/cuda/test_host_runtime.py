"""What the CUDA part asks of the runtime and the driver, run with doubles of them."""

from __future__ import annotations

import ctypes
import itertools
import shutil

import pytest

from cuda_host.builds import HOST, SOURCES, compile_host

HEADERS = ("shared_limit.h", "current_device.h")


class LaunchCounts(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("refused", "lowered", "found", "raised")]


class DriverState(ctypes.Structure):
    _fields_ = [(n, ctypes.c_int) for n in ("context", "ours", "torchs", "mode", "contexts")]

    @property
    def torchs_device(self) -> int:
        return self.torchs if self.context == 0 else (self.context - 1) % 10


def build(folder, headers) -> ctypes.CDLL:
    library = folder / "runtime_host.so"
    compile_host([f"-I{headers}", "-pthread", str(HOST / "runtime_host.cpp"), "-o", str(library)])
    return ctypes.CDLL(str(library))


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return build(tmp_path_factory.mktemp("runtime"), SOURCES / "cuda" / "device")


def build_with_fault(folder, header: str, *replacements: tuple[str, str]) -> ctypes.CDLL:
    for name in HEADERS:
        shutil.copy(SOURCES / "cuda" / "device" / name, folder)
    text = (folder / header).read_text()
    for before, after in replacements:
        assert text.count(before) == 1
        text = text.replace(before, after)
    (folder / header).write_text(text)
    return build(folder, folder)


# More kernels than there are lists of them.
THREADS, KERNELS, DEVICES = 8, 300, 3


def launch_faults(library) -> set[str]:
    """Launch from many threads; return what went wrong."""
    counts = LaunchCounts()
    library.host_launches(THREADS, KERNELS, DEVICES, ctypes.byref(counts))
    pairs = KERNELS * DEVICES
    wrong = {"refused": counts.refused > 0, "lowered": counts.lowered > 0}
    wrong["asked again"] = counts.found != pairs
    # Three of the sizes are above what a kernel has from the beginning.
    wrong["raised in vain"] = not pairs <= counts.raised <= 3 * pairs
    return {name for name, found in wrong.items() if found}


def test_many_threads_launch_with_shared_memory_of_any_size(library):
    assert launch_faults(library) == set()


WITHOUT_LOCK = (
    "if (known != nullptr && bytes <= known->limit.load(std::memory_order_acquire)) return;",
    "(void)known;",
)
BEHIND_LOCK = ("if (bytes <= entry->limit.load(std::memory_order_relaxed)) return;", "")
LAUNCH_FAULTS = {
    "set for every launch, as before": (
        (WITHOUT_LOCK, BEHIND_LOCK),
        {"refused", "lowered", "raised in vain"},
    ),
    "not looked at again behind the lock": ((BEHIND_LOCK,), {"lowered"}),
    "one limit for all devices": (
        (("entry->device != device", "device < 0"),),
        {"refused", "asked again"},
    ),
    "one limit for all kernels": (
        (("entry->kernel != kernel", "kernel == nullptr"),),
        {"refused", "asked again"},
    ),
    "raised and forgotten": (
        (("entry->limit.store(bytes, std::memory_order_release);", ""),),
        {"raised in vain"},
    ),
}


@pytest.mark.parametrize("fault", LAUNCH_FAULTS)
def test_faults_of_the_limit_are_caught(fault, tmp_path):
    replacements, expected = LAUNCH_FAULTS[fault]
    library = build_with_fault(tmp_path, "shared_limit.h", *replacements)
    assert expected <= launch_faults(library)


def driver_faults(library) -> set[str]:
    """Make each device current in each state of a thread; return what went wrong."""
    found = set()
    # No context, a primary one, one of another kind; two devices, of which some are in use.
    for context, ours, torchs, mode, contexts, device in itertools.product(
        (0, 1, 2, 11, 12), (0, 1), (0, 1), (0, 1), range(4), (0, 1)
    ):
        if context in (1, 2) and not contexts >> (context - 1) & 1:
            continue  # a primary context that is current exists
        state = DriverState(context, ours, torchs, mode, contexts)
        meanwhile, torchs_device = DriverState(), state.torchs_device
        library.host_make_current(ctypes.byref(state), device, ctypes.byref(meanwhile))
        wrong = {
            "another device": meanwhile.context not in (1 + device, 11 + device),
            "another context of the device": (
                context == 11 + device and meanwhile.context != context
            ),
            "not relaxed": meanwhile.mode != 2,
            "a context that nobody uses": state.contexts & ~(contexts | 1 << device) != 0,
            "another context afterwards": state.context != context,
            "another device of torch's": state.torchs_device != torchs_device,
            "another mode afterwards": state.mode != mode,
        }
        found |= {name for name, is_wrong in wrong.items() if is_wrong}
    return found


def test_a_call_leaves_no_context_and_no_trace_on_other_devices(library):
    assert driver_faults(library) == set()


DRIVER_FAULTS = {
    "the device put back by its number, as before": (
        "Driver::set_context(before_)",
        "Driver::set_device(0)",
        {"a context that nobody uses", "another device of torch's"},
    ),
    "nothing put back": (
        "if (changed_) Driver::set_context(before_);",
        "",
        {"another context afterwards", "another device of torch's"},
    ),
    "a device without a context taken for current": (
        "before_ != nullptr && Driver::device()",
        "Driver::device()",
        {"another device"},
    ),
    "a context of the device replaced": (
        "if (before_ != nullptr && Driver::device() == device) return;",
        "",
        {"another context of the device"},
    ),
    "capture not relaxed": (
        "exchange_capture_mode(Driver::kRelaxed)",
        "exchange_capture_mode(0)",
        {"not relaxed"},
    ),
    "capture left relaxed": (
        "~RelaxedCapture() { (void)Driver::exchange_capture_mode(before); }",
        "~RelaxedCapture() {}",
        {"another mode afterwards"},
    ),
}


@pytest.mark.parametrize("fault", DRIVER_FAULTS)
def test_faults_of_the_device_are_caught(fault, tmp_path):
    before, after, expected = DRIVER_FAULTS[fault]
    library = build_with_fault(tmp_path, "current_device.h", (before, after))
    assert expected <= driver_faults(library)
