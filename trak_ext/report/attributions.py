"""What a report shows: targets with their proponents and opponents, and how they came about."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _check
from ..evaluation import LDS
from ..kernels.score_pass import TopK
from .pictures import pixels_of

TITLE = "Which training examples made the model say this?"


@dataclass(frozen=True, eq=False)
class Item:
    """A training sample or target as a report shows it. Everything is optional.

    Args:
        image: Tensor [H, W] or [C, H, W] with C = 1, 3 or 4, floating point in [0, 1] or uint8; or
            a PIL image. Kept as uint8 [H, W, C], scaled down to 192 pixels on its longer side.
        text: Shown as it is, line breaks included.
        label: The true class or value.
        prediction: What the model said; for a target.
        caption: A line that goes with the picture or the text.
        id: The data set's name for the sample; None for its position.
        highlight: (start, stop) of the characters of `text` to mark, a token for example.

    Raises:
        TypeError, ValueError: an argument that is not of this kind.
    """

    image: Any = None
    text: str | None = None
    label: str | float | None = None
    prediction: str | float | None = None
    caption: str | None = None
    id: str | int | None = None
    highlight: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for name in ("text", "caption"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else _string(name, value))
        for name in ("label", "prediction", "id"):
            object.__setattr__(self, name, _plain(name, getattr(self, name)))
        if self.image is not None:
            object.__setattr__(self, "image", pixels_of(self.image))
        if self.highlight is not None:
            start, stop = self.highlight
            if self.text is None or not 0 <= start <= stop <= len(self.text):
                length = "no text" if self.text is None else f"a text of {len(self.text)}"
                raise ValueError(
                    f"highlight: expected (start, stop) within the text, got {start}, {stop} "
                    f"for {length}"
                )
            object.__setattr__(self, "highlight", (int(start), int(stop)))

    def named(self, name: str | int | None) -> Item:
        """Return the item with the loader's id where it has none of its own."""
        if self.id is not None or name is None:
            return self
        picture = self.image if self.image is None else self.image.permute(2, 0, 1)
        return replace(self, image=picture, id=name)


class LDSSummary(NamedTuple):
    """A linear datamodeling score as a report shows it; NaN where it is not defined."""

    mean: float
    interval_targets: tuple[float, float]  # 95 %
    interval_subsets: tuple[float, float]  # 95 %


class Attributions:
    """Targets beside the training samples that speak for and against them.

    Args:
        targets: One Item per target, t of them, at least one.
        proponents: (values [t, p], indices [t, p]), highest score first, as
            `Attributor.attribute(..., top_k=p)` returns them; the ids that they carry name items
            that have no id of their own.
        opponents: The same with the lowest scores, most negative first (`largest=False`); None for
            none.
        train_items: The training samples by position: a sequence, a mapping, or a function of the
            position; only those that are shown are asked for.
        title: Above everything.
        note: A paragraph below the title.
        num_train: Number of training samples, to be stated; None for the length of `train_items`
            where it is a sequence, else not stated.
        lds: What `trak_ext.evaluation.lds` returned, or a mapping from a method's name to that; the
            first one is the headline.
        target_lds: The LDS of each target, [t]; NaN where it is not defined.
        settings: How the scores were made, as far as JSON can say it: `Attributor.settings`.
        damping: The damping of each checkpoint, [M] or [M, blocks], which says what "auto" chose:
            `Attributor.damping_`.
        fingerprint: Of those settings, weights and data: `Attributor.fingerprint`.

    Raises:
        TypeError, ValueError: shapes that do not fit, indices without a training item, scores that
            are not finite, settings that JSON cannot hold.
    """

    def __init__(
        self,
        targets: Sequence[Item],
        proponents: tuple[Tensor, Tensor],
        opponents: tuple[Tensor, Tensor] | None,
        train_items: Sequence[Item] | Mapping[int, Item] | Callable[[int], Item],
        *,
        title: str = TITLE,
        note: str | None = None,
        num_train: int | None = None,
        lds: LDS | Mapping[str, LDS | LDSSummary] | None = None,
        target_lds: Sequence[float] | Tensor | None = None,
        settings: Mapping[str, Any] | None = None,
        damping: Sequence[float] | Sequence[Sequence[float]] | Tensor | None = None,
        fingerprint: str | None = None,
    ) -> None:
        _check.instance("targets", targets, Iterable, "a list of Items")
        self.targets = [_item(f"targets[{i}]", item) for i, item in enumerate(targets)]
        if not self.targets:
            raise ValueError("targets: expected at least one Item, got none")
        names = getattr(proponents, "target_ids", None) or []
        if len(names) == len(self.targets):
            self.targets = [item.named(i) for item, i in zip(self.targets, names, strict=True)]
        ids = {**_sample_ids(proponents), **_sample_ids(opponents)}
        if opponents is None:
            nothing = torch.empty((len(self.targets), 0), dtype=torch.float32, device="cpu")
            opponents = (nothing, nothing.long())
        self.proponents = _ranked("proponents", proponents, len(self.targets))
        self.opponents = _ranked("opponents", opponents, len(self.targets))
        if num_train is None and isinstance(train_items, Sequence):
            num_train = len(train_items)
        if num_train is not None:
            num_train = _check.integer("num_train", num_train, 0)
        self.num_train = num_train
        shown = self._shown_items(train_items)
        self.train_items = {index: item.named(ids.get(index)) for index, item in shown.items()}
        self.title = _string("title", title)
        self.note = None if note is None else _string("note", note)
        self.fingerprint = None if fingerprint is None else _string("fingerprint", fingerprint)
        self.lds = _summaries(lds)
        self.target_lds: list[float] | None = None
        if target_lds is not None:
            size = (len(self.targets),)
            expected = f"{size[0]} correlations in [-1, 1], one per target"
            found = _numbers(
                "target_lds",
                target_lds,
                expected,
                lambda x: x.shape == size and not (x.abs() > 1).any(),  # NaN is not defined
            )
            self.target_lds = found.tolist()
        self.settings = _settings(settings)
        # Of each checkpoint's projection blocks; an empty list where it is not told.
        self.damping: list[list[float]] = []
        if damping is not None:
            found = _numbers(
                "damping",
                damping,
                "finite numbers of at least 0 [M] or [M, blocks], as Attributor.damping_ has them",
                lambda x: x.dim() in (1, 2) and bool((x.isfinite() & (x >= 0)).all()),
            )
            self.damping = [row.reshape(-1).tolist() for row in found]

    def is_wrong(self, i: int) -> bool:
        """Say whether target i has a label and a prediction that is another one."""
        item = self.targets[i]
        if item.label is None or item.prediction is None:
            return False
        return label_text(item.prediction) != label_text(item.label)

    def _shown_items(self, train_items: Any) -> dict[int, Item]:
        """Return the items of all indices that are shown, in ascending order."""
        if not callable(train_items) and not hasattr(train_items, "__getitem__"):
            raise TypeError(
                "train_items: expected Items by position or a function of it, got "
                f"{_check.describe(train_items)}"
            )
        indices = torch.cat([self.proponents.indices.flatten(), self.opponents.indices.flatten()])
        find = train_items if callable(train_items) else train_items.__getitem__
        shown = {}
        for index in indices.unique().tolist():
            if index < 0 or (self.num_train is not None and index >= self.num_train):
                last = "" if self.num_train is None else f"..{self.num_train - 1}"
                raise ValueError(
                    f"proponents and opponents: expected indices in 0{last}, got {index}"
                )
            try:
                item = find(index)
            except LookupError:
                raise ValueError(
                    f"train_items: expected an Item for every index shown, got none for {index}"
                ) from None
            shown[index] = _item(f"train_items[{index}]", item)
        return shown


def label_text(label: str | float | None) -> str:
    """Return a label as people write it: no more than six digits of a float."""
    if label is None:
        return ""
    return f"{label:.6g}".replace("-", "−") if isinstance(label, float) else str(label)


def _string(name: str, value: Any) -> str:
    _check.instance(name, value, str, "a string")
    return str.__str__(value)  # of a class that calls itself HTML, the text alone


def _plain(name: str, value: Any) -> str | int | float | bool | None:
    """Return a label or an id as a plain Python value; tensors of one number are welcome."""
    single = value.numel() if isinstance(value, Tensor) else getattr(value, "size", None)
    if single == 1 and hasattr(value, "item"):
        value = value.item()
    if isinstance(value, str):
        return _string(name, value)
    if value is None or isinstance(value, (int, float)):
        return value
    raise TypeError(f"{name}: expected a string or a number, got {_check.describe(value)}")


def _item(name: str, item: Any) -> Item:
    _check.instance(name, item, Item, "a trak_ext.report.Item")
    found: Item = item
    return found


def _sample_ids(ranked: Any) -> dict[int, str | int]:
    """Return the ids by position that `Attributor.attribute` found in the training loader."""
    rows = getattr(ranked, "ids", None) or []
    return {
        position: name
        for i, row in enumerate(rows)
        for position, name in zip(ranked.indices[i].tolist(), row, strict=True)
    }


def _ranked(name: str, ranked: Any, num_targets: int) -> TopK:
    if not isinstance(ranked, tuple) or len(ranked) != 2:
        raise TypeError(f"{name}: expected (values, indices), got {_check.describe(ranked)}")
    values, indices = ranked
    for tensor in ranked:
        _check.instance(name, tensor, Tensor, "two tensors")
    if values.dim() != 2 or len(values) != num_targets or indices.shape != values.shape:
        raise ValueError(
            f"{name}: expected values and indices of one shape [{num_targets}, k], got "
            f"{list(values.shape)} and {list(indices.shape)}"
        )
    if indices.dtype != torch.int64:
        raise ValueError(f"{name}: expected int64 indices, got {indices.dtype}")
    _check.tensor(f"{name}[0]", values, 2)
    return TopK(values.detach().cpu().double().contiguous(), indices.cpu().contiguous())


def _summaries(lds: Any) -> dict[str, LDSSummary]:
    if lds is None:
        return {}
    found = {}
    for name, value in (lds if isinstance(lds, Mapping) else {"TRAK": lds}).items():
        try:
            intervals = [
                (float(low), float(high))
                for low, high in (value.interval_targets, value.interval_subsets)
            ]
            found[_string("lds", str(name))] = LDSSummary(float(value.mean), *intervals)
        except (AttributeError, TypeError, ValueError):
            raise TypeError(
                f"lds: expected what trak_ext.evaluation.lds returns, or such by name, got "
                f"{_check.describe(value)}"
            ) from None
    return found


def _numbers(name: str, values: Any, expected: str, fits: Callable[[Tensor], bool]) -> Tensor:
    """Return values as fp64; refuse what are no numbers or do not fit."""
    try:
        found = torch.as_tensor(values, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        found = None
    if found is None or not fits(found):
        raise ValueError(f"{name}: expected {expected}, got {_check.describe(values)}")
    return found


def _settings(settings: Any) -> dict[str, Any]:
    try:
        found = json.loads(json.dumps({} if settings is None else settings, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"settings: expected what JSON can hold, got {error}") from None
    if not isinstance(found, dict):
        raise TypeError(f"settings: expected a mapping, got {_check.describe(settings)}")
    return found
