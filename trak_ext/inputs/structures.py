"""The structure of a batch as JSON, apart from its tensors: for digests, and to keep a batch."""

from __future__ import annotations

import json
import sys
from collections import UserDict
from collections.abc import Mapping
from typing import Any

from torch import Tensor


def take_apart(batch: Any) -> tuple[Any, list[Tensor]]:
    """Return a batch's structure as JSON, and its tensors in the structure's order.

    Lists and tuples are both "sequence", since batches are passed on as tuples. A key or a
    container that JSON has no word for stands as its type's name: the structure tells it apart,
    but the batch cannot be put together again.
    """
    tensors: list[Tensor] = []
    return _structure(batch, tensors), tensors


def structure_text(batch: Any) -> str:
    """Return the keys and containers of a batch as one line, for digests.

    Classes are not named: a module that is run as a script has another name than an imported one.
    """
    return json.dumps(_without_classes(take_apart(batch)[0]), separators=(",", ":"))


def _without_classes(structure: Any) -> Any:
    if not isinstance(structure, dict):
        return structure
    if "mapping" in structure:
        return {"mapping": [[key, _without_classes(item)] for key, item in structure["mapping"]]}
    if "sequence" in structure:
        fields = {key: structure[key] for key in ("fields",) if key in structure}
        return {"sequence": [_without_classes(item) for item in structure["sequence"]], **fields}
    return structure


def _structure(value: Any, tensors: list[Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors.append(value)
        return "tensor"
    if isinstance(value, Mapping):
        items = [[_key(key), _structure(item, tensors)] for key, item in value.items()]
        own: dict[str, Any] = {} if type(value) is dict else {"type": _type_name(value)}
        return {"mapping": items, **own}
    if isinstance(value, (tuple, list)):
        parts = [_structure(item, tensors) for item in value]
        own = {} if type(value) in (tuple, list) else {"type": _type_name(value)}
        if hasattr(value, "_fields"):
            own["fields"] = list(value._fields)
        return {"sequence": parts, **own}
    return {"other": _type_name(value)}


def _key(key: Any) -> Any:
    return key if key is None or type(key) in (str, int, bool) else {"other": repr(key)}


def _type_name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def put_together(structure: Any, tensors: list[Tensor]) -> Any:
    """Return the batch of a structure and its tensors.

    Containers that are no plain ones must be named tuples or kin of UserDict whose classes this
    process has imported already: nothing is imported or unpickled.

    Raises:
        ValueError: a structure that cannot be put together, naming what in it.
    """
    left = list(tensors)
    batch = _build(structure, left)
    if left:
        raise ValueError(f"{len(left)} tensors too many")
    return batch


def _build(structure: Any, left: list[Tensor]) -> Any:
    if structure == "tensor":
        if not left:
            raise ValueError("a tensor too few")
        return left.pop(0)
    if not isinstance(structure, dict) or "other" in structure:
        raise ValueError(f"a {structure['other']}" if isinstance(structure, dict) else "no batch")
    name = structure.get("type")
    if "mapping" in structure:
        for key, _ in structure["mapping"]:
            if isinstance(key, dict):
                raise ValueError(f"the key {key['other']}")
        built = {key: _build(item, left) for key, item in structure["mapping"]}
        return built if name is None else _class(name, UserDict)(built)
    parts = [_build(item, left) for item in structure["sequence"]]
    if name is None:
        return tuple(parts)
    kind = _class(name, tuple)
    if list(kind._fields) != structure.get("fields"):
        raise ValueError(f"a {name} of other fields")
    return kind._make(parts)


def _class(name: str, kind: type) -> Any:
    """Return an imported class by its full name."""
    module, _, qualified = name.rpartition(".")
    found = getattr(sys.modules.get(module), qualified, None)
    fits = isinstance(found, type) and issubclass(found, kind)
    if not fits or (kind is tuple and not hasattr(found, "_fields")):
        raise ValueError(f"a {name}")
    return found
