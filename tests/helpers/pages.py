"""README and pages: their files, their code with the output that it shows, their tables."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").glob("*.md"))
NOT_RUN = "<!-- not run -->"

_BLOCK = re.compile(
    rf"(?P<not_run>{NOT_RUN}\n)?^```python\n(?P<code>.*?)^```\n"
    r"(?:(?:\s*It prints\n)?\s*^```text\n(?P<output>.*?)^```\n)?",
    re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    """Python of a page, and what it prints as far as the page shows it."""

    line: int
    code: str
    output: str | None


def python_blocks(path: Path) -> list[Block]:
    """Return the Python blocks that are run, from top to bottom."""
    text = path.read_text(encoding="utf-8")
    return [
        Block(text[: found.start("code")].count("\n") + 1, found["code"], found["output"])
        for found in _BLOCK.finditer(text)
        if not found["not_run"]
    ]


def table(text: str, first: str) -> list[list[str]]:
    """Return the rows of the table whose heading begins with a cell, as cells without borders."""
    lines = text.splitlines()
    heading = next(i for i, line in enumerate(lines) if line.startswith(f"| {first} |"))
    rows = []
    for line in lines[heading + 2 :]:
        if not line.startswith("|"):
            break
        cells = re.split(r"(?<!\\)\|", line.strip().strip("|"))
        rows.append([cell.strip().replace("\\|", "|") for cell in cells])
    return rows


def quoted(cell: str) -> list[str]:
    """Return what stands between backticks."""
    return re.findall(r"`([^`]+)`", cell)
