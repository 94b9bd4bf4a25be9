"""The stub trak_ext/_C.pyi says what the compiled module has: names, arguments and properties."""

from __future__ import annotations

import ast
import re

import pytest

from folders import ROOT
from trak_ext import _C

STUB = ast.parse((ROOT / "trak_ext" / "_C.pyi").read_text())
CLASSES = {node.name: node for node in STUB.body if isinstance(node, ast.ClassDef)}
CONSTANTS = {node.target.id for node in STUB.body if isinstance(node, ast.AnnAssign)}
# Names that every module, and every class, has.
OF_EVERY_MODULE = {"__doc__", "__file__", "__loader__", "__name__", "__package__", "__spec__"}


def overloads(name: str, body: list[ast.stmt]) -> list[ast.FunctionDef]:
    return [node for node in body if isinstance(node, ast.FunctionDef) and node.name == name]


FUNCTIONS = {node.name for node in STUB.body if isinstance(node, ast.FunctionDef)}


def arguments(function: ast.FunctionDef) -> list[str]:
    """Return a function's arguments in the stub; "*" where they become keywords."""
    keywords = [a.arg for a in function.args.kwonlyargs]
    names = [a.arg for a in function.args.args] + (["*", *keywords] if keywords else [])
    return [name for name in names if name != "self"]


def bound_arguments(doc: str, name: str) -> list[list[str]]:
    """Return the arguments of each overload, from the signatures that pybind11 writes."""
    found = []
    for inside in re.findall(rf"^(?:\d+\. )?{name}\((.*)\) ->", doc, re.MULTILINE):
        inside = inside.removeprefix("self: ")
        # Types hold commas and brackets, but no name before a colon.
        names = re.findall(r"(?:^|, )(\*|\w+(?=:))", inside)
        found.append(names)
    return found


def only_with_cuda(name: str) -> bool:
    return name.lower().startswith("cuda_") and name != "cuda_build"


def test_stub_and_module_have_the_same_names():
    stub = FUNCTIONS | CONSTANTS | CLASSES.keys()
    if _C.cuda_build() is None:
        stub = {name for name in stub if not only_with_cuda(name)}
    assert set(dir(_C)) - OF_EVERY_MODULE == stub


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_stub_and_module_have_the_same_arguments(name):
    if not hasattr(_C, name) and only_with_cuda(name):
        pytest.skip("trak_ext was built without CUDA")
    bound = bound_arguments(getattr(_C, name).__doc__, name)
    assert bound, getattr(_C, name).__doc__
    stub = [arguments(function) for function in overloads(name, STUB.body)]
    # An overload that the stub writes as a union stands once there.
    assert [a for i, a in enumerate(bound) if a not in bound[:i]] == stub


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_stub_and_module_have_the_same_classes(name):
    body, bound = CLASSES[name].body, getattr(_C, name)
    (init,) = overloads("__init__", body)
    (signature,) = bound_arguments(bound.__init__.__doc__, "__init__")
    assert [a for a in signature if a != "self"] == arguments(init)
    properties = {node.name for node in body if isinstance(node, ast.FunctionDef)} - {"__init__"}
    assert {name for name in vars(bound) if not name.startswith("_")} == properties
    assert properties == set(arguments(init)) - {"*"}
