"""Words that CONTRIBUTING.md has others for are in no message, docstring or page."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from pages import PAGES, README, ROOT, quoted, table

CONTRIBUTING = ROOT / "CONTRIBUTING.md"
BEGIN, END = "<!-- words -->\n", "<!-- words end -->\n"

# A sentence that each line of the table must find, in its order, and one that it must not.
FOUND_AND_NOT = [
    ("got 3 parameters a sample", "it gives a sample that has weight"),
    ("by the law of the matrix", "a law of large numbers"),
    ("the law's matrix", "the law says"),
    ("the checkpoint's mark is missing", "a question mark"),
    ("a store's part", "the store's place"),
    ("three parts of a store", "part of the parameters"),
    ("what made it differ", "what it made"),
    ("samples that are not finite", "sums that are not finite"),
    ("three bf16 passes", "three bf16 parts"),
]


def words() -> list[tuple[str, str]]:
    text = CONTRIBUTING.read_text(encoding="utf-8")
    rows = table(text[text.index(BEGIN) + len(BEGIN) :], "not")
    return [(pattern(quoted(old)[0]), new) for old, new in rows]


def pattern(expression: str) -> str:
    """Return the regular expression of words in which {a,b} is either."""
    pieces = re.split(r"\{([^}]*)\}", expression)  # every second one stood in braces
    groups = (
        "|".join(map(re.escape, piece.split(",") if i % 2 else [piece]))
        for i, piece in enumerate(pieces)
    )
    return rf"\b(?:{')(?:'.join(groups)})\b"


def strings_of(source: str) -> Iterator[str]:
    """Yield docstrings, and what errors and warnings say."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield ast.get_docstring(node) or ""
        elif isinstance(node, ast.Call) and re.search("(Error|warn)$", ast.unparse(node.func)):
            for part in ast.walk(node):
                if isinstance(part, ast.JoinedStr):
                    yield "".join(
                        value.value if isinstance(value, ast.Constant) else "…"
                        for value in part.values
                    )
                elif isinstance(part, ast.Constant) and isinstance(part.value, str):
                    yield part.value


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    """What people read, by file."""
    found = {}
    for path in sorted((ROOT / "trak_ext").rglob("*.py")):
        found[str(path)] = "\n\n".join(strings_of(path.read_text(encoding="utf-8")))
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.suffix in (".h", ".cpp", ".cu"):
            literals = re.findall(r'"((?:[^"\\\n]|\\.)*)"', path.read_text(encoding="utf-8"))
            found[str(path)] = "\n".join(literals)
    for path in (README, CONTRIBUTING, ROOT / "examples" / "README.md", *PAGES):
        text = path.read_text(encoding="utf-8")
        if path == CONTRIBUTING:
            text = text[: text.index(BEGIN)] + text[text.index(END) :]
        found[str(path)] = text
    assert sum(map(len, found.values())) > 200_000
    return found


def test_each_line_of_the_table_finds_what_it_is_for():
    assert len(words()) == len(FOUND_AND_NOT)
    for (avoided, _), (bad, good) in zip(words(), FOUND_AND_NOT, strict=True):
        assert re.search(avoided, bad), avoided
        assert not re.search(avoided, good), avoided


@pytest.mark.parametrize(("avoided", "instead"), words())
def test_nobody_writes_it(avoided, instead, texts):
    hits = []
    for name, text in texts.items():
        flat = re.sub(r"\s+", " ", text)
        for found in re.finditer(avoided, flat):
            around = flat[max(0, found.start() - 40) : found.end() + 40]
            hits.append(f"{name}: ...{around}... (write: {instead})")
    assert not hits, "\n".join(hits)
