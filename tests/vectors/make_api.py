"""Writes the public names of the installed trak_ext, with their parameters and defaults, as JSON.

    python -P tests/vectors/make_api.py > tests/vectors/api_0_1_0.json

api_0_1_0.json is of version 0.1.0; it is never written again.
"""

from __future__ import annotations

import importlib
import inspect
import json
from typing import Any

MODULES = ("trak_ext", *(f"trak_ext.{name}" for name in ("tasks", "evaluation", "baselines")))
MODULES += ("trak_ext.report", "trak_ext.scoring", "trak_ext.gradients")


def parameters(value: Any) -> dict[str, str] | None:
    """Return what a callable takes, each with how its default prints; None for what is no call."""
    try:
        found = inspect.signature(value).parameters.values()
    except (TypeError, ValueError):
        return None
    empty = inspect.Parameter.empty
    return {p.name: "" if p.default is empty else repr(p.default) for p in found}


def public(module: str) -> dict[str, Any]:
    """Return the names of a module and the public methods of its classes: their parameters."""
    found = {}
    owner = importlib.import_module(module)
    for name in getattr(owner, "__all__", ["TopK", "score", "top_k"]):
        value = getattr(owner, name)
        found[name] = parameters(value) if callable(value) else None
        for key, method in vars(value).items() if inspect.isclass(value) else ():
            if inspect.isfunction(method) and not key.startswith("_"):
                found[f"{name}.{key}"] = parameters(method)
            elif isinstance(method, property) and not key.startswith("_"):
                found[f"{name}.{key}"] = None
    return found


if __name__ == "__main__":
    print(json.dumps({module: public(module) for module in MODULES}, indent=1))
