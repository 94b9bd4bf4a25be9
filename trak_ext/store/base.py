"""What a store holds, and how fitted features are read back from one, whatever it keeps them in."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..estimator.formula import KernelAccumulator, SampleBlock
from ..inputs.loaders import SampleId

_SHARD_VALUES = 2**23  # features in a shard: 32 MiB


class Shard(NamedTuple):
    """A checkpoint's features of consecutive samples, with Q, R, f and the digest of their data."""

    features: Tensor  # fp32 [rows, blocks * k]
    weight: Tensor  # fp32 [rows]
    curvature: Tensor  # fp32 [rows]
    output: Tensor  # fp32 [rows]
    data_digest: str
    ids: list[SampleId] | None = None


class CheckpointSummary(NamedTuple):
    """What is known of a checkpoint whose features of the training set, or an addition, are whole.

    Written last: while it is not there, the features are not finished.
    """

    num_samples: int
    data_digests: list[str]  # of each shard, in order
    fitted_above: float  # threshold of the outputs, of the training set without additions
    weight: Tensor  # fp32 [num_samples]
    curvature: Tensor  # fp32 [num_samples]
    implied: Tensor  # fp64 [blocks, k + 3], `ImpliedRidge.sums`; zeros where f is not log odds


class Context(NamedTuple):
    """What a checkpoint's task prepared from the training data, and the digest of those data."""

    tensors: dict[str, Tensor]
    data_digest: str


class StoreError(ValueError):
    """A store that is damaged, incomplete, or made with other settings, weights or data."""


class Record(NamedTuple):
    """What a store keeps under one name."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


class Store(ABC):
    """Features by checkpoint, addition (0 is the training set itself) and range of samples.

    A store keeps records by name; what they mean is said here, once for all stores.
    """

    @abstractmethod
    def open(self, settings: dict[str, Any], *, create: bool, addition: int = 0) -> None:
        """Take on the settings, or raise StoreError where others made what is there."""

    @abstractmethod
    def get(self, checkpoint: int, name: str) -> Record | None:
        """Return a checkpoint's record of this name, or None."""

    @abstractmethod
    def put(self, checkpoint: int, name: str, record: Record) -> None:
        """Keep a checkpoint's record under a name, whole or not at all."""

    @abstractmethod
    def where(self, checkpoint: int, name: str) -> str:
        """Return where a record is kept, for errors."""

    def read(
        self, checkpoint: int, start: int, stop: int | None = None, addition: int = 0
    ) -> Shard | None:
        """Return the shard that begins with sample `start` of an addition, or None.

        Args:
            stop: Where the samples end, if known: a shard of another length is refused.
        """
        name = _name(addition, f"features-{start:012d}")
        record = self._get(checkpoint, name, Shard._fields[:4])
        if record is None:
            return None
        rows = len(record.tensors["features"])
        if stop is not None and rows != stop - start:
            raise StoreError(
                f"store: expected {stop - start} samples in "
                f"{self.where(checkpoint, name)}, got {rows}"
            )
        ids = json.loads(record.metadata.get("ids", "null"))
        return Shard(**record.tensors, data_digest=record.metadata["data_digest"], ids=ids)

    def write(self, checkpoint: int, start: int, shard: Shard, addition: int = 0) -> None:
        """Keep a shard."""
        metadata = {"data_digest": shard.data_digest}
        if shard.ids is not None:
            metadata["ids"] = json.dumps(shard.ids)
        tensors = dict(zip(Shard._fields[:4], shard[:4], strict=True))
        name = _name(addition, f"features-{start:012d}")
        self.put(checkpoint, name, Record(tensors, metadata))

    def read_summary(self, checkpoint: int, addition: int = 0) -> CheckpointSummary | None:
        """Return what is known of a finished checkpoint, or None where it is not finished."""
        facts, figures = CheckpointSummary._fields[:3], CheckpointSummary._fields[3:]
        record = self._get(checkpoint, _name(addition, "finished"), figures)
        if record is None:
            return None
        known: list[Any] = [json.loads(record.metadata[name]) for name in facts]
        return CheckpointSummary(*known, *(record.tensors[name] for name in figures))

    def write_summary(self, checkpoint: int, summary: CheckpointSummary, addition: int = 0) -> None:
        """Say that a checkpoint's features are all there."""
        facts, figures = CheckpointSummary._fields[:3], CheckpointSummary._fields[3:]
        metadata = {name: json.dumps(getattr(summary, name)) for name in facts}
        tensors = {name: getattr(summary, name) for name in figures}
        name = _name(addition, "finished")
        self.put(checkpoint, name, Record(tensors, metadata))

    def read_kernel(
        self, checkpoint: int, weighting: str, addition: int, data_digest: str
    ) -> Tensor | None:
        """Return kernel matrices fp64 [blocks, k, k]; None where they are not there, or of others.

        Args:
            weighting: How samples are weighted in it, as a file's name may say it.
            data_digest: Of the samples' data.
        """
        name = _name(addition, f"kernel-{weighting}")
        record = self._get(checkpoint, name, ("kernel",))
        if record is None or record.metadata.get("data_digest") != data_digest:
            return None
        return record.tensors["kernel"]

    def write_kernel(
        self, checkpoint: int, weighting: str, addition: int, data_digest: str, kernel: Tensor
    ) -> None:
        """Keep kernel matrices."""
        name = _name(addition, f"kernel-{weighting}")
        self.put(checkpoint, name, Record({"kernel": kernel}, {"data_digest": data_digest}))

    def read_context(self, checkpoint: int) -> Context | None:
        """Return what the task prepared for a checkpoint, or None."""
        record = self.get(checkpoint, "context")
        return None if record is None else Context(record.tensors, record.metadata["data_digest"])

    def write_context(self, checkpoint: int, context: Context) -> None:
        """Keep what the task prepared for a checkpoint."""
        record = Record(context.tensors, {"data_digest": context.data_digest})
        self.put(checkpoint, "context", record)

    def _get(self, checkpoint: int, name: str, tensors: Sequence[str]) -> Record | None:
        """Return a record, which has tensors of these names and no others, or None."""
        record = self.get(checkpoint, name)
        if record is not None and sorted(record.tensors) != sorted(tensors):
            raise StoreError(
                f"store: expected the tensors {', '.join(tensors)} in "
                f"{self.where(checkpoint, name)}, got {', '.join(record.tensors) or 'none'}"
            )
        return record


def _name(addition: int, what: str) -> str:
    return f"part-{addition:04d}/{what}" if addition else what


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


def settings_digest(settings: Mapping[str, Any]) -> str:
    """Return a digest of a JSON-like mapping."""
    text = json.dumps(settings, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def shard_rows(width: int) -> int:
    """Return the samples of a shard: a function of the features per sample, so that runs agree."""
    return max(1, min(8192, _SHARD_VALUES // width))


class StoredFeatures:
    """The features of checkpoints 0 .. M - 1 in a store that is fitted for all of them.

    As `trak_ext.estimator.formula.TrainingFeatures`: samples in order over all additions.

    Args:
        store: Opened for the settings.
        num_checkpoints: M.
        proj_dim: Features k of a projection block.
        blocks: Projection blocks b.
        weighting: What kernel matrices weight samples by: None for 1, "own" for each checkpoint's
            R, "mean" for the mean of R over the checkpoints.
        additions: How many are looked at, the training set itself being the first; None for all.

    Raises:
        StoreError: additions that are not finished for every checkpoint, or differ in their data.
    """

    def __init__(
        self,
        store: Store,
        num_checkpoints: int,
        proj_dim: int,
        blocks: int,
        weighting: str | None = None,
        additions: int | None = None,
    ) -> None:
        self._store = store
        self._proj_dim = proj_dim
        self._weighting = weighting
        self.blocks = blocks
        self.num_checkpoints = num_checkpoints
        self._summaries: list[list[CheckpointSummary]] = []  # of each addition and checkpoint
        while additions is None or len(self._summaries) < additions:
            addition = len(self._summaries)
            found = [store.read_summary(m, addition) for m in range(num_checkpoints)]
            if addition and additions is None and all(summary is None for summary in found):
                break
            self._summaries.append(_complete(found, addition))

    @property
    def sizes(self) -> list[int]:
        """Training samples of each addition."""
        return [summaries[0].num_samples for summaries in self._summaries]

    @property
    def data_digests(self) -> list[list[str]]:
        """Digests of each addition's shards."""
        return [summaries[0].data_digests for summaries in self._summaries]

    @property
    def num_samples(self) -> int:
        """Training samples of all additions."""
        return sum(self.sizes)

    def weight(self) -> Tensor:
        """Return the mean of Q over the checkpoints: fp64 [n]."""
        return torch.cat(
            [
                torch.stack([summary.weight for summary in summaries]).double().mean(0)
                for summaries in self._summaries
            ]
        )

    def curvature(self, m: int) -> Tensor | None:
        """Return the weight of each sample in checkpoint m's kernel, [n]; None for ones."""
        if self._weighting is None:
            return None
        return torch.cat([self._curvature(m, a) for a in range(len(self._summaries))])

    def _curvature(self, m: int, addition: int) -> Tensor:
        summaries = self._summaries[addition]
        if self._weighting == "own":
            return summaries[m].curvature
        return torch.stack([summary.curvature for summary in summaries]).double().mean(0)

    def implied(self) -> Tensor:
        """Return `ImpliedRidge.sums` of each checkpoint and projection block, fp64 [M b, k + 3]."""
        sums = [torch.cat([summary.implied for summary in each]) for each in self._summaries]
        return torch.stack(sums).sum(0)

    # --- kernel matrices --------------------------------------------------------------------------

    def kernels(self, m: int) -> Tensor:
        """Return checkpoint m's kernel matrices over all samples, fp64 [blocks, k, k].

        Those that the store lacks are made from the features.
        """
        shape = (self.blocks, self._proj_dim, self._proj_dim)
        total = torch.zeros(shape, dtype=torch.float64, device="cpu")
        for addition in range(len(self._summaries)):
            kernel = self._store.read_kernel(m, *self._kernel_key(addition))
            total += self._make_kernels(m, addition) if kernel is None else kernel
        return total

    def write_kernels(self, addition: int) -> None:
        """Make and keep the kernel matrices of an addition that the store lacks."""
        key = self._kernel_key(addition)
        for m in range(self.num_checkpoints):
            if self._store.read_kernel(m, *key) is None:
                self._store.write_kernel(m, *key, self._make_kernels(m, addition))

    def _kernel_key(self, addition: int) -> tuple[str, int, str]:
        """Return the weights' name (stores agree in their first checkpoints) and the data's."""
        weighting = self._weighting or "plain"
        if weighting == "mean":
            weighting = f"mean-{self.num_checkpoints:04d}"
        digests = self._summaries[addition][0].data_digests
        return weighting, addition, settings_digest({"data": digests})

    def _make_kernels(self, m: int, addition: int) -> Tensor:
        kernels = [KernelAccumulator(self._proj_dim) for _ in range(self.blocks)]
        weights = None if self._weighting is None else self._curvature(m, addition)
        for start, stop in self._ranges(self.sizes[addition]):
            features = self._read(m, start, stop, addition).features.split(self._proj_dim, 1)
            own = None if weights is None else weights[start:stop]
            for kernel, part in zip(kernels, features, strict=True):
                kernel.add(part, own)
        return torch.stack([kernel.matrix for kernel in kernels])

    # --- samples ----------------------------------------------------------------------------------

    def samples(self, checkpoints: Sequence[int] | None = None) -> Iterator[SampleBlock]:
        """Yield all samples in order, with the features of the checkpoints (None for all)."""
        chosen = range(self.num_checkpoints) if checkpoints is None else checkpoints
        weight = self.weight()
        offset = 0
        for addition, size in enumerate(self.sizes):
            for start, stop in self._ranges(size):
                shards = [self._read(m, start, stop, addition) for m in chosen]
                features = [part for s in shards for part in s.features.split(self._proj_dim, 1)]
                rows = slice(offset + start, offset + stop)
                yield SampleBlock(rows.start, features, weight[rows], shards[0].ids)
            offset += size

    def sample_ids(self) -> list[SampleId] | None:
        """Return the ids of all samples in order; None where not every addition has them."""
        ids: list[SampleId] = []
        for block in self.samples([0]):
            ids.extend(block.ids or [])
        return ids if ids and len(ids) == self.num_samples else None

    def _ranges(self, size: int) -> Iterator[tuple[int, int]]:
        rows = shard_rows(self.blocks * self._proj_dim)
        for start in range(0, size, rows):
            yield start, min(start + rows, size)

    def _read(self, m: int, start: int, stop: int, addition: int) -> Shard:
        shard = self._store.read(m, start, stop, addition)
        if shard is None:
            where = f" of addition {addition}" if addition else ""
            raise StoreError(
                f"store: expected samples {start} to {stop - 1}{where} of checkpoint {m}, got none"
            )
        return shard


def _complete(found: Sequence[CheckpointSummary | None], addition: int) -> list[CheckpointSummary]:
    """Return the summaries of all checkpoints, which must be there and agree in their data."""
    done = [summary for summary in found if summary is not None]
    call = f"fit(addition={addition})" if addition else "fit()"
    if not done:
        raise StoreError(f"Attributor is not fitted: call {call} first")
    if len(done) < len(found):
        missing = next(m for m, summary in enumerate(found) if summary is None)
        raise StoreError(
            f"Attributor is not fitted for all {len(found)} checkpoints: call {call} first (the "
            f"store has no finished features of checkpoint {missing})"
        )
    if any(summary.data_digests != done[0].data_digests for summary in done):
        raise StoreError(
            "store: expected the same data for every checkpoint"
            + (f" in addition {addition}" if addition else "")
            + f", got {[summary.num_samples for summary in done]} samples by checkpoint"
        )
    return done
