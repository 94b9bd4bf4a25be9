"""The device guard over doubles of the runtime and of the driver's library.

Needs the headers of a CUDA toolkit. What it is to do in which state: test_host_runtime.py.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from children import run_python
from cuda_host.builds import HOST, SOURCES, compile_host

INSUFFICIENT_DRIVER, OTHER_ERROR = 35, 999
THREAD_LOCAL, RELAXED = 1, 2


def find_headers() -> str | None:
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    homes.append(nvcc and str(Path(nvcc).resolve().parents[1]))
    folders = [f"{home}/include" for home in homes if home]
    return next((folder for folder in folders if Path(folder, "cuda.h").exists()), None)


# In a process of its own, where no other library has that name: torch may have loaded the real one.
CALL = """
import ctypes
import json
import sys

library, *numbers = sys.argv[1:]
library = ctypes.CDLL(library)
library.host_guard.restype = ctypes.c_char_p
meanwhile, after = (ctypes.c_int * 2)(), (ctypes.c_int * 3)()
error = library.host_guard(*map(int, numbers), meanwhile)
library.host_state(after)
print(json.dumps([error and error.decode(), list(meanwhile), list(after)]))
"""


def build(folder: Path, *flags: str) -> Path:
    headers = find_headers()
    if headers is None:
        pytest.skip("no headers of a CUDA toolkit")
    source = HOST / "driver"
    driver, library = folder / "libcuda.so.1", folder / "guard.so"
    # device_host.h is that of this folder.
    flags = ["-iquote", str(source), f"-I{SOURCES / 'cuda'}", "-isystem", headers, *flags]
    name = "-Wl,-soname,libcuda.so.1"
    compile_host([*flags, str(source / "libcuda.cpp"), name, "-o", str(driver)])
    found = ["-Wl,-rpath,$ORIGIN", str(driver), "-ldl"]
    compile_host([*flags, str(source / "guard.cpp"), *found, "-o", str(library)])
    return library


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return build(tmp_path_factory.mktemp("driver"))


def guard(library, *, error=0, driver=13000, context=0, fails=0, device=1):
    """Return an error's sentence, (context, mode) meanwhile, and both and the choices after."""
    numbers = map(str, (error, driver, context, fails, device))
    return json.loads(run_python(CALL, str(library), *numbers).stdout)


@pytest.mark.parametrize(
    ("context", "device", "sets"), [(0, 1, 1), (0, 0, 1), (1, 1, 1), (2, 1, 0)]
)
def test_the_guard_finds_the_driver_and_puts_everything_back(library, context, device, sets):
    found = guard(library, context=context, device=device)
    assert found == [None, [device + 1, RELAXED], [context, THREAD_LOCAL, sets]]


def test_a_driver_that_is_not_there_or_too_old_gets_one_sentence(library):
    error, *_ = guard(library, error=INSUFFICIENT_DRIVER, driver=0)
    assert error == "CUDA: no driver is installed"
    error, *_ = guard(library, error=INSUFFICIENT_DRIVER, driver=11080)
    expected = (
        r"CUDA: the driver supports CUDA 11\.8, and this build needs one that supports [\d.]+"
    )
    assert re.fullmatch(expected, error)
    error, *_ = guard(library, error=OTHER_ERROR)
    assert error == "CUDA: cudaGetDevice failed: what the runtime says"


def test_an_error_leaves_the_thread_as_it_was(library):
    error, _, after = guard(library, context=1, device=8)
    assert error == "CUDA: cudaSetDevice failed: what the runtime says"
    assert after == [1, THREAD_LOCAL, 0]
    error, _, after = guard(library, context=1, fails=700)
    assert error == "CUDA: cuCtxGetCurrent failed: error 700"
    assert after == [1, THREAD_LOCAL, 0]


def test_a_driver_without_a_function_gets_one_sentence(tmp_path):
    error, *_ = guard(build(tmp_path, "-DWITHOUT_CAPTURE_MODES"))
    assert error == "CUDA: libcuda.so.1 has no cuThreadExchangeStreamCaptureMode"
