"""The README: short, its first block runs as it is pasted, and what it names is there."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys

import pytest

import trak_ext
from pages import PAGES, README, ROOT, python_blocks
from trak_ext import _C

TEXT = README.read_text(encoding="utf-8")


def test_it_is_short():
    assert len(TEXT.splitlines()) <= 120


def test_the_first_block_prints_what_is_shown_under_it(tmp_path):
    first = python_blocks(README)[0]
    assert first.output is not None
    imported = set()
    for node in ast.walk(ast.parse(first.code)):
        if isinstance(node, ast.Import):
            imported.update(name.name.split(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            imported.add(str(node.module).split(".")[0])
    assert imported == {"torch", "trak_ext"}
    (tmp_path / "first.py").write_text(first.code, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "first.py"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout == first.output


@pytest.mark.parametrize("path", [README, *PAGES], ids=lambda path: path.name)
def test_links_and_pictures_lead_to_files(path):
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
        if not target.startswith("https://"):
            assert (path.parent / target).exists(), target


def test_the_picture_is_small():
    assert (ROOT / "docs" / "images" / "demo.png").stat().st_size < 300_000


def test_one_torch_is_pinned_for_development():
    pinned = set()
    for name in ("README.md", "CONTRIBUTING.md", "Makefile"):
        found = re.findall(r"torch==([\d.]+\d)", (ROOT / name).read_text(encoding="utf-8"))
        assert found, name
        pinned.update(found)
    assert len(pinned) == 1


def test_the_version_has_one_source():
    stated = re.search(
        r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert stated is not None
    assert stated[1] == trak_ext.__version__ == _C.__version__
    assert f"## [{stated[1]}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_commands_of_the_readme_are_targets():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"`make (\w+)", TEXT)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
@pytest.mark.parametrize(
    ("gpu", "arguments", "expected"),
    [
        (False, [], "OFF"),
        (False, ["CUDA=1"], "ON"),
        (True, [], "AUTO"),
        (True, ["CUDA=0"], "OFF"),
    ],
)
def test_make_builds_cuda_where_a_gpu_is_seen(gpu, arguments, expected, tmp_path, monkeypatch):
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("pyproject.toml", "CMakeLists.txt"):
        (tmp_path / name).touch()
    for name in ("csrc", "trak_ext", "bin"):
        (tmp_path / name).mkdir()
    command = tmp_path / "bin" / "nvidia-smi"
    command.write_text(f"#!/bin/sh\nexit {0 if gpu else 9}\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}:{os.environ['PATH']}")
    for name in ("CUDA", "MAKEFLAGS", "MFLAGS"):  # of a make that runs these tests
        monkeypatch.delenv(name, raising=False)
    for target in ("demo", "test"):
        done = subprocess.run(
            ["make", "-n", target, *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        assert f"cmake.define.TRAK_EXT_CUDA={expected}" in done.stdout
        assert done.stdout.count("cmake.define.TRAK_EXT_CUDA") == 1
