"""What a store keeps: shards, checkpoint summaries, contexts and probes; and its errors."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from torch import Tensor

from ..inputs.batches import SampleId


class StoreError(ValueError):
    """A store that is damaged, incomplete, or made with other settings, weights or data."""


class Shard(NamedTuple):
    """A checkpoint's features of consecutive samples, with Q, R, f and the digest of their data."""

    features: Tensor  # fp32 [rows, blocks * k]
    weight: Tensor  # fp32 [rows]
    curvature: Tensor  # fp32 [rows]
    output: Tensor  # fp32 [rows]
    data_digest: str
    ids: list[SampleId] | None = None
    origin: str = ""  # digest of the context and the probe of the run that made it
    digest: str = ""  # of the record, where the store has one


class CheckpointSummary(NamedTuple):
    """What is known of a checkpoint whose features of the training set, or an addition, are whole.

    It vouches for the records that it names the digests of, and the store's manifest for it: while
    the manifest does not, the features are not finished.
    """

    num_samples: int
    data_digests: list[str]  # of each shard, in order
    fitted_above: float  # threshold of the outputs, of the training set without additions
    weight: Tensor  # fp32 [num_samples]
    curvature: Tensor  # fp32 [num_samples]
    implied: Tensor  # fp64 [blocks, k + 3], `ImpliedRidge.sums`; zeros where f is not log odds
    shards: list[str]  # digest of each shard's record
    context: str | None = None  # digest of the context's record, where the task has one
    probe: str | None = None  # digest of the probe's record, where this addition has it
    digest: str = ""  # of the summary's own record


class Context(NamedTuple):
    """What a checkpoint's task prepared from the training data, and the digest of those data."""

    tensors: dict[str, Tensor]
    data_digest: str
    digest: str = ""  # of the record


class Probe(NamedTuple):
    """A few samples and what a checkpoint gave for them, to be computed again later."""

    features: Tensor  # fp32 [samples, blocks * k]
    weight: Tensor  # fp32 [samples]
    curvature: Tensor  # fp32 [samples]
    output: Tensor  # fp32 [samples]
    position: int  # of the first one in the training set
    structure: Any  # of their batch, as `inputs.batches` has it; None where it is not kept
    batch: list[Tensor]
    device: str  # type of the device that computed them
    digest: str = ""  # of the record


class KnownData(NamedTuple):
    """The data of an addition that is finished for a checkpoint."""

    num_samples: int
    data_digests: list[str]  # of each shard


class Record(NamedTuple):
    """What a store keeps under one name."""

    tensors: dict[str, Tensor]
    metadata: dict[str, Any]  # JSON
    digest: str = ""  # of all of it, "" in memory


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
