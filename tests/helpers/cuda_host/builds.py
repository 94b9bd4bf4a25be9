"""Compiles the host build of the CUDA kernels: what is asked for twice is compiled once.

Whatever is built from the source tree as it is lies in build/cuda_host by a digest of all that it
is made from, and serves every module, process and later run. What is built from a copy with
something changed in it is compiled anew, in the folder that is named.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
SOURCES = ROOT / "csrc"
HOST = Path(__file__).resolve().parent
BUILDS = ROOT / "build" / "cuda_host"
FLAGS = [
    *("-std=c++17", "-O2", "-ffp-contract=off", "-fPIC", "-shared", "-U_FORTIFY_SOURCE"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-unused-function"),
]
RUNNER = ("runner", "warpgroup", "arrivals")


def compile_host(arguments: list[str]) -> None:
    """Run the C++ compiler on what names the runner's headers."""
    subprocess.run([_compiler(), *FLAGS, f"-I{HOST}", *arguments], check=True)


def build_runner(folder: Path | None = None, host: Path = HOST) -> list[str]:
    """Compile what runs kernels on the host, for several libraries; None for a shared build."""

    def compile_to(folder: Path) -> None:
        for name in RUNNER:
            compile_host(["-c", str(host / f"{name}.cpp"), "-o", str(folder / f"{name}.o")])

    if folder is None:
        folder = shared_build("runner", compile_to)
    else:
        compile_to(folder)
    return [str(folder / f"{name}.o") for name in RUNNER]


def shared_build(name: str, compile_to: Callable[[Path], None]) -> Path:
    """Return the folder of a build of the source tree as it is, compiled where it is not there yet.

    `name` stands for all that `compile_to` does beside reading the sources: the digest is of
    those, of this package's Python and of the compiler. Processes that ask at once wait for the
    one that builds; the builds of other digests are removed.
    """
    BUILDS.mkdir(parents=True, exist_ok=True)
    folder = BUILDS / f"{name}-{_digest()}"
    with (BUILDS / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            for stale in BUILDS.glob(f"{name}-*"):
                _remove(stale)
            unfinished = BUILDS / f"{name}-unfinished"
            unfinished.mkdir()
            compile_to(unfinished)
            unfinished.rename(folder)
    return folder


def _compiler() -> str:
    return os.environ.get("CXX", "c++")


@functools.cache
def _digest() -> str:
    """Return a digest of the sources, of what compiles them and of how."""
    version = subprocess.run([_compiler(), "--version"], check=True, capture_output=True).stdout
    digest = hashlib.sha256(version)
    for path in sorted([*_files(SOURCES), *_files(HOST)]):
        digest.update(f"{path.relative_to(ROOT)}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


def _files(folder: Path) -> Iterable[Path]:
    return (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc")


def _remove(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
