"""What a store keeps, and the error of one that is not what it should be."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from torch import Tensor

SampleId = int | str

_SHARD_VALUES = 2**23  # features a shard: 32 MiB


class Shard(NamedTuple):
    """A checkpoint's features of consecutive samples, with Q, R, f and the digest of their data."""

    features: Tensor  # fp32 [rows, blocks * k]
    weight: Tensor  # fp32 [rows]
    curvature: Tensor  # fp32 [rows]
    output: Tensor  # fp32 [rows]
    data_digest: str
    ids: list[SampleId] | None = None


class Mark(NamedTuple):
    """What is known of a checkpoint's finished part: the mark that its features are all there."""

    num_samples: int
    data_digests: list[str]  # of each shard, in order
    fitted_above: float  # threshold of the outputs, of part 0
    weight: Tensor  # fp32 [num_samples]
    curvature: Tensor  # fp32 [num_samples]
    implied: Tensor  # fp64 [blocks, k + 3], `ImpliedRidge.sums`; zeros where f is not log odds


class Context(NamedTuple):
    """What a checkpoint's task prepared from the training data, and the digest of those data."""

    tensors: dict[str, Tensor]
    data_digest: str


class StoreError(ValueError):
    """A store that is damaged, incomplete, or made with other settings, weights or data."""


def compare_settings(expected: dict[str, Any], found: dict[str, Any], where: str) -> None:
    """Refuse a store whose settings are not the ones expected; checkpoints may be more or fewer."""
    for key in sorted({*expected, *found}):
        a, b = expected.get(key), found.get(key)
        if key == "checkpoints" and isinstance(a, list) and isinstance(b, list):
            common = min(len(a), len(b))
            a, b = a[:common], b[:common]
        if a != b:
            raise StoreError(
                f"store: expected one made with {key} = {_short(expected.get(key))}, got "
                f"{_short(found.get(key))} in {where} (use another folder)"
            )


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def shard_rows(width: int) -> int:
    """Return the samples a shard holds: a function of the features a sample, so that runs agree."""
    return max(1, min(8192, _SHARD_VALUES // width))
