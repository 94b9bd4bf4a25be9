"""trak_ext.selftest and `trak-ext selftest`: the long form, here on the CPU and on a played GPU."""

from __future__ import annotations

import json
import sys

import pytest
import torch

import trak_ext
from trak_ext import _C, cli
from trak_ext.known_answers import quick, report, thorough
from trak_ext.known_answers.cpu import CpuKernels
from trak_ext.known_answers.kernels import is_sparse

NO_GPU = report._missing_gpu() is not None


@pytest.fixture
def quick_cases(monkeypatch) -> None:
    """The quick cases in place of the long ones, at this process's level alone."""
    monkeypatch.setattr(report, "CASES", quick.CASES)
    monkeypatch.setattr(report, "check_cpu_levels", lambda: report.check_cpu())


@pytest.mark.slow
def test_every_cpu_level_gives_the_oracles_answers(capsys):
    assert cli.main(["selftest", "--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["passed"] is True
    levels = trak_ext.build_info()["cpu_levels"]
    for level in levels:
        checks = [check for check in found["checks"] if check["device"] == f"cpu {level}"]
        assert {check["family"] for check in checks} == set(thorough.CASES)
        assert len(checks) > 200
        assert len({(check["family"], check["case"]) for check in checks}) > 150
    assert len(found["checks"]) > 200 * len(levels)
    assert found["gpus"] == []
    assert found["notes"][-1].startswith("No GPU was tested: ")


@pytest.mark.skipif(not NO_GPU, reason="there is a GPU")
def test_a_machine_without_a_gpu_says_so(quick_cases, capsys):
    assert cli.main(["selftest"]) == 0
    printed = capsys.readouterr().out
    assert f"cpu {_C.cpu_level()}\n" in printed
    assert "No GPU was tested: " in printed
    assert printed.endswith("passed\n")


def test_a_wrong_answer_is_named_and_fails_the_command(quick_cases, monkeypatch, capsys):
    right = CpuKernels.project

    def forgets_the_last_parameter(self, matrix, path, grads, *rest, **how):
        if not is_sparse(matrix):
            grads = [(grad[:, :-1], offset) for grad, offset in grads]
        right(self, matrix, path, grads, *rest, **how)

    monkeypatch.setattr(CpuKernels, "project", forgets_the_last_parameter)
    assert cli.main(["selftest", "--device", "cpu"]) == 1
    printed = capsys.readouterr().out
    assert "WRONG" in printed
    assert "results are wrong, the first at [0, 0]: expected" in printed
    assert "scoring, " in printed
    assert printed.endswith("FAILED\n")
    found = trak_ext.selftest("cpu")
    assert not found.passed
    wrong = {check.family for check in found.checks if check.problem is not None}
    assert wrong == {"projection"}


def test_a_call_that_raises_hides_no_other(quick_cases, monkeypatch):
    right = CpuKernels.project

    def raises_for_many_rows(self, matrix, path, grads, out, *rest, **how):
        if len(out) > 20:
            raise RuntimeError("too many\nrows")
        right(self, matrix, path, grads, out, *rest, **how)

    monkeypatch.setattr(CpuKernels, "project", raises_for_many_rows)
    found = trak_ext.selftest("cpu")
    problems = [c.problem for c in found.checks if c.family == "projection" and c.problem]
    assert problems
    assert all(problem.endswith(": RuntimeError: too many rows") for problem in problems)
    assert any(c.problem is None for c in found.checks if c.family == "projection")


def test_a_level_whose_process_fails_is_reported(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    (check,) = report._check_in_child("baseline")
    assert check.device == "cpu baseline"
    assert check.problem == "the process ended with 1: "


@pytest.mark.parametrize("device", ["cuda:99", "meta", "nothing", 3.5, torch.device("meta")])
def test_other_devices_get_one_sentence(device):
    with pytest.raises(ValueError, match=r"^device: expected one of cpu.* on this machine.*, got "):
        trak_ext.selftest(device)


def test_the_command_says_what_device_it_wanted(capsys):
    assert cli.main(["selftest", "--device", "cuda:99"]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("trak-ext selftest: device: expected one of cpu")
    assert captured.err.count("\n") == 1


@pytest.mark.skipif(NO_GPU, reason="no CUDA device that torch and this build can use")
def test_every_kernel_of_every_gpu():
    found = trak_ext.selftest("cuda")
    assert found.passed, str(found)
    assert len(found.gpus) == 1
    paths = {check.path for check in found.checks if check.family == "projection"}
    assert _C.cuda_projection_path(torch.cuda.current_device()) in paths
    assert "plain" in paths
