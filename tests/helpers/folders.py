"""Where the source tree's folders are, for tests of what is not installed."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "bench"
CSRC = ROOT / "csrc"
EXAMPLES = ROOT / "examples"
HELPERS = ROOT / "tests" / "helpers"
VECTORS = ROOT / "tests" / "vectors"
