"""The pages: their code runs, and the files, names and messages that they quote exist."""

from __future__ import annotations

import ast
import contextlib
import io
import re
import time
import types

import pytest

import trak_ext
from pages import PAGES, README, ROOT, python_blocks, quoted, table

DOCS = ROOT / "docs"
MOST_SECONDS = 20  # of a page's blocks, on the thread that runs them


def read(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "path", [path for path in (README, *PAGES) if python_blocks(path)], ids=lambda path: path.name
)
def test_code_runs_from_top_to_bottom(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "page"}
    begin = time.thread_time()
    for block in python_blocks(path):
        printed = io.StringIO()
        code = compile("\n" * (block.line - 1) + block.code, str(path), "exec")
        with contextlib.redirect_stdout(printed):
            exec(code, namespace)
        if block.output is not None:
            assert printed.getvalue() == block.output, f"{path.name}:{block.line}"
    assert time.thread_time() - begin < MOST_SECONDS


def test_every_page_is_in_the_navigation():
    named = re.findall(r"^ +- ([\w.-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(named) == [path.name for path in PAGES]


def test_the_reference_has_every_public_name():
    text = read("api.md")
    for name in trak_ext.__all__:
        module = getattr(trak_ext, name)
        if not isinstance(module, types.ModuleType):
            assert f"::: trak_ext.{name}\n" in text, name
        elif name not in ("reference", "scoring"):  # the oracle, and an old name
            assert f"::: trak_ext.{name}\n" in text, name
            chosen = re.search(rf"::: trak_ext\.{name}\n.*members: \[([^]]*)\]", text)
            if chosen:
                members = chosen[1].split(", ")
                assert sorted(members) == sorted(set(module.__all__) - {"TASKS"})


def test_files_of_the_design_exist():
    rows = table(read("design.md"), "question")
    assert len(rows) >= 12
    for question, place in rows:
        for name in quoted(place):
            assert (ROOT / name).is_file(), question


def test_calls_of_the_design_are_in_the_source():
    source = "".join(path.read_text("utf-8") for path in (ROOT / "trak_ext").rglob("*.py"))
    paths = read("design.md").split("\n## What `")[1:]
    calls = re.findall(r"^ {4,}(\w+)\.(\w+)", "\n".join(paths), re.MULTILINE)
    assert len(calls) > 15
    for owner, name in calls:
        assert re.search(rf"def {name}\(", source), name
        assert not owner[0].isupper() or re.search(rf"^class {owner}\b", source, re.MULTILINE), (
            owner
        )


def test_old_modules_are_gone_and_new_ones_exist():
    rows = table(read("from-0.1.0.md").split("## Modules")[1], "0.1.0")
    assert len(rows) >= 18
    for old, new in rows:
        for name in quoted(old):
            assert not (ROOT / name).exists(), name
        assert quoted(new)
        for name in quoted(new):
            assert (ROOT / name).is_file(), name


# --- messages -------------------------------------------------------------------------------------


def text_of(node: ast.AST) -> str | None:
    """Return a string of the source, with "…" for what is filled in."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) or "…" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return f"{text_of(node.left) or '…'}{text_of(node.right) or '…'}"
    return None


@pytest.fixture(scope="module")
def source() -> list[str]:
    """All strings of the package, and CMake's file."""
    strings = [(ROOT / "CMakeLists.txt").read_text(encoding="utf-8")]
    for path in (ROOT / "trak_ext").rglob("*.py"):
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        strings.extend(text for text in map(text_of, nodes) if text)
    return strings


def messages() -> list[str]:
    sections = read("errors.md").split("\n## ")[1:]
    return [quoted(row[0])[0] for section in sections for row in table(section, "message")]


def test_there_are_messages():
    assert len(messages()) > 15


@pytest.mark.parametrize("message", messages())
def test_a_quoted_message_is_one_of_the_source(message, source):
    # What is filled in may stand beside words that the page leaves out.
    parts = [re.escape(part) for part in message.split("…")]
    pattern = re.compile(r"[^\n]*?…[^\n]*?".join(parts))
    assert any(pattern.search(text) for text in source)
