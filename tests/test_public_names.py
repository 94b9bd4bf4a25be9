"""Every name and option that version 0.1.0 had is there, in its place and with its default.

tests/vectors/api_0_1_0.json says what it had (made by make_api.py beside it).
"""

from __future__ import annotations

import importlib
import inspect
import json

import pytest

import trak_ext
from children import run_python
from folders import VECTORS

API = json.loads((VECTORS / "api_0_1_0.json").read_text())
# Options of 0.1.0 that have a better name now, which None leaves to the new one.
ALIASES = {"Attributor.fit": {"part": "addition"}}
NAMES = [(module, name) for module, names in API.items() for name in names]
# Modules that were named in the documentation, in examples, or by what they hold.
MODULES = ["cli", "demo.digits", "demo.figure", "demo.run"]
MODULES += ["gradients", "inputs.loaders", "inputs.checkpoints", "known_answers", "reference"]
MODULES += ["report", "scoring", "store", "tasks"]


# By a measurement that docs/accuracy.md shows: None is the store's, and else "sjlt" and 1.
CHANGED_DEFAULTS = {"Attributor": {"kind": "None", "nnz": "None"}}


@pytest.mark.parametrize(("module", "name"), NAMES, ids=[".".join(pair) for pair in NAMES])
def test_names_and_options_of_0_1_0(module, name):
    value = importlib.import_module(module)
    for part in name.split("."):
        value = getattr(value, part)
    expected = API[module][name]
    if expected is None:
        return
    found = {
        key: "" if parameter.default is inspect.Parameter.empty else repr(parameter.default)
        for key, parameter in inspect.signature(value).parameters.items()
    }
    for alias, new in ALIASES.get(name, {}).items():
        assert found[alias] == "None"
        found[alias] = found[new]
    kept = [key for key in found if key in expected]
    assert kept == list(expected)
    added = {key: default for key, default in found.items() if key not in expected}
    assert all(default != "" for default in added.values()), "an argument that 0.1.0 did not need"
    changed = CHANGED_DEFAULTS.get(name, {})
    assert {key: found[key] for key in kept} == {**expected, **changed}


@pytest.mark.parametrize("module", MODULES)
def test_modules_are_where_they_were(module):
    if module.startswith("demo."):
        pytest.importorskip("sklearn")
        pytest.importorskip("matplotlib")
    importlib.import_module(f"trak_ext.{module}")


def test_all_names_are_there_once_the_package_is_imported():
    code = (
        "import sys, trak_ext; before = set(sys.modules); from trak_ext import *; "
        "print(all(hasattr(trak_ext, name) for name in trak_ext.__all__)); "
        "print(trak_ext.reference.score.__module__, 'trak_ext.reference' in before)"
    )
    assert run_python(code).stdout.split() == ["True", "trak_ext.reference", "False"]
    assert sorted(trak_ext.__all__) == trak_ext.__all__


def test_scores_of_the_old_module_are_those_of_the_package():
    scoring = importlib.import_module("trak_ext.scoring")
    assert scoring is trak_ext.scoring
    for name in ("score", "top_k", "TopK"):
        assert getattr(scoring, name) is getattr(trak_ext, name)


def test_a_name_that_is_not_there_is_said():
    with pytest.raises(AttributeError, match=r"^module 'trak_ext' has no attribute 'scores'$"):
        trak_ext.scores  # noqa: B018
