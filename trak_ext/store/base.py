"""A store of features, whatever it keeps them in: what it is asked for, and what each record is."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from .records import (
    CheckpointSummary,
    Context,
    KnownData,
    Probe,
    Record,
    Shard,
    StoreError,
)

_SHARD_VALUES = 2**21  # features in a shard: 8 MiB
_MOST_ROWS = 4096

_SHARD_TENSORS = Shard._fields[:4]
_SUMMARY_TENSORS = ("weight", "curvature", "implied")
_SUMMARY_FACTS = ("num_samples", "data_digests", "fitted_above", "shards", "context", "probe")


def shard_rows(width: int) -> int:
    """Return the samples of a shard: a function of the features per sample, so that runs agree."""
    return max(1, min(_MOST_ROWS, _SHARD_VALUES // width))


def settings_digest(settings: Mapping[str, Any]) -> str:
    """Return a digest of a JSON-like mapping."""
    text = json.dumps(settings, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class Store(ABC):
    """Features by checkpoint, addition (0 is the training set itself) and range of samples.

    A store keeps records by name; what they mean is said here, once for all stores. A record is
    read with the digest that vouches for it, where something does: the manifest for checkpoint
    summaries, and these for shards, contexts and probes.
    """

    durable = True  # whether it outlives the process

    # --- what a kind of store does ----------------------------------------------------------------

    @abstractmethod
    def open(
        self,
        settings: dict[str, Any],
        *,
        create: bool,
        addition: int = 0,
        versions: Mapping[str, str] | None = None,
    ) -> None:
        """Take on the settings, or raise StoreError where others made what is there.

        Args:
            versions: Of the software in use, by name. Other ones than those that made the store
                are warned of.
        """

    @abstractmethod
    @contextmanager
    def owned(self) -> Iterator[None]:
        """Be the one run that writes to the store, or raise StoreError where another one is."""

    @abstractmethod
    def get(self, checkpoint: int, name: str) -> Record | None:
        """Return a checkpoint's record of this name, or None."""

    @abstractmethod
    def put(self, checkpoint: int, name: str, record: Record) -> str:
        """Keep a checkpoint's record under a name, whole or not at all; return its digest."""

    @abstractmethod
    def remove(self, checkpoint: int, name: str) -> None:
        """Forget a checkpoint's record of this name, if there is one."""

    @abstractmethod
    def where(self, checkpoint: int, name: str) -> str:
        """Return where a record is kept, for errors."""

    @abstractmethod
    def begun(self) -> int:
        """Return the number of additions of which the store has anything, finished or not."""

    @abstractmethod
    def known_data(self, addition: int) -> KnownData | None:
        """Return the data of an addition that is finished for any checkpoint, or None."""

    @abstractmethod
    def finished(self, checkpoint: int, addition: int) -> str | None:
        """Return the digest of a finished checkpoint's summary, or None."""

    @abstractmethod
    def finish(self, checkpoint: int, addition: int, data: KnownData, digest: str) -> None:
        """Vouch for a checkpoint's summary."""

    @abstractmethod
    def rows(self, width: int) -> int:
        """Return the samples of a shard in this store."""

    @abstractmethod
    def agree(self, name: str, value: int | None) -> int | None:
        """Return the number of this name that the run which made the store chose.

        `value` where it is the one that makes it.
        """

    @abstractmethod
    def recorded(self) -> Mapping[str, Any]:
        """Return the settings that made what is there, empty where nothing says them.

        It can be asked before `open`, which is what refuses a manifest that cannot be read.
        """

    @property
    @abstractmethod
    def manifest(self) -> str:
        """Where it is kept what is finished, for errors."""

    # --- shards -----------------------------------------------------------------------------------

    def read(
        self,
        checkpoint: int,
        start: int,
        stop: int | None = None,
        addition: int = 0,
        vouched: str | None = None,
    ) -> Shard | None:
        """Return the shard that begins with sample `start` of an addition, or None.

        Args:
            stop: Where the samples end, if known: a shard of another length is refused.
            vouched: The digest that its checkpoint summary vouches for, if there is one.
        """
        name = shard_name(addition, start)
        shard = self._shard(checkpoint, name, vouched)
        if shard is not None and stop is not None and len(shard.features) != stop - start:
            raise StoreError(
                f"store: expected {stop - start} samples in "
                f"{self.where(checkpoint, name)}, got {len(shard.features)}"
            )
        return shard

    def write(self, checkpoint: int, start: int, shard: Shard, addition: int = 0) -> str:
        """Keep a shard; return its record's digest."""
        return self.put(checkpoint, shard_name(addition, start), _shard_record(shard))

    def read_journal(self, checkpoint: int, start: int, addition: int = 0) -> Shard | None:
        """Return the samples so far of the shard that begins with `start`, or None."""
        return self._shard(checkpoint, shard_name(addition, start, "journal"), None)

    def write_journal(self, checkpoint: int, start: int, shard: Shard, addition: int = 0) -> None:
        """Keep the samples so far of a shard, in place of what was kept before."""
        self.put(checkpoint, shard_name(addition, start, "journal"), _shard_record(shard))

    def remove_journal(self, checkpoint: int, start: int, addition: int = 0) -> None:
        """Forget what was kept of a shard's samples, which the shard has now."""
        self.remove(checkpoint, shard_name(addition, start, "journal"))

    def _shard(self, checkpoint: int, name: str, vouched: str | None) -> Shard | None:
        addition = int(name[5:9]) if name.startswith("part-") else 0
        by = self._summary(checkpoint, addition)
        record = self._get(checkpoint, name, _SHARD_TENSORS, vouched, by)
        if record is None:
            return None
        said = record.metadata
        known = {"ids": None, **said}
        return Shard(**_any(record.tensors), **known, digest=record.digest)

    # --- checkpoint summaries ---------------------------------------------------------------------

    def read_summary(
        self, checkpoint: int, addition: int = 0, *, missing_ok: bool = False
    ) -> CheckpointSummary | None:
        """Return what is known of a finished checkpoint, or None where it is not finished.

        Args:
            missing_ok: Whether None is also for a summary that is vouched for and not there.
        """
        vouched = self.finished(checkpoint, addition)
        if vouched is None:
            return None
        name = _name(addition, "finished")
        record = self._get(checkpoint, name, _SUMMARY_TENSORS, vouched, self.manifest)
        if record is None:
            if missing_ok:
                return None
            raise self.missing(checkpoint, name)
        known: dict[str, Any] = {key: record.metadata[key] for key in _SUMMARY_FACTS}
        return CheckpointSummary(**known, **_any(record.tensors), digest=record.digest)

    def write_summary(
        self, checkpoint: int, summary: CheckpointSummary, addition: int = 0
    ) -> CheckpointSummary:
        """Say that a checkpoint's features are all there; return the summary with its digest."""
        metadata = {name: getattr(summary, name) for name in _SUMMARY_FACTS}
        tensors = {name: getattr(summary, name) for name in _SUMMARY_TENSORS}
        digest = self.put(checkpoint, _name(addition, "finished"), Record(tensors, metadata))
        data = KnownData(summary.num_samples, summary.data_digests)
        self.finish(checkpoint, addition, data, digest)
        return summary._replace(digest=digest)

    # --- kernel matrices --------------------------------------------------------------------------

    def read_kernel(
        self, checkpoint: int, weighting: str, addition: int, source: str
    ) -> Tensor | None:
        """Return kernel matrices fp64 [blocks, k, k], or None where they are not there.

        Args:
            weighting: How samples are weighted in it, as a file's name may say it.
            source: Digest of the checkpoint summaries that it was made under.

        Raises:
            StoreError: matrices that were made under others.
        """
        name = _name(addition, f"kernel-{weighting}")
        record = self._get(checkpoint, name, ("kernel",))
        if record is None:
            return None
        if record.metadata.get("source") != source:
            raise StoreError(
                f"store: expected kernel matrices of the features that the store has in "
                f"{self.where(checkpoint, name)}, got those of others (delete it to have it made "
                "again)"
            )
        return record.tensors["kernel"]

    def write_kernel(
        self, checkpoint: int, weighting: str, addition: int, source: str, kernel: Tensor
    ) -> None:
        """Keep kernel matrices."""
        name = _name(addition, f"kernel-{weighting}")
        self.put(checkpoint, name, Record({"kernel": kernel}, {"source": source}))

    # --- contexts and probes ----------------------------------------------------------------------

    def read_context(self, checkpoint: int, vouched: str | None = None) -> Context | None:
        """Return what the task prepared for a checkpoint, or None."""
        record = self._get(checkpoint, "context", None, vouched, self._summary(checkpoint, 0))
        if record is None:
            return None
        return Context(record.tensors, record.metadata["data_digest"], record.digest)

    def write_context(self, checkpoint: int, context: Context) -> Context:
        """Keep what the task prepared for a checkpoint; return it with its record's digest."""
        record = Record(context.tensors, {"data_digest": context.data_digest})
        return context._replace(digest=self.put(checkpoint, "context", record))

    def read_probe(
        self, checkpoint: int, addition: int = 0, vouched: str | None = None
    ) -> Probe | None:
        """Return the few samples that a checkpoint is tried on, or None."""
        name = probe_name(addition)
        by = self._summary(checkpoint, addition)
        record = self._get(checkpoint, name, None, vouched, by)
        if record is None:
            return None
        said = record.metadata
        batch = [record.tensors[f"batch.{i}"] for i in range(len(record.tensors) - 4)]
        tensors = {key: record.tensors[key] for key in _SHARD_TENSORS}
        return Probe(**_any(tensors), **said, batch=batch, digest=record.digest)

    def write_probe(self, checkpoint: int, probe: Probe, addition: int = 0) -> Probe:
        """Keep the few samples that a checkpoint is tried on; return them with their digest."""
        tensors = {name: getattr(probe, name) for name in _SHARD_TENSORS}
        tensors |= {f"batch.{i}": tensor for i, tensor in enumerate(probe.batch)}
        said = {key: getattr(probe, key) for key in ("position", "structure", "device")}
        digest = self.put(checkpoint, probe_name(addition), Record(tensors, said))
        return probe._replace(digest=digest)

    # --- all records ------------------------------------------------------------------------------

    def missing(self, checkpoint: int, name: str) -> StoreError:
        """Return the error for a record that is vouched for and not there."""
        return StoreError(
            f"store: expected the file {self.where(checkpoint, name)}, which the store vouches "
            "for, got none (call fit again to have it made again)"
        )

    def _summary(self, checkpoint: int, addition: int) -> str:
        """Return where a checkpoint summary is kept."""
        return self.where(checkpoint, _name(addition, "finished"))

    def _get(
        self,
        checkpoint: int,
        name: str,
        tensors: Sequence[str] | None,
        vouched: str | None = None,
        by: str = "",
    ) -> Record | None:
        """Return a record, which has tensors of these names and no others, or None."""
        record = self.get(checkpoint, name)
        if record is None:
            return None
        if tensors is not None and sorted(record.tensors) != sorted(tensors):
            raise StoreError(
                f"store: expected the tensors {', '.join(tensors)} in "
                f"{self.where(checkpoint, name)}, got {', '.join(record.tensors) or 'none'}"
            )
        if vouched is not None and record.digest != vouched:
            raise StoreError(
                f"store: expected {self.where(checkpoint, name)} as {by} vouches for it, got "
                "another file (of another store? delete it to have it made again)"
            )
        return record


def _any(tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Return tensors as arguments of any type, for the type checker."""
    return {**tensors}


def _name(addition: int, what: str) -> str:
    return f"part-{addition:04d}/{what}" if addition else what


def shard_name(addition: int, start: int, kind: str = "features") -> str:
    """Return the name of a shard's record, or of its "journal"."""
    return _name(addition, f"{kind}-{start:012d}")


def probe_name(addition: int) -> str:
    """Return the name of the probe's record."""
    return _name(addition, "probe")


def _shard_record(shard: Shard) -> Record:
    metadata: dict[str, Any] = {"data_digest": shard.data_digest, "origin": shard.origin}
    if shard.ids is not None:
        metadata["ids"] = shard.ids
    return Record({key: getattr(shard, key) for key in _SHARD_TENSORS}, metadata)
