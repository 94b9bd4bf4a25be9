"""Attributions in a folder, from which a report can be made without the model or the data.

`bundle.json` says everything but the numbers and pictures, which are in `bundle.safetensors`. The
first holds a digest of the second and one of itself, and is written last: what was cut short or
changed is refused.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import _check
from .attributions import Attributions, Item, LDSSummary, label_text

FORMAT = "trak_ext attributions"
FORMAT_VERSION = 1
JSON_NAME = "bundle.json"
TENSORS_NAME = "bundle.safetensors"
_FOREIGN = (AttributeError, LookupError, RuntimeError, TypeError, ValueError)  # of odd content
_ITEM_FIELDS = ("text", "label", "prediction", "caption", "id", "highlight")
_PLAIN = ("title", "note", "num_train", "settings", "damping", "fingerprint")  # JSON as they are


class BundleError(ValueError):
    """A folder that holds no bundle, or a damaged one."""


def save_bundle(folder: str | os.PathLike[str], attributions: Attributions) -> None:
    """Write attributions into a folder, which is made if it is not there.

    Raises:
        TypeError: not `Attributions`.
        OSError: the folder cannot be made or written.
    """
    from safetensors.torch import save

    check_attributions(attributions)
    tensors: dict[str, Tensor] = {
        f"{side}.{name}": tensor
        for side in ("proponents", "opponents")
        for name, tensor in zip(("values", "indices"), getattr(attributions, side), strict=True)
    }

    def record(name: str, item: Item) -> dict[str, Any]:
        if item.image is not None:
            tensors[name] = item.image
        fields = {field: getattr(item, field) for field in _ITEM_FIELDS}
        return {key: _shown(value) for key, value in fields.items() if value is not None}

    content: dict[str, Any] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        **{name: getattr(attributions, name) for name in _PLAIN},
        "targets": [record(f"target.{i}", item) for i, item in enumerate(attributions.targets)],
        "train_items": {
            str(i): record(f"train.{i}", item) for i, item in attributions.train_items.items()
        },
        "lds": {name: _to_json(value) for name, value in attributions.lds.items()},
        "target_lds": _to_json(attributions.target_lds),
    }
    # Clones, as safetensors refuses tensors that share memory: an item may be shown twice.
    data = save({name: tensor.clone() for name, tensor in tensors.items()})
    content["tensors_sha256"] = hashlib.sha256(data).hexdigest()
    content["sha256"] = _digest(content)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / TENSORS_NAME, data)
    text = json.dumps(content, indent=1, allow_nan=False)
    write_whole(folder / JSON_NAME, text.encode())


def load_bundle(folder: str | os.PathLike[str]) -> Attributions:
    """Read what `save_bundle` wrote.

    Raises:
        BundleError: no folder, no bundle in it, a damaged one, or one of another version.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    folder = Path(folder)
    path = folder / JSON_NAME
    try:
        content = json.loads(path.read_bytes())
        data = (folder / TENSORS_NAME).read_bytes()
    except OSError as error:
        raise BundleError(
            f"bundle: expected a folder with {JSON_NAME} and {TENSORS_NAME}, as "
            f"trak_ext.report.save_bundle writes it, got {error}"
        ) from None
    except ValueError:
        raise _damaged(path) from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise BundleError(f"bundle: expected {FORMAT} in {str(path)!r}, got another file")
    if content.get("format_version") != FORMAT_VERSION:
        raise BundleError(
            f"bundle: expected format version {FORMAT_VERSION} in {str(path)!r}, got "
            f"{content.get('format_version')!r}"
        )
    try:
        whole = content.pop("sha256", None) == _digest(content)
    except ValueError:  # a NaN that was never written
        whole = False
    if not whole:
        raise _damaged(path)
    if content.get("tensors_sha256") != hashlib.sha256(data).hexdigest():
        raise _damaged(folder / TENSORS_NAME)
    try:
        return _attributions(content, load(data))
    except (*_FOREIGN, SafetensorError) as error:
        raise BundleError(
            f"bundle: expected whole attributions in {str(folder)!r}, got {error}"
        ) from error


def check_attributions(attributions: Any) -> None:
    """Refuse what is not `Attributions`."""
    expected = "a trak_ext.report.Attributions"
    _check.instance("attributions", attributions, Attributions, expected)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file under another name first, so that what bears its own name is whole."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _attributions(content: dict[str, Any], tensors: dict[str, Tensor]) -> Attributions:
    def item(name: str, record: dict[str, Any]) -> Item:
        pixels = tensors.get(name)
        return Item(None if pixels is None else pixels.permute(2, 0, 1), **record)

    target_lds = content["target_lds"]
    return Attributions(
        [item(f"target.{i}", record) for i, record in enumerate(content["targets"])],
        (tensors["proponents.values"], tensors["proponents.indices"]),
        (tensors["opponents.values"], tensors["opponents.indices"]),
        {int(i): item(f"train.{i}", record) for i, record in content["train_items"].items()},
        lds={name: LDSSummary(*_from_json(value)) for name, value in content["lds"].items()},
        target_lds=None if target_lds is None else _from_json(target_lds),
        # Bundles of 0.1.0 say nothing of damping.
        **{name: content[name] for name in _PLAIN if name != "damping"},
        damping=content.get("damping"),
    )


def _digest(content: dict[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _damaged(path: Path) -> BundleError:
    return BundleError(f"bundle: expected {str(path)!r} as it was written, got other bytes")


def _shown(value: Any) -> Any:
    """Return the text that a page shows for a label that is not finite, as JSON cannot hold it."""
    if isinstance(value, float) and not math.isfinite(value):
        return label_text(value)
    return value


def _to_json(figures: Any) -> Any:
    """Return figures as JSON can hold them: null for NaN, text for infinite ones."""
    if isinstance(figures, (list, tuple)):
        return [_to_json(figure) for figure in figures]
    if figures is None or math.isfinite(figures):
        return figures
    return None if math.isnan(figures) else str(figures)


def _from_json(figures: Any) -> Any:
    if isinstance(figures, list):
        return [_from_json(figure) for figure in figures]
    return math.nan if figures is None else float(figures)
