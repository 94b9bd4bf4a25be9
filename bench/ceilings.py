"""One core's ceilings: multiply-adds, table lookups, memory reads.

    python bench/ceilings.py [--level avx512]

Compiles ceilings.cpp with the system's C++ compiler ($CXX or c++).
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import measure
import trak_ext

FLAGS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"],
}


class Ceilings:
    """The compiled loops of one level."""

    def __init__(self, level: str) -> None:
        source = Path(__file__).with_name("ceilings.cpp")
        compiler = os.environ.get("CXX", "c++")
        command = [compiler, "-O3", "-std=c++17", "-shared", "-fPIC", "-Wno-psabi"]
        with tempfile.TemporaryDirectory() as folder:
            library = str(Path(folder) / "ceilings.so")
            subprocess.run([*command, *FLAGS[level], str(source), "-o", library], check=True)
            self._library = ctypes.CDLL(library)
        for name in ("run_multiply_add", "run_lookup_add", "run_read"):
            getattr(self._library, name).restype = ctypes.c_double
        self._sink = ctypes.c_float()

    def _rate(self, call: Callable[[], float]) -> float:
        begin = time.perf_counter()
        work = call()
        return work / (time.perf_counter() - begin)

    def multiply_add(self, rounds: int = 1_000_000) -> float:
        """Return fp32 operations a second of multiply-adds, 2 each."""
        run = self._library.run_multiply_add
        arguments = (ctypes.c_int64(rounds), ctypes.c_float(1.0), ctypes.byref(self._sink))
        return self._rate(lambda: run(*arguments))

    def lookup_add(self, rounds: int = 1_000_000) -> float:
        """Return lookups (and adds) a second, lanes counted."""
        run = self._library.run_lookup_add
        arguments = (ctypes.c_int64(rounds), ctypes.c_float(1.0), ctypes.byref(self._sink))
        return self._rate(lambda: run(*arguments))

    def read(self, data: np.ndarray) -> float:
        """Return bytes a second read from an fp32 array."""
        run = self._library.run_read
        arguments = (
            ctypes.c_void_p(data.ctypes.data),
            ctypes.c_int64(data.size),
            ctypes.byref(self._sink),
        )
        return self._rate(lambda: run(*arguments))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    levels = trak_ext.build_info()["cpu_levels"]
    parser.add_argument("--level", choices=levels, default=levels[-1])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json")
    options = parser.parse_args()
    measure.pin_to_one_core()
    ceilings = Ceilings(options.level)
    memory = np.ones(2**26, np.float32)
    aligned = memory[(-memory.ctypes.data % 64) // 4 :]
    found: dict[str, list[float]] = {"multiply_add": [], "lookup_add": [], "read": []}
    for _ in range(options.repeats):
        found["multiply_add"].append(ceilings.multiply_add() / 1e9)
        found["lookup_add"].append(ceilings.lookup_add() / 1e9)
        found["read"].append(ceilings.read(aligned) / 1e9)
    units = {
        "multiply_add": "GFLOP/s, fp32",
        "lookup_add": "G lookups/s, one lane each",
        "read": "GB/s from memory",
    }
    rows = [
        [name, f"{statistics.median(rates):.1f}", f"{max(rates):.1f}", units[name]]
        for name, rates in found.items()
    ]
    measure.print_table(
        f"{measure.machine_name()}, one core, level {options.level}",
        ["ceiling", "median", "best", "unit"],
        rows,
    )
    measure.write_json(options.json, "ceilings", {"level": options.level}, found)


if __name__ == "__main__":
    main()
