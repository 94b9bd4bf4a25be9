"""Batches: samples in order, ids, containers, structure, and the digest that tells data apart.

A sample's position is its identity. A batch is tensors with samples in front, in nested tuples,
lists and mappings.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import UserDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import _check

SampleId = int | str

ID_KEY = "sample_id"

_HUGGING_FACE_KEYS = ("input_ids", "pixel_values", "input_values", "input_features")


class Segment(NamedTuple):
    """Consecutive samples start .. stop - 1, with their ids where the loader gives them."""

    start: int
    stop: int
    batch: Any
    ids: list[SampleId] | None


def segments(
    loader: Iterable[Any], device: torch.device, boundary: int, ids_as: Sequence[Any] = ()
) -> Iterator[Segment]:
    """Yield samples in order, cut where a sample's number is a multiple of `boundary`.

    Batches are cut, never joined: samples of two batches may differ in length. A mapping's
    "sample_id" (a tensor or NumPy array [B], or a list, of strings or integers) is taken out of it.

    Args:
        ids_as: Other places of ids, where a task uses them for nothing else: keys of a mapping, and
            2 for the third of a sequence of three.
    """
    position = 0
    with_ids: bool | None = None
    told: set[str] = set()
    for whole in loader:
        batch, ids = split_ids(_numbers_alone(whole, ids_as, told), ids_as)
        size = batch_size(batch)
        if size == 0:
            continue
        if ids is not None and len(ids) != size:
            raise ValueError(f"{ID_KEY}: expected {size} as the batch's samples, got {len(ids)}")
        if with_ids is not None and with_ids != (ids is not None):
            raise ValueError(f"{ID_KEY}: expected in every batch or in none, got it in some")
        with_ids = ids is not None
        taken = 0
        while taken < size:
            count = min(boundary - position % boundary, size - taken)
            part = map_tensors(lambda t, a=taken, b=taken + count: t[a:b].to(device), batch)  # type: ignore[misc]
            own = None if ids is None else ids[taken : taken + count]
            yield Segment(position, position + count, part, own)
            position += count
            taken += count


def split_ids(batch: Any, ids_as: Sequence[Any] = ()) -> tuple[Any, list[SampleId] | None]:
    """Return a batch without its ids, and the ids, if it has them; see `segments`."""
    if isinstance(batch, (tuple, list)) and len(batch) == 3 and 2 in ids_as:
        rest: Any = tuple(batch[:2])
        given = batch[2]
    elif isinstance(batch, Mapping):
        key = next((key for key in (ID_KEY, *ids_as) if key in batch), None)
        if key is None:
            return batch, None
        given = batch[key]
        rest = _like(batch, {name: value for name, value in batch.items() if name != key})
    else:
        return batch, None
    if isinstance(given, (torch.Tensor, np.ndarray)):
        if given.ndim != 1:
            raise ValueError(f"{ID_KEY}: expected shape [B], got {list(given.shape)}")
        given = given.tolist()
    if not isinstance(given, (list, tuple)):
        raise TypeError(
            f"{ID_KEY}: expected strings or integers as a list, a tensor or an array, got a "
            f"{type(given).__name__}"
        )
    ids = [_plain_id(value) for value in given]
    other = [type(value).__name__ for value in ids if type(value) not in (int, str)]
    if other:
        raise TypeError(f"{ID_KEY}: expected strings or integers, got a {other[0]}")
    return rest, ids


def _numbers_alone(batch: Any, ids_as: Sequence[Any], told: set[str]) -> Any:
    """Return a batch of a Hugging Face kind without columns of text, about which it warns once.

    Of other batches nothing is left out. `told` has the columns that a pass has warned about.
    """
    if not isinstance(batch, Mapping) or not (
        isinstance(batch, UserDict) or any(key in batch for key in _HUGGING_FACE_KEYS)
    ):
        return batch
    kept = {
        key: value
        for key, value in batch.items()
        if key in (ID_KEY, *ids_as) or not _is_text(value)
    }
    if len(kept) == len(batch):
        return batch
    left_out = [str(key) for key in batch if key not in kept]
    if not told.issuperset(left_out):
        told.update(left_out)
        _check.warn(
            f"trak_ext leaves out the columns of a batch that are no tensors: {', '.join(left_out)}"
        )
    return _like(batch, kept)


def _is_text(value: Any) -> bool:
    """Return whether a column has no numbers: None, strings, or lists and arrays of those."""
    if isinstance(value, np.ndarray):
        return value.dtype.kind in "OUSV"
    if isinstance(value, (list, tuple)):
        return not value or any(_is_text(part) for part in value)
    return value is None or isinstance(value, (str, bytes))


def _plain_id(value: Any) -> Any:
    """Return a NumPy or torch integer, or a NumPy string, as Python's."""
    if isinstance(value, np.generic) or (isinstance(value, torch.Tensor) and value.ndim == 0):
        return value.item()
    return value


# --- batches --------------------------------------------------------------------------------------


def map_tensors(function: Callable[[Tensor], Tensor], batch: Any, place: str = "batch") -> Any:
    """Return a batch (nested tuples, lists and mappings of tensors) with every tensor mapped.

    NumPy arrays are taken as tensors. Named tuples and kin of UserDict (Hugging Face's
    BatchEncoding) stay what they are, other mappings become dicts and other sequences tuples.
    `place` is what errors call the batch.
    """
    if isinstance(batch, Tensor) and _odd_tensor(batch) is None:
        return function(batch)
    if isinstance(batch, np.ndarray) and _odd_array(batch) is None:
        native = batch.astype(batch.dtype.newbyteorder("="), order="C")  # torch takes no other
        return function(torch.from_numpy(native))
    if isinstance(batch, Mapping):
        mapped = {
            key: map_tensors(function, value, f"{place}[{key!r}]") for key, value in batch.items()
        }
        return _like(batch, mapped)
    if isinstance(batch, (tuple, list)):
        parts = [map_tensors(function, v, f"{place}[{i}]") for i, v in enumerate(batch)]
        return _like(batch, parts)
    kind = "text" if isinstance(batch, (str, bytes)) else f"a {type(batch).__name__}"
    if isinstance(batch, np.ndarray):
        kind = f"{_odd_array(batch)} of {batch.dtype}"
    if isinstance(batch, Tensor):
        raise TypeError(
            f"{place}: expected a dense tensor with values, whose rows are the samples, got a "
            f"{_odd_tensor(batch)} one (to_dense(), to_padded_tensor() or dequantize() first)"
        )
    raise TypeError(
        f"{place}: expected tensors in tuples, lists or mappings, got {kind} (leave it out, or "
        f"give ids as {ID_KEY!r})"
    )


def can_be_cut(tensor: Tensor) -> bool:
    """Return whether samples can be cut out of a tensor: a strided one, with values."""
    return _odd_tensor(tensor) is None


def _odd_tensor(tensor: Tensor) -> str | None:
    """Return why samples cannot be cut out of a tensor, None where they can."""
    if tensor.is_nested:
        return "nested"
    if tensor.layout != torch.strided:
        return "sparse"
    if tensor.is_quantized:
        return "quantized"
    return "meta" if tensor.is_meta else None


def _odd_array(array: np.ndarray[Any, Any]) -> str | None:
    """Return what an array is that no tensor is for, None for others."""
    if isinstance(array, np.ma.MaskedArray):
        return "a masked array"
    wide = array.dtype.kind == "f" and array.dtype.itemsize > 8
    return "an array" if wide or array.dtype.kind not in "biuf" else None


def _like(container: Any, parts: Any) -> Any:
    """Return parts in a container of the same kind, see `map_tensors`."""
    if not isinstance(parts, dict):
        return type(container)._make(parts) if hasattr(container, "_make") else tuple(parts)
    if not isinstance(container, UserDict):
        return parts
    try:
        made = type(container)(parts)
    except TypeError:
        made = None
    # A class that computes with what it is given would do so again with every copy.
    if (
        made is None
        or {**made}.keys() != parts.keys()
        or any(made[k] is not parts[k] for k in parts)
    ):
        raise TypeError(
            "batch: expected mappings whose class can be called with a dict, and holds what is in "
            f"it as it is, got a {type(container).__name__} (let collate_fn give a dict)"
        )
    return made


def plain_containers(batch: Any) -> Any:
    """Return a batch in dicts and tuples alone, which is what vmap takes."""
    if isinstance(batch, Mapping):
        return {key: plain_containers(value) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return tuple(plain_containers(value) for value in batch)
    return batch


def in_containers(parts: Any, batch: Any) -> Any:
    """Return what `plain_containers` gave for a batch of this kind in its containers again."""
    if isinstance(batch, Mapping):
        return _like(batch, {key: in_containers(parts[key], batch[key]) for key in batch})
    if isinstance(batch, (tuple, list)):
        return _like(batch, [in_containers(p, b) for p, b in zip(parts, batch, strict=True)])
    return parts


def batch_tensors(batch: Any) -> list[Tensor]:
    """Return a batch's tensors in order."""
    tensors: list[Tensor] = []
    map_tensors(lambda tensor: tensors.append(tensor) or tensor, batch)  # type: ignore[func-returns-value]
    return tensors


def batch_size(batch: Any) -> int:
    """Return the number of samples: the first dimension, the same for every tensor."""
    tensors = batch_tensors(batch)
    sizes = {tensor.shape[0] if tensor.dim() else None for tensor in tensors}
    if len(sizes) != 1 or None in sizes:
        raise ValueError(
            "batch: expected tensors with one number of samples in front, got shapes "
            f"{[list(tensor.shape) for tensor in tensors]}"
        )
    size = sizes.pop()
    assert size is not None
    return size


# --- digests --------------------------------------------------------------------------------------


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return a tensor's values in row-major order as bytes."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy().data) if flat.numel() else memoryview(b"")


class SampleDigest:
    """A digest of samples in order, the same however they were cut into batches."""

    def __init__(self) -> None:
        self._digest = hashlib.blake2b(digest_size=16)

    def update(
        self,
        tensors: list[Tensor],
        ids: Sequence[int | str] | None = None,
        structure: str = "",
    ) -> None:
        """Add the samples of a batch: tensors with samples in front, and ids if there are any.

        Args:
            structure: Of the batch: its keys and containers, `structure_text`.
        """
        rows = [self._rows(tensor) for tensor in tensors]
        said = f"{structure}|".encode()
        for i in range(tensors[0].shape[0]):
            self._digest.update(said)
            if ids is not None:
                self._digest.update(f"id {json.dumps(ids[i])}|".encode())
            for prefix, data in rows:
                self._digest.update(prefix)
                self._digest.update(data[i])

    def hexdigest(self) -> str:
        """Return the digest of all samples so far."""
        return self._digest.hexdigest()

    def add(self, batch: Any, ids: Sequence[int | str] | None = None) -> None:
        """Add the samples of a batch, with its keys and containers."""
        self.update(batch_tensors(batch), ids, structure_text(batch))

    @staticmethod
    def _rows(tensor: Tensor) -> tuple[bytes, np.ndarray[Any, Any]]:
        prefix = f"{tensor.dtype}|{list(tensor.shape[1:])}|".encode()
        count = tensor.shape[0]
        data = np.frombuffer(tensor_bytes(tensor), dtype=np.uint8)
        return prefix, data.reshape(count, data.size // max(count, 1))


# --- structure ------------------------------------------------------------------------------------


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
