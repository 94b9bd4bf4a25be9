"""A model's checkpoints, in memory or on disk, checked against it; and where it computes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .batches import tensor_bytes
from .weight_files import WRAPPERS, read_weights, same_values, without_prefixes

Checkpoint = Mapping[str, Tensor] | str | os.PathLike[str]


class Checkpoints:
    """The M checkpoints of an attribution; checkpoint m is number m, loaded when asked for.

    Args:
        model: Says which names and shapes a checkpoint has.
        sources: State dicts, or paths, see `read_weights`. None for the model as it is.
    """

    def __init__(self, model: nn.Module, sources: Sequence[Checkpoint] | None) -> None:
        self._model = model
        if sources is not None and (isinstance(sources, str) or not isinstance(sources, Sequence)):
            raise TypeError(
                "checkpoints: expected a list of state dicts or paths, got a "
                f"{type(sources).__name__}"
            )
        self._sources = None if sources is None else list(sources)
        if self._sources == []:
            raise ValueError("checkpoints: expected at least one, got an empty list")
        self.digests = [state_digest(self._read(m)) for m in range(len(self))]

    def __len__(self) -> int:
        return 1 if self._sources is None else len(self._sources)

    def load(self, index: int, device: torch.device) -> dict[str, Tensor]:
        """Return the weights of a checkpoint on a device; refuse ones that have changed."""
        state = self._read(index)
        if state_digest(state) != self.digests[index]:
            raise ValueError(
                f"checkpoints: expected checkpoint {index} with the weights it had when the "
                "Attributor was made, got others"
            )
        return {name: tensor.to(device) for name, tensor in state.items()}

    def _read(self, index: int) -> dict[str, Tensor]:
        name = f"checkpoints[{index}]"
        if self._sources is None:
            return self._complete("model", self._model.state_dict())
        source = self._sources[index]
        if isinstance(source, Mapping):
            return self._complete(name, source)
        if not isinstance(source, (str, os.PathLike)):
            raise TypeError(
                f"{name}: expected a state dict or a path, got a {type(source).__name__}"
                + (" (give its state_dict())" if isinstance(source, nn.Module) else "")
            )
        return self._complete(name, read_weights(name, Path(source), self._model))

    def _complete(self, name: str, state: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return a checked state of all the model's names; tied names stand for each other."""
        expected = self._model.state_dict()
        inside = [key for key in WRAPPERS if isinstance(state.get(key), Mapping)]
        if inside:
            raise ValueError(
                f"{name}: expected a state dict, got a mapping that has one as {inside[0]!r} "
                f"(give checkpoint[{inside[0]!r}])"
            )
        if not state.keys() <= expected.keys():
            state = without_prefixes(state, expected)
        for key, value in [*state.items(), *self._model.named_buffers()]:
            given = state.get(key, value)
            if isinstance(given, Tensor) and given.is_meta:
                raise ValueError(
                    f"{name}: expected tensors with values, got {key} on the meta device"
                )
        first_name: dict[int, str] = {}
        tied: dict[str, list[str]] = {}
        for key, parameter in self._model.named_parameters(remove_duplicate=False):
            tied.setdefault(first_name.setdefault(id(parameter), key), []).append(key)
        state = dict(state)
        for group in tied.values():
            given = [key for key in group if key in state]
            for key in given[1:]:
                if not torch.equal(state[given[0]], state[key]):
                    raise ValueError(
                        f"{name}: expected one weight for the tied names {given[0]} and {key}, "
                        "got two"
                    )
            for key in group:
                if given and key not in state and key in expected:
                    state[key] = state[given[0]]
        missing = [key for key in expected if key not in state]
        unknown = [key for key in state if key not in expected]
        if missing or unknown:
            raise ValueError(
                f"{name}: expected the names of the model's state dict, got "
                f"{len(missing)} missing ({', '.join(missing[:3])}) and "
                f"{len(unknown)} unknown ({', '.join(map(str, unknown[:3]))})"
            )
        replaced = {
            key
            for names in (self._model.named_parameters, self._model.named_buffers)
            for key, _ in names(remove_duplicate=False)
        }
        for key, tensor in expected.items():
            found = state[key]
            if key not in replaced:
                # Extra state, packed weights, scales: a module keeps them where nobody reaches.
                if not same_values(found, tensor):
                    raise ValueError(
                        f"{name}: expected {key} as the model has it, since it is neither a "
                        "parameter nor a buffer and cannot be replaced, got another"
                    )
                continue
            if not isinstance(found, Tensor) or found.shape != tensor.shape:
                shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
                raise ValueError(
                    f"{name}: expected {key} of shape {list(tensor.shape)}, got {shape}"
                )
            if found.dtype != tensor.dtype:
                raise ValueError(
                    f"{name}: expected {key} of {tensor.dtype} as the model has it, got "
                    f"{found.dtype} (convert the model or the checkpoint: their outputs differ)"
                )
        return {key: state[key] for key in expected if isinstance(expected[key], Tensor)}


def state_digest(state: Mapping[str, Tensor]) -> str:
    """Return a digest of named tensors: names, dtypes, shapes and bytes."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(state):
        tensor = state[name]
        digest.update(f"{name}|{tensor.dtype}|{list(tensor.shape)}|".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def choose_device(model: nn.Module, device: Any = None) -> torch.device:
    """Return a device of this machine: the one asked for, or the model's first parameter's."""
    if device is None:
        parameter = next(model.parameters(), None)
        device = "cpu" if parameter is None else parameter.device
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, TypeError, AssertionError, ValueError) as error:
        reason = ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
        raise ValueError(
            f"device: expected a torch device of this machine, got {device!r} ({reason})"
        ) from error
    if found.type == "meta":
        raise ValueError("device: expected one that tensors have values on, got the meta device")
    return found
