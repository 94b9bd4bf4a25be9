"""Which kernels a call on a CUDA device takes: chosen here, in one place, before every call.

What the build and the device have, the table below, TRAK_EXT_CUDA_PATH and the known-answer
self-test decide. A path that is about to be used for the first time on a device is first made to
solve small problems whose answers are known (`known_answers`); if it gets one wrong, or cannot be
launched, the next path takes its place, with one warning. (After a kernel that reads where it may
not, CUDA gives the process no second try: then no path passes, and the call raises.)

    TRAK_EXT_CUDA_PATH       plain (for scores too), mma or wgmma; default: the table's.
    TRAK_EXT_CUDA_SELFTEST   warn (default): fall back and warn; error: raise; off: do not test.
"""

from __future__ import annotations

import functools
import math
import os
import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch

from .. import _C

# The fastest first: each falls back to the next.
PATHS = ("wgmma", "mma", "plain")
# What is chosen and tested apart, and the paths that each has. A kind of matrix with a kernel of
# its own is a family of its own: a line here and a function in known_answers/quick.py.
FAMILIES = {
    "projection": PATHS,
    "projection matrix": ("plain",),
    "sparse projection": ("plain",),
    "scoring": PATHS,
    "scoring in fp64": ("plain",),
}
# Projections by compute capability: the path of batches up to so many rows, in order. Others take
# the best that the build has for them.
#
# sm_90: as measured on an H200 (docs/gpu.md). Two paths in one table keep what is promised of a
# row's bits only where both paths' bits agree on any fp32 gradients: they do there, and
# tests/cuda/test_device.py asks.
DEFAULT_PATHS: dict[int, tuple[tuple[float, str], ...]] = {
    90: ((8, "mma"), (math.inf, "wgmma")),
}
MODES = ("off", "warn", "error")


class CudaSelfTestWarning(RuntimeWarning):
    """A CUDA path failed its known-answer self-test, and another one is used in its place."""


def default_path(best: str, capability: int, rows: int) -> str:
    """Return the table's path for a batch, where the build has `best` and those after it."""
    for limit, path in DEFAULT_PATHS.get(capability, ()):
        if rows <= limit:
            return PATHS[max(PATHS.index(path), PATHS.index(best))]
    return best


def asked_path(best: str) -> str | None:
    """Return what TRAK_EXT_CUDA_PATH asks for, None for nothing."""
    asked = os.environ.get("TRAK_EXT_CUDA_PATH")
    if not asked:
        return None
    known = PATHS[PATHS.index(best) :][::-1]
    if asked not in known:
        raise ValueError(
            f"TRAK_EXT_CUDA_PATH: expected {_either(known)} for this device and build, got {asked}"
        )
    return asked


def selftest_mode() -> str:
    """Return what TRAK_EXT_CUDA_SELFTEST says: "off", "warn" or "error"."""
    mode = os.environ.get("TRAK_EXT_CUDA_SELFTEST") or "warn"
    if mode not in MODES:
        raise ValueError(f"TRAK_EXT_CUDA_SELFTEST: expected {_either(MODES)}, got {mode}")
    return mode


def _either(names: tuple[str, ...]) -> str:
    return " or ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


class PathChooser:
    """The paths of a process, each tested when a device first uses it.

    Args:
        kernels_of: Gives what is tested on a device, see `known_answers.kernels.DeviceKernels`.
        check: The self-test: of (kernels, family, path) it returns what is wrong, None for nothing.
    """

    def __init__(
        self,
        kernels_of: Callable[[torch.device], Any],
        check: Callable[[Any, str, str], str | None],
    ) -> None:
        self._kernels_of = kernels_of
        self._check = check
        # (device, family, path): what was wrong, None for nothing. Written under the lock alone.
        self._verdicts: dict[tuple[int, str, str], str | None] = {}
        self._lock = threading.Lock()

    def forget(self) -> None:
        """Start anew, in a forked child: another thread of the parent may hold the lock."""
        self._verdicts = {}
        self._lock = threading.Lock()

    def choose(self, device: torch.device, family: str, wanted: str) -> str:
        """Return the path to take where `wanted` is preferred: it, or the next that works.

        A path that was not tested yet is tested now, unless the current stream is being captured
        into a graph: then it is taken as it is, and tested by the next call outside.
        """
        mode = selftest_mode()
        if mode == "off":
            return wanted
        key = (device.index or 0, family, wanted)
        if self._verdicts.get(key, "untested") is None:
            return wanted
        kernels = self._kernels_of(device)
        paths = FAMILIES[family]
        candidates = paths[paths.index(wanted) :]
        if kernels.is_capturing():
            known = [p for p in candidates if not self._verdicts.get((*key[:2], p))]
            return known[0] if known else wanted
        with self._lock:
            failed, is_news = [], False
            for path in candidates:
                is_news |= (*key[:2], path) not in self._verdicts
                problem = self._verdict(kernels, key[0], family, path)
                if problem is None:
                    break
                failed.append(f"{path} failed ({problem})")
                if mode == "error":
                    break
        sentence = (
            f"trak_ext: the known-answer self-test of {family} found that on {kernels.describe()} "
            f"the path {'; '.join(failed)}"
        )
        if len(failed) == len(candidates) or (failed and mode == "error"):
            raise RuntimeError(f"{sentence}; nothing was computed")
        if failed and is_news:
            warnings.warn(
                f"{sentence}; {path} is used instead, from now on",
                CudaSelfTestWarning,
                stacklevel=2,
            )
        return path

    def _verdict(self, kernels: Any, index: int, family: str, path: str) -> str | None:
        key = (index, family, path)
        if key not in self._verdicts:
            self._verdicts[key] = run_apart(lambda: self._check(kernels, family, path))
        return self._verdicts[key]


def run_apart(call: Callable[[], Any]) -> Any:
    """Return what `call` does in a thread of its own.

    The modes of the caller's thread (vmap, autocast, a default device, inference mode, the current
    device and stream) would reach it otherwise.
    """
    outcome: list[Any] = []

    def body() -> None:
        try:
            outcome.extend([call(), None])
        except BaseException as error:
            outcome.extend([None, error])

    thread = threading.Thread(target=body, name="trak_ext self-test")
    thread.start()
    thread.join()
    result, error = outcome
    if error is not None:
        raise error
    return result


def _kernels_of(device: torch.device) -> Any:
    from ..known_answers.kernels import DeviceKernels

    return DeviceKernels(device)


def _check(kernels: Any, family: str, path: str) -> str | None:
    from ..known_answers.quick import check_quickly

    return check_quickly(kernels, family, path)


CHOOSER = PathChooser(_kernels_of, _check)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=CHOOSER.forget)


@functools.cache
def _facts(index: int) -> tuple[str, int]:
    """Return the best path that the build has for a device, and its compute capability."""
    major, minor = torch.cuda.get_device_capability(index)
    return _C.cuda_projection_path(index), 10 * major + minor


def projection_path(device: torch.device, rows: int) -> str:
    """Return the path of a projection of `rows` gradients on a CUDA device."""
    device = _with_index(device)
    best, capability = _facts(device.index)
    wanted = asked_path(best) or default_path(best, capability, rows)
    return CHOOSER.choose(device, "projection", wanted)


def check_matrix(device: torch.device) -> None:
    """Test the kernel that fills in the matrix, if the device uses it for the first time."""
    CHOOSER.choose(_with_index(device), "projection matrix", "plain")


def check_sparse(device: torch.device) -> None:
    """Test the kernels of the sparse kind, if the device uses them for the first time."""
    CHOOSER.choose(_with_index(device), "sparse projection", "plain")


def scoring_path(device: torch.device, dtype: torch.dtype) -> str:
    """Return the path of scores of a dtype (fp64 or fp32) on a CUDA device."""
    device = _with_index(device)
    best, _ = _facts(device.index)
    asked = asked_path(best)
    if dtype == torch.float64:
        return CHOOSER.choose(device, "scoring in fp64", "plain")
    return CHOOSER.choose(device, "scoring", asked or best)


def _with_index(device: torch.device) -> torch.device:
    if device.index is not None:
        return device
    return torch.device(device.type, torch.cuda.current_device())
