"""Fitting: what the store holds is compared with the data, the rest is computed and written."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from .. import _check
from ..estimator.damping import ImpliedRidge, fitted_above
from ..inputs import batches, loaders
from ..inputs.batches import Segment, map_tensors
from ..store import CheckpointSummary, Context, Probe, Shard, Store, StoreError
from ..store.base import probe_name, settings_digest, shard_name
from . import probe as probes
from .features import (
    FeatureMaker,
    ShardBuilder,
    changed_data,
    context_digest,
    on_device,
    other_count,
    other_data,
    prepare_context,
    require_context,
)
from .progress import Progress

JOURNAL_SECONDS = 20.0  # between two writes of a shard's samples so far, at the end of a chunk


class Fitter:
    """Fits the checkpoints one after the other on the training set, or on an addition to it.

    Args:
        store: Opened for these settings.
        features: What is computed.
        device: Where gradients are computed.
        addition: 0 for the training set, or the addition's number.
        offset: Position of its first sample in the training set.
        probe: Whether a few samples are kept, and computed again where they were.
    """

    def __init__(
        self,
        store: Store,
        features: FeatureMaker,
        device: torch.device,
        addition: int,
        offset: int,
        probe: bool = True,
    ) -> None:
        self.store = store
        self.features = features
        self.device = device
        self.addition = addition
        self.offset = offset
        self.probe = probe
        self.rows = store.rows(features.width)
        self.known = store.known_data(addition)  # of a fit before this one
        self.digests: list[str] | None = None  # of the first checkpoint's shards in this one
        self.kept = (0, 0)  # checkpoint, and its samples that the store has
        self._said = False  # that a batch cannot be kept

    def fit(
        self, m: int, weights: Mapping[str, Tensor], loader: Iterable[Any], bar: Progress
    ) -> None:
        """Fit checkpoint m.

        Raises:
            ValueError: samples with NaN or Inf, or data that change between checkpoints.
            StoreError: a store of other data, or one that model or task no longer agree with.
        """
        one = _CheckpointFit(self, m, weights, loader, bar)
        try:
            with self.features.gradients.reusing_memory():
                one.run(loader)
        except ValueError:  # of other data than the store's, perhaps: nothing to keep
            raise
        except BaseException:
            one.keep_what_there_is()
            raise
        finally:
            self.kept = (m, one.kept)

    def keeps(self, batch: Any) -> bool:
        """Whether a probe keeps its batch; says once where it cannot."""
        reason = probes.cannot_be_kept(batch) if self.probe else None
        if reason is not None and not self._said:
            self._said = True
            _check.warn(
                "store: expected batches that can be kept as tensors and JSON, so that a model or "
                f"task that computes something else later is noticed, got {reason} (probe=False "
                "goes without)"
            )
        return self.probe and reason is None


class _CheckpointFit:
    """One checkpoint's fit."""

    def __init__(
        self,
        fitter: Fitter,
        m: int,
        weights: Mapping[str, Tensor],
        loader: Iterable[Any],
        bar: Progress,
    ) -> None:
        self._fitter, self._m, self._weights, self._bar = fitter, m, weights, bar
        self._store, self._addition = fitter.store, fitter.addition
        self._width = fitter.features.width
        self._builder = ShardBuilder(0, self._width)
        self._stored: Shard | None = None  # in the builder's place
        self._journal: Shard | None = None
        self._first: Any = None  # the first samples' batch, until there is a probe
        self._journal_rows = 0
        self._written = time.monotonic()
        self._shards: list[Shard] = []  # without features
        self.kept = 0
        self._finished = self._store.read_summary(m, self._addition, missing_ok=True)
        self._context = self._find_context(loader)
        self._probe_addition, self._probe = self._find_probe()

    # --- before the first sample ------------------------------------------------------------------

    def _find_context(self, loader: Iterable[Any]) -> Context | None:
        """Return what the task prepares from the training set, without additions, once."""
        computer, store, m = self._fitter.features.gradients, self._store, self._m
        if computer.task.prepare is None:
            return None
        summary = self._finished
        if self._addition:
            summary = store.read_summary(m)
        stored = store.read_context(m, None if summary is None else summary.context)
        if summary is not None:
            return require_context(stored, m, store.where(m, "context"))
        if stored is None:
            made, _ = prepare_context(computer, self._weights, loader, self._fitter.device, m)
            return store.write_context(m, made)
        if stored.data_digest != context_digest(loader, self._fitter.device, computer.task.ids_as):
            raise StoreError(
                f"store: expected one made with the data of train_loader, got what the task "
                f"prepared for checkpoint {m} from other data in {store.where(m, 'context')} (use "
                "another folder)"
            )
        return stored

    def _find_probe(self) -> tuple[int, Probe | None]:
        """Return the probe, the first addition's that has samples, computed again; and which."""
        store, m = self._store, self._m
        for addition in range(self._addition):
            summary = store.read_summary(m, addition)
            if summary is not None and summary.probe is not None:
                found = store.read_probe(m, addition, summary.probe)
                if found is None:
                    raise store.missing(m, probe_name(addition))
                self._check(found, probe_name(addition))
                return addition, found
        vouched = None if self._finished is None else self._finished.probe
        found = store.read_probe(m, self._addition, vouched)
        if found is not None:
            self._check(found, probe_name(self._addition))
        return self._addition, found

    def _check(self, probe: Probe, name: str) -> None:
        if self._fitter.probe:
            where = self._store.where(self._m, name)
            args = (self._weights, self._m, self._tensors(), self._fitter.device, where)
            probes.check(probe, self._fitter.features, *args)

    def _tensors(self) -> dict[str, Tensor] | None:
        """Return the context's tensors where gradients are computed."""
        return (
            None if self._context is None else on_device(self._context.tensors, self._fitter.device)
        )

    def _origin(self) -> str:
        """Return a digest of what a shard is made with beside settings, weights and data."""
        context = None if self._context is None else self._context.digest
        probe = None if self._probe is None else self._probe.digest
        return settings_digest({"context": context, "probe": probe})

    # --- samples ----------------------------------------------------------------------------------

    def run(self, loader: Iterable[Any]) -> None:
        """Go over all samples, and write the checkpoint summary where there is none."""
        fitter, rows, context = self._fitter, self._fitter.rows, self._tensors()
        known, expected, store = fitter.known, fitter.digests, self._store
        count = 0
        ids_as = fitter.features.gradients.task.ids_as
        for segment in batches.segments(loader, fitter.device, rows, ids_as):
            start, count = segment.start, segment.stop
            if expected is not None and start // rows >= len(expected):
                raise changed_data("train_loader", start, count)
            if known is not None and count > known.num_samples:
                raise other_count(f"{count} or more", known.num_samples, store.manifest)
            if start == 0 and self._probe is None:
                self._first = probes.first_samples(segment)
            if start % rows == 0:
                self._begin_shard(start)
            if self._stored is not None:
                self._builder.note_data(segment.batch, segment.ids)
                self._bar.advance(count - start)
            else:
                self._compute(segment, context)
            if count % rows == 0:
                self._close_shard(count)
        if count % rows:
            self._close_shard(count)
        if known is not None and known.num_samples != count:
            raise other_count(str(count), known.num_samples, store.manifest)
        after = -(-count // rows) * rows
        for kind, found in (
            ("features", self._read(after)),
            ("journal", self._read_journal(after)),
        ):
            if found is not None:
                name = shard_name(self._addition, after, kind)
                raise other_count(str(count), "more", store.where(self._m, name))
        if expected is not None and len(self._shards) != len(expected):
            raise changed_data("train_loader", count, count)
        if self._addition == 0:
            loaders.refuse_none("train_loader", count)
        if self._finished is None:
            self._summarise(count)
        fitter.digests = [shard.data_digest for shard in self._shards]

    def _read(self, start: int) -> Shard | None:
        vouched = None
        if self._finished is not None and start // self._fitter.rows < len(self._finished.shards):
            vouched = self._finished.shards[start // self._fitter.rows]
        return self._store.read(self._m, start, None, self._addition, vouched)

    def _read_journal(self, start: int) -> Shard | None:
        return self._store.read_journal(self._m, start, self._addition)

    def _begin_shard(self, start: int) -> None:
        store, m, addition = self._store, self._m, self._addition
        self._builder = ShardBuilder(start, self._width)
        self._stored, self._journal, self._journal_rows = self._read(start), None, 0
        if self._stored is not None:
            self._compare_origin(self._stored, shard_name(addition, start))
            store.remove_journal(m, start, addition)  # a run was killed between the two
            return
        self._journal = self._read_journal(start)
        if self._journal is not None:
            self._compare_origin(self._journal, shard_name(addition, start, "journal"))
            self._journal_rows = len(self._journal.features)

    def _compare_origin(self, shard: Shard, name: str) -> None:
        """Refuse features that were made with another context or probe than the store has."""
        if self._first is not None:
            return  # the probe is not there: it is made of these features again
        if shard.origin != self._origin():
            raise StoreError(
                f"store: expected features of the run that began the store in "
                f"{self._store.where(self._m, name)}, got those of another (delete it to have it "
                "made again)"
            )

    def _compute(self, segment: Segment, context: Mapping[str, Tensor] | None) -> None:
        """Compute features of a segment, but for what the journal has of it."""
        fitter, builder = self._fitter, self._builder
        at = segment.start - builder.start
        skip = min(max(0, self._journal_rows - at), segment.stop - segment.start)
        if skip:
            self._note(segment, 0, skip)
            self._bar.advance(skip)
            if at + skip == self._journal_rows:
                self._take_journal()
        if skip == segment.stop - segment.start:
            return
        made = fitter.features(self._weights, segment, self._m, context, fitter.offset, skip)
        done = skip
        with closing(made) as chunks:  # so that an error here ends eval mode at once
            for output, features in chunks:
                stop = done + len(features)
                self._note(segment, done, stop)
                builder.append(output, features)
                self._bar.advance(stop - done)
                done = stop
                self._make_probe()
                if time.monotonic() - self._written >= JOURNAL_SECONDS:
                    self._write_journal()

    def _note(self, segment: Segment, start: int, stop: int) -> None:
        ids = None if segment.ids is None else segment.ids[start:stop]
        batch = map_tensors(lambda tensor: tensor[start:stop], segment.batch)
        self._builder.note_data(batch, ids)

    def _take_journal(self) -> None:
        """Go on from the journal, whose samples' data have all been seen."""
        assert self._journal is not None, "it has samples"
        builder = self._builder
        if self._journal.data_digest != builder.data_digest:
            name = shard_name(self._addition, builder.start, "journal")
            where = f"{self._store.where(self._m, name)} (or delete it)"
            raise other_data(builder.start, builder.start + self._journal_rows, where)
        if self._first is not None:
            name = shard_name(self._addition, builder.start, "journal")
            self._make_probe_again(self._journal, name)
        builder.take(self._journal)
        self._journal = None
        self.kept = builder.start + builder.count

    def _make_probe(self) -> None:
        """Keep the first samples with their features, once there are features of them."""
        if self._first is None:
            return
        size = batches.batch_size(self._first)
        if self._builder.count < size or self._builder.bad:
            return
        rows = self._builder.so_far("", "")
        self._write_probe(rows, self._first)

    def _write_probe(self, rows: Shard, batch: Any) -> None:
        size = batches.batch_size(batch)
        first = rows._replace(
            **{name: getattr(rows, name)[:size].clone() for name in Shard._fields[:4]}
        )
        fitter = self._fitter
        kept = batch if fitter.keeps(batch) else None
        made = probes.make(first, kept, fitter.offset, fitter.device)
        self._probe = self._store.write_probe(self._m, made, self._addition)
        self._first = None

    # --- shards -----------------------------------------------------------------------------------

    def _close_shard(self, stop: int) -> None:
        fitter, builder = self._fitter, self._builder
        index = builder.start // fitter.rows
        known = None if fitter.known is None else fitter.known.data_digests
        if fitter.digests is not None and builder.data_digest != fitter.digests[index]:
            raise changed_data("train_loader", builder.start, stop)
        if self._journal is not None:
            name = shard_name(self._addition, builder.start, "journal")
            rows = f"{builder.start + self._journal_rows} or more"
            raise other_count(str(stop), rows, self._store.where(self._m, name))
        shard = self._stored
        if shard is not None:
            where = self._store.where(self._m, shard_name(self._addition, builder.start))
            if len(shard.features) != stop - builder.start:
                raise other_count(str(stop), builder.start + len(shard.features), where)
            if builder.data_digest != shard.data_digest:
                raise other_data(builder.start, stop, where)
        if known is not None and builder.data_digest != known[index]:
            raise other_data(builder.start, stop, self._store.manifest)
        if shard is None:
            shard = self._write_shard(builder.finish("train_loader", self._origin()), index)
        if self._first is not None:
            self._make_probe_again(shard, shard_name(self._addition, builder.start))
        self._shards.append(shard._replace(features=shard.features[:0]))
        self.kept, self._written = stop, time.monotonic()

    def _write_shard(self, shard: Shard, index: int) -> Shard:
        store, m, addition, start = self._store, self._m, self._addition, self._builder.start
        theirs = self._read(start)  # a run that shares the store may have been faster
        if theirs is not None and theirs.data_digest == shard.data_digest:
            self._compare_origin(theirs, shard_name(addition, start))
            store.remove_journal(m, start, addition)
            return theirs
        digest = store.write(m, start, shard, addition)
        if self._finished is not None and digest != self._finished.shards[index]:
            store.remove(m, shard_name(addition, start))
            raise self._other_bits(shard_name(addition, start))
        store.remove_journal(m, start, addition)
        return shard._replace(digest=digest)

    def _make_probe_again(self, shard: Shard, name: str) -> None:
        """Make a probe that is not there from the first shard's features, which must be its."""
        self._write_probe(shard, self._first)
        vouched = None if self._finished is None else self._finished.probe
        assert self._probe is not None, "written just now"
        try:
            if vouched not in (None, self._probe.digest):
                raise self._other_bits(probe_name(self._addition))
            self._compare_origin(shard, name)
            self._check(self._probe, name)
        except StoreError:
            self._store.remove(self._m, probe_name(self._addition))
            raise

    def _other_bits(self, name: str) -> StoreError:
        return StoreError(
            f"store: expected {self._store.where(self._m, name)} to come out as its checkpoint "
            f"summary vouches for it, got other bits (another machine, version or option? delete "
            f"the folder of checkpoint {self._m} and all kernel matrices to have them made again)"
        )

    def keep_what_there_is(self) -> None:
        """Write the samples so far of the shard under way, as far as that is possible."""
        if self._builder.count == 0 or self._builder.start + self._builder.count <= self.kept:
            return
        try:
            self._write_journal()
        except (OSError, StoreError):
            return  # what happened before is told

    def _write_journal(self) -> None:
        builder = self._builder
        if builder.bad or self._first is not None or not self._store.durable:
            return
        if builder.count == self._fitter.rows or builder.count != builder.noted:
            return  # it is a whole shard, or features of the last chunk are missing
        shard = builder.so_far(self._origin(), builder.data_digest, builder.ids)
        self._store.write_journal(self._m, builder.start, shard, self._addition)
        self._written = time.monotonic()
        self.kept = builder.start + builder.count

    # --- the summary ------------------------------------------------------------------------------

    def _summarise(self, count: int) -> None:
        """Say that the checkpoint's features are all there, and what damping its fit implies."""
        nothing = torch.zeros(0, dtype=torch.float32, device="cpu")
        weight, curvature, output = (
            torch.cat([nothing, *(getattr(shard, name) for shard in self._shards)])
            for name in ("weight", "curvature", "output")
        )
        above = fitted_above(output)
        if self._addition:
            first = self._store.read_summary(self._m)
            assert first is not None, "an addition follows the training set"
            above = first.fitted_above
        features = self._fitter.features
        ridges = [ImpliedRidge(features.proj_dim, above) for _ in range(features.blocks)]
        # Where f is not log odds nothing is implied: sums of no samples.
        for shard in self._all(count) if features.gradients.task.log_odds else ():
            for ridge, part in zip(ridges, shard.features.split(features.proj_dim, 1), strict=True):
                ridge.add(part, shard.weight, shard.output, shard.curvature)
        own = self._probe is not None and self._probe_addition == self._addition
        summary = CheckpointSummary(
            count,
            [shard.data_digest for shard in self._shards],
            above,
            weight,
            curvature,
            torch.stack([ridge.sums for ridge in ridges]),
            [shard.digest for shard in self._shards],
            None if self._context is None else self._context.digest,
            self._probe.digest if own and self._probe is not None else None,
        )
        self._store.write_summary(self._m, summary, self._addition)

    def _all(self, count: int) -> Iterator[Shard]:
        """Yield the shards of `count` samples, which are in the store."""
        for at, start in enumerate(range(0, count, self._fitter.rows)):
            stop, vouched = min(start + self._fitter.rows, count), self._shards[at].digest
            shard = self._store.read(self._m, start, stop, self._addition, vouched)
            if shard is None:
                raise self._store.missing(self._m, shard_name(self._addition, start))
            yield shard
