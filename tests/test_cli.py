"""The command line, as a person runs it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import trak_ext
from trak_ext import cli


def test_info_prints_what_is_there(capsys):
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    info = trak_ext.build_info()
    for expected in (trak_ext.__version__, info["cpu_level"], info["torch"], "cuda", "threads"):
        assert expected in printed


def test_info_as_json(capsys):
    assert cli.main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == trak_ext.build_info()


def test_the_installed_command_runs():
    command = Path(sys.executable).with_name("trak-ext")
    run = subprocess.run([command, "info"], capture_output=True, text=True, check=True)
    assert "cpu level" in run.stdout


def test_errors_are_one_sentence_on_stderr(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert cli.main(["demo", "--out", str(tmp_path / "file" / "folder"), "--quiet"]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("trak-ext demo: ")
    assert captured.err.count("\n") == 1


def test_the_demo_takes_a_kind_of_projection(capsys, tmp_path):
    arguments = ["demo", "--out", str(tmp_path), "--quiet", "--kind", "sjlt", "--nnz", "3"]
    assert cli.main(arguments) == 1  # 3 does not divide the default's 2048
    assert "nnz: expected a positive divisor of proj_dim = 2048" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["demo", "--out", str(tmp_path), "--kind", "dense"])


@pytest.mark.parametrize("seed", ["x", "-1", "1.5", "4294967296"])
def test_seeds_that_are_none_are_refused(seed, capsys, tmp_path):
    with pytest.raises(SystemExit):
        cli.main(["demo", "--out", str(tmp_path), f"--seed={seed}"])
    assert f"--seed: expected 0 to 4294967295, got {seed}" in capsys.readouterr().err


def test_unknown_commands_are_refused():
    with pytest.raises(SystemExit) as stop:
        cli.main(["attribute"])
    assert stop.value.code == 2


OPTIONS = {
    "demo": {"--out", "--seed", "--kind", "--nnz", "--quiet"},
    "info": {"--json"},
    "report": {"--out"},
    "selftest": {"--device", "--json"},
}


@pytest.mark.parametrize("command", [None, *OPTIONS])
def test_help_names_every_command_and_option(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([*([command] if command else []), "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    expected = OPTIONS[command] if command else set(OPTIONS)
    found = set(re.findall(r"^ +(--\w+|-h, --help|[a-z]+)(?=\s)", printed, re.MULTILINE))
    assert expected <= found
    if command:
        assert {word for word in found if word.startswith("--")} == expected
        assert printed.index("\n\n") < printed.index("options:")  # a description comes first
