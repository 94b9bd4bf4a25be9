"""Timing for noisy, shared machines: both sides in one run, alternating, medians and ratios."""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any


def alternate(
    contenders: dict[str, Callable[[], object]], repeats: int, patience: float = 20.0
) -> dict[str, list[float]]:
    """Return the seconds of each contender's runs, one of each in turn, after one warm-up.

    A contender whose runs have taken `patience` seconds together takes no further turns.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(repeats + 1):
        for name, call in contenders.items():
            if sum(seconds[name]) > patience:
                continue
            begin = time.perf_counter()
            call()
            elapsed = time.perf_counter() - begin
            if turn > 0 or elapsed > patience:
                seconds[name].append(elapsed)
    return seconds


def median_ratio(above: list[float], below: list[float]) -> float:
    """Return the median of turn-by-turn ratios, or of medians where the turns differ in number."""
    if len(above) == len(below):
        return statistics.median(a / b for a, b in zip(above, below, strict=True))
    return statistics.median(above) / statistics.median(below)


def spent(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """Return what a call returns, and its seconds and what this process's peak memory grew by."""
    before, begin = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    result = work()
    wall, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_SELF)
    return result, {
        "wall": wall,
        "user": after.ru_utime - before.ru_utime,
        "system": after.ru_stime - before.ru_stime,
        "peak_mib": (after.ru_maxrss - before.ru_maxrss) / 1024,
    }


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    """Return the median of each number over runs."""
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def pin_to_one_core() -> None:
    """Keep this process on its last core, where the system can."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def machine_name() -> str:
    """Return the processor's name as the system gives it."""
    if Path("/proc/cpuinfo").exists():
        fields = {}
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
        name = fields.get("model name", platform.processor())
        return f"{name} (family {fields.get('cpu family')}, model {fields.get('model')})"
    return platform.processor() or platform.machine()


def print_table(title: str, header: list[str], rows: list[list[str]]) -> None:
    """Print rows under a header in columns as wide as they need."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    print(f"\n{title}")
    for row in [header, *rows]:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        print("  ".join(cells))


def write_json(path: str | None, benchmark: str, settings: dict[str, Any], rows: Any) -> None:
    """Write what was measured, with the machine and the day, if a path is given."""
    if path is None:
        return
    record = {
        "benchmark": benchmark,
        "machine": machine_name(),
        "date": date.today().isoformat(),
        "settings": settings,
        "rows": rows,
    }
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(record, indent=1) + "\n")
