"""Weights on disk as people have them: files, training frameworks' checkpoints, folders, adapters.

Whatever is read comes back as a mapping of names to tensors; nothing is unpickled that could run
code.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# What training frameworks call the weights within what they save.
WRAPPERS = ("state_dict", "model_state_dict", "model")
# Of a Hugging Face folder, the first that is there.
_WHOLE = (
    *("model.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
_ADAPTER = ("adapter_model.safetensors", "adapter_model.bin")
# Of an adapter's configuration, what decides what its weights compute.
_ADAPTER_SETTINGS = (
    *("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "alpha_pattern", "rank_pattern"),
    *("fan_in_fan_out", "bias"),
)


def read_weights(name: str, path: Path, model: nn.Module) -> Mapping[str, Any]:
    """Return the state dict that a file or folder holds for a model.

    Args:
        name: What it is called in errors.
        path: A safetensors file, what `torch.save` wrote of tensors, an index of shards, or a
            folder of Hugging Face's library; an adapter's folder where the model has adapters.

    Raises:
        FileNotFoundError, ValueError: one sentence with the path.
    """
    if path.is_dir():
        return _read_folder(name, path, model)
    if not path.is_file():
        raise FileNotFoundError(f"{name}: expected a file, got none at {str(path)!r}")
    loaded = _read_index(name, path) if path.name.endswith(".json") else _read_file(name, path)
    inside = [key for key in WRAPPERS if isinstance(loaded.get(key), Mapping)]
    if len(inside) > 1:
        raise ValueError(
            f"{name}: expected one state dict in {str(path)!r}, got {' and '.join(inside)} "
            "(load it, and give the one that is meant)"
        )
    return loaded[inside[0]] if inside else loaded


def without_prefixes(state: Mapping[str, Any], expected: Collection[str]) -> Mapping[str, Any]:
    """Return a state dict without what wrappers put before its names, where that makes them fit.

    "module." of DataParallel, "_orig_mod." of torch.compile, and one name that all begin with, such
    as the "model." of a training framework's module.
    """
    if not all(isinstance(key, str) for key in state):
        return state
    plain = {re.sub(r"(^|\.)(_orig_mod\.)+", r"\1", key): key for key in state}
    while not set(plain) <= set(expected) and all(key.startswith("module.") for key in plain):
        plain = {key.removeprefix("module."): given for key, given in plain.items()}
    first = next(iter(plain), "").split(".")[0] + "."
    if not set(plain) <= set(expected) and all(key.startswith(first) for key in plain):
        shorter = {key.removeprefix(first): given for key, given in plain.items()}
        plain = shorter if set(shorter) <= set(expected) else plain
    fits = len(plain) == len(state) and set(plain) <= set(expected)
    return {key: state[given] for key, given in plain.items()} if fits else state


def _read_file(name: str, path: Path) -> Mapping[str, Any]:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            loaded: Any = load_file(path)
        else:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
        raise ValueError(
            f"{name}: expected safetensors or a state dict of tensors alone in {str(path)!r}, "
            f"got a file that does not load ({reason})"
        ) from error
    if not isinstance(loaded, Mapping):
        raise ValueError(
            f"{name}: expected a state dict in {str(path)!r}, got a {type(loaded).__name__}"
        )
    return loaded


def _read_json(name: str, path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name}: expected JSON in {str(path)!r}, got a file that does not load "
            f"({type(error).__name__})"
        ) from error
    if not isinstance(found, dict):
        raise ValueError(f"{name}: expected a JSON object in {str(path)!r}, got another")
    return found


def _read_index(name: str, path: Path) -> Mapping[str, Any]:
    """Return the weights of the shards that an index names."""
    places = _read_json(name, path).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(v, str) for v in places.values()):
        raise ValueError(f"{name}: expected a 'weight_map' in {str(path)!r}, got none")
    state: dict[str, Any] = {}
    for shard in sorted(set(places.values())):
        file = path.parent / shard
        if Path(shard).name != shard or not file.is_file():
            raise FileNotFoundError(f"{name}: expected the shard {shard!r} beside {str(path)!r}")
        state.update(_read_file(name, file))
    absent = [key for key in places if key not in state]
    if absent:
        raise ValueError(
            f"{name}: expected {absent[0]} in {places[absent[0]]!r} as {str(path)!r} says, got none"
        )
    return state


def _read_folder(name: str, path: Path, model: nn.Module) -> Mapping[str, Any]:
    if (path / "adapter_config.json").is_file():
        file = next((path / known for known in _ADAPTER if (path / known).is_file()), None)
        if file is not None:
            return _with_adapter(name, path, _read_file(name, file), model)
    for known in _WHOLE:
        file = path / known
        if file.is_file():
            is_index = known.endswith(".json")
            return _read_index(name, file) if is_index else _read_file(name, file)
    raise FileNotFoundError(
        f"{name}: expected a file, or a folder with one of {', '.join((*_WHOLE, *_ADAPTER))}, "
        f"got the folder {str(path)!r} without"
    )


def _with_adapter(
    name: str, path: Path, adapter: Mapping[str, Any], model: nn.Module
) -> Mapping[str, Any]:
    """Return the model's state dict with an adapter's weights in the place of its own."""
    configs = getattr(model, "peft_config", None)
    active = getattr(model, "active_adapter", None)
    if not isinstance(configs, Mapping) or not isinstance(active, str) or active not in configs:
        raise ValueError(
            f"{name}: expected a model with one active adapter for the adapter in {str(path)!r}, "
            f"got a {type(model).__name__} (make it with peft.get_peft_model)"
        )
    stored = _read_json(name, path / "adapter_config.json")
    for key in _ADAPTER_SETTINGS:
        own: Any = getattr(configs[active], key, None)
        own = getattr(own, "value", own)
        if key in stored and stored[key] != own:
            raise ValueError(
                f"{name}: expected an adapter with {key} = {own!r} as the model's, got "
                f"{stored[key]!r} in {str(path)!r}"
            )
    # Files leave the adapter's name out of the names of its weights.
    marked = re.compile(rf"\.(modules_to_save\.)?{re.escape(active)}(?=\.|$)")
    state = dict(model.state_dict())
    places = {marked.sub("", key): key for key in state if marked.search(key)}
    missing = [key for key in places if key not in adapter]
    unknown = [key for key in adapter if key not in places]
    if missing or unknown:
        raise ValueError(
            f"{name}: expected the weights of the model's adapter {active!r} in {str(path)!r}, got "
            f"{len(missing)} missing ({', '.join(missing[:3])}) and {len(unknown)} unknown "
            f"({', '.join(unknown[:3])})"
        )
    state.update({places[key]: value for key, value in adapter.items()})
    return state


def same_values(a: Any, b: Any) -> bool:
    """Return whether two values of a state dict are the same; what cannot be compared is not."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
            return False
        return a.dtype == b.dtype and a.shape == b.shape and bool(torch.equal(a.cpu(), b.cpu()))
    if type(a) is not type(b):
        return False
    if isinstance(a, Mapping):
        return list(a) == list(b) and all(same_values(a[key], b[key]) for key in a)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(same_values(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, torch.ScriptObject):  # packed weights of quantized modules
        if not hasattr(a, "__getstate__"):
            return False
        return same_values(a.__getstate__(), b.__getstate__())
    try:
        return bool(a == b)
    except Exception:  # whatever its own comparison raises
        return False
