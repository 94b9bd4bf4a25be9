"""What a report shows: targets with their proponents and opponents, and how they came about."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _check
from ..evaluation import LDS
from ..kernels.score_pass import TopK
from .items import Item

TITLE = "Which training examples made the model say this?"


class LDSSummary(NamedTuple):
    """A linear datamodeling score as a report shows it; NaN where it is not defined."""

    mean: float
    interval_targets: tuple[float, float]  # 95 %
    interval_subsets: tuple[float, float]  # 95 %


class Attributions:
    """Targets beside the training samples that speak for and against them.

    Args:
        targets: One Item a target, t of them, at least one.
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
        settings: How the scores were made, as far as JSON can say it.
        fingerprint: Of those settings, weights and data.

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
        fingerprint: str | None = None,
    ) -> None:
        if not isinstance(targets, Iterable):
            raise TypeError(f"targets: expected a list of Items, got {_check.describe(targets)}")
        self.targets = [_item(f"targets[{i}]", item) for i, item in enumerate(targets)]
        if not self.targets:
            raise ValueError("targets: expected at least one Item, got none")
        names = getattr(proponents, "target_ids", None)
        if names is not None and len(names) == len(self.targets):
            self.targets = list(map(_named, self.targets, names))
        known = {**_sample_ids(proponents), **_sample_ids(opponents)}
        if opponents is None:
            nothing = torch.empty((len(self.targets), 0), dtype=torch.float32, device="cpu")
            opponents = (nothing, nothing.long())
        self.proponents = _ranked("proponents", proponents, len(self.targets))
        self.opponents = _ranked("opponents", opponents, len(self.targets))
        if num_train is None and isinstance(train_items, Sequence):
            num_train = len(train_items)
        if num_train is not None:
            num_train = _check.integer("num_train", num_train, 0, 2**62)
        self.num_train = num_train
        self.train_items = {
            index: _named(item, known.get(index))
            for index, item in self._shown_items(train_items).items()
        }
        self.title = _string("title", title)
        self.note = None if note is None else _string("note", note)
        self.lds = _summaries(lds)
        self.target_lds = _target_lds(target_lds, len(self.targets))
        self.settings = _settings(settings)
        self.fingerprint = None if fingerprint is None else _string("fingerprint", fingerprint)

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


def _item(name: str, item: Any) -> Item:
    if not isinstance(item, Item):
        raise TypeError(f"{name}: expected a trak_ext.report.Item, got {_check.describe(item)}")
    return item


def _named(item: Item, name: str | int | None) -> Item:
    """Return an item with the loader's id where it has none of its own."""
    if item.id is not None or name is None:
        return item
    item = copy.copy(item)
    object.__setattr__(item, "id", name)
    return item


def _sample_ids(ranked: Any) -> dict[int, str | int]:
    """Return the ids by position that `Attributor.attribute` found in the training loader."""
    rows = getattr(ranked, "ids", None)
    if rows is None:
        return {}
    positions = ranked.indices.tolist()
    return {
        p: name
        for row, ids in zip(positions, rows, strict=True)
        for p, name in zip(row, ids, strict=True)
    }


def _string(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected a string, got {_check.describe(value)}")
    return value


def _ranked(name: str, ranked: Any, num_targets: int) -> TopK:
    if not isinstance(ranked, tuple) or len(ranked) != 2:
        raise TypeError(f"{name}: expected (values, indices), got {_check.describe(ranked)}")
    values, indices = ranked
    for tensor in ranked:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected two tensors, got {_check.describe(tensor)}")
    if values.dim() != 2 or len(values) != num_targets or indices.shape != values.shape:
        raise ValueError(
            f"{name}: expected values and indices of one shape [{num_targets}, k], got "
            f"{list(values.shape)} and {list(indices.shape)}"
        )
    if not values.is_floating_point() or indices.dtype != torch.int64:
        raise ValueError(
            f"{name}: expected floating-point values and int64 indices, got {values.dtype} and "
            f"{indices.dtype}"
        )
    if not values.isfinite().all():
        raise ValueError(f"{name}: expected finite scores, got NaN or infinite ones")
    return TopK(values.detach().cpu().double().contiguous(), indices.cpu().contiguous())


def _summaries(lds: Any) -> dict[str, LDSSummary]:
    if lds is None:
        return {}
    if not isinstance(lds, Mapping):
        lds = {"TRAK": lds}
    found = {}
    for name, value in lds.items():
        try:
            intervals = [
                (float(low), float(high))
                for low, high in (value.interval_targets, value.interval_subsets)
            ]
            found[str(name)] = LDSSummary(float(value.mean), *intervals)
        except (AttributeError, TypeError, ValueError):
            raise TypeError(
                f"lds: expected what trak_ext.evaluation.lds returns, or such by name, got "
                f"{_check.describe(value)}"
            ) from None
    return found


def _target_lds(values: Any, num_targets: int) -> list[float] | None:
    if values is None:
        return None
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError):
        raise TypeError(
            f"target_lds: expected {num_targets} numbers, one a target, got {values!r}"
        ) from None
    if len(numbers) != num_targets or any(abs(value) > 1 for value in numbers):
        raise ValueError(
            f"target_lds: expected {num_targets} correlations in [-1, 1], one a target, got "
            f"{len(numbers)} numbers"
            + (f", the largest {max(map(abs, numbers)):.4g}" if numbers else "")
        )
    return [value if math.isfinite(value) else math.nan for value in numbers]


def _settings(settings: Any) -> dict[str, Any]:
    try:
        found = json.loads(json.dumps({} if settings is None else settings, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"settings: expected what JSON can hold, got {error}") from None
    if not isinstance(found, dict):
        raise TypeError(f"settings: expected a mapping, got {_check.describe(settings)}")
    return found
