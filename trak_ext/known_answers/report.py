"""The long form of the self-test: `trak_ext.selftest` and what it returns."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from .. import _C, _check
from ..kernels.cuda_paths import FAMILIES, PATHS, run_apart
from ..kernels.runtime import build_info
from .cases import run_cases
from .cpu import CpuKernels
from .kernels import DeviceKernels
from .projections import answers_by_reference
from .quick import CASES as QUICK
from .thorough import CASES

STREAMS = ("late", "default")  # on which the quick cases are run once more


@dataclass(frozen=True)
class Check:
    """One problem on one path: `problem` is None where the answer was right."""

    device: str
    family: str
    path: str
    case: str
    problem: str | None


@dataclass(frozen=True)
class SelfTestReport:
    """What `selftest` found.

    Attributes:
        checks: Every problem that was solved, in order.
        notes: Sentences on what was not tested, and why.
        build: `build_info()`.
        gpus: The CUDA devices that were tested, in words.
    """

    checks: list[Check]
    notes: list[str]
    build: dict[str, Any]
    gpus: list[str]

    @property
    def passed(self) -> bool:
        """Whether every answer was right; says nothing of what the notes name."""
        return all(check.problem is None for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON has it: "passed", and the attributes."""
        return {"passed": self.passed, **asdict(self)}

    def __str__(self) -> str:
        lines = [f"trak_ext {self.build['version']}, torch {self.build['torch']}"]
        groups: dict[tuple[str, str, str], list[Check]] = {}
        for check in self.checks:
            groups.setdefault((check.device, check.family, check.path), []).append(check)
        device = None
        for (name, family, path), checks in groups.items():
            if name != device:
                lines.append(name)
                device = name
            wrong = [check.problem for check in checks if check.problem is not None]
            verdict = "ok" if not wrong else f"{len(wrong)} WRONG"
            lines.append(f"  {family + ', ' + path:<34}{len(checks):>5} checks  {verdict}")
            lines += [f"    {problem}" for problem in wrong[:5]]
        lines += self.notes
        return "\n".join([*lines, "passed" if self.passed else "FAILED"])


def selftest(device: str | torch.device | None = None) -> SelfTestReport:
    """Let every kernel solve problems whose answers are known, and report.

    Projections and scores of integers must be exact, matrices must have the bits of the oracle in
    plain NumPy (`trak_ext.reference`), and normal projections must be within a bound of rounding
    errors. On a CUDA device all paths that the build has for it are tested, whichever is used, with
    every tile, precision, dtype and layout, and on three streams; on the CPU every level that the
    machine runs, each in a process of its own. Takes seconds to a minute.

    This is the long form. The quick one runs by itself before a CUDA device first uses a path
    (`TRAK_EXT_CUDA_SELFTEST=off|warn|error`).

    Args:
        device: "cpu", or one CUDA device; None for the CPU and all CUDA devices that there are.

    Returns:
        SelfTestReport; `passed`, and its text by `str`. Its notes say where no GPU was tested.

    Raises:
        ValueError: if `device` is not "cpu" or a CUDA device that this build and machine have.
    """
    checks: list[Check] = []
    notes: list[str] = []
    gpus: list[str] = []
    chosen = None if device is None else _chosen_device(device)
    with answers_by_reference():
        if chosen is None or chosen.type == "cpu":
            checks += check_cpu_levels()
        missing = _missing_gpu()
        if chosen is None and missing is None:
            devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
        else:
            devices = [chosen] if chosen is not None and chosen.type == "cuda" else []
        for gpu in devices:
            checks += run_apart(functools.partial(check_gpu, gpu, notes))
            gpus.append(DeviceKernels(gpu).describe())
    if not gpus:
        notes.append(f"No GPU was tested: {missing or 'the CPU alone was asked for'}.")
    return SelfTestReport(checks, notes, build_info(), gpus)


def _missing_gpu() -> str | None:
    """Return why there is no GPU to test, None where there is one."""
    build = _C.cuda_build()
    if build is None:
        return "this build of trak_ext is without CUDA"
    if not build["devices"]:
        return f"the CUDA runtime finds none ({build['status']})"
    return None if torch.cuda.is_available() else "this torch has none"


def _chosen_device(device: str | torch.device) -> torch.device:
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        found = None
    missing = _missing_gpu()
    count = 0 if missing else torch.cuda.device_count()
    if found is not None and found.type == "cpu":
        return found
    if found is not None and found.type == "cuda" and (found.index or 0) < count:
        return torch.device(
            "cuda", torch.cuda.current_device() if found.index is None else found.index
        )
    given = str(device) if isinstance(device, torch.device) else _check.describe(device)
    there = "cpu" + "".join(f", cuda:{i}" for i in range(count))
    reason = f" ({missing})" if missing else ""
    raise ValueError(f"device: expected one of {there} on this machine{reason}, got {given}")


def check_gpu(device: torch.device, notes: list[str]) -> list[Check]:
    """Run all cases of all paths that the build has for a device."""
    kernels = DeviceKernels(device)
    best = _C.cuda_projection_path(device.index)
    checks = []
    for family, paths in FAMILIES.items():
        for path in paths:
            if PATHS.index(path) < PATHS.index(best):
                if family == "projection":
                    notes.append(f"Path {path} was not tested on {device}: it has no code for it.")
                continue
            checks += check_cases(kernels, family, path, CASES[family](kernels, path))
            for stream in STREAMS:
                other = DeviceKernels(device, stream=stream)
                cases = QUICK[family](other, path)
                checks += check_cases(other, family, path, cases, f"on a {stream} stream, ")
    return checks


def check_cases(kernels: Any, family: str, path: str, cases: Any, prefix: str = "") -> list[Check]:
    """Run cases one by one, so that one that cannot be launched hides no other."""
    name = kernels.describe()
    checks = []
    for case in cases:
        try:
            (problem,) = run_cases(kernels, path, [case])
        except (RuntimeError, ValueError) as error:
            problem = f"{case}: {type(error).__name__}: {' '.join(str(error).split())}"
        checks.append(Check(name, family, path, prefix + str(case), problem and prefix + problem))
    return checks


def check_cpu() -> list[Check]:
    """Run all cases at this process's CPU level."""
    kernels = CpuKernels()
    checks = []
    for family, paths in FAMILIES.items():
        cases = CASES[family](kernels, paths[-1])
        checks += check_cases(kernels, family, _C.cpu_level(), cases)
    return checks


def check_cpu_levels() -> list[Check]:
    """Run them at every level: a process has one, so others get processes of their own."""
    checks = []
    for level in _C.available_cpu_levels():
        checks += check_cpu() if level == _C.cpu_level() else _check_in_child(level)
    return checks


def _check_in_child(level: str) -> list[Check]:
    environment = {**os.environ, "TRAK_EXT_CPU_LEVEL": level}
    package = Path(__file__).resolve().parents[1]
    if Path(_C.__file__).resolve().parent == package:
        known = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(package.parent), known]))
    code = "from trak_ext.known_answers.report import print_cpu_checks as run; run()"
    with tempfile.TemporaryDirectory() as folder:
        run = subprocess.run(
            [sys.executable, "-c", code],
            cwd=folder,  # not where a folder may be called trak_ext
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
    if run.returncode != 0:
        last = (run.stderr.strip().splitlines() or [""])[-1]
        problem = f"the process ended with {run.returncode}: {last}"
        return [Check(f"cpu {level}", "all", level, "a process of its own", problem)]
    return [Check(**fields) for fields in json.loads(run.stdout)]


def print_cpu_checks() -> None:
    """Print check_cpu() as JSON, in a child."""
    with answers_by_reference():
        print(json.dumps([asdict(check) for check in check_cpu()]))
