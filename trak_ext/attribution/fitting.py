"""Filling a store: a checkpoint's features of one part of the training set."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .. import store as stores
from ..estimator.damping import fitted_above
from ..inputs import loaders
from ..store import DirectoryStore, Mark, MemoryStore, Shard, StoreError
from .block_sums import implied_sums
from .contexts import data_digest, on_device, prepare_context, require_context
from .features import FeatureMaker
from .shard_builder import ShardBuilder, changed_data, other_count, other_data


class PartFitter:
    """Fits the checkpoints one after the other on one part of the training set.

    Args:
        store: Opened for these settings.
        features: What is computed.
        device: Where gradients are computed.
        part: Number of the part.
        offset: Position of its first sample in the training set.
    """

    def __init__(
        self,
        store: MemoryStore | DirectoryStore,
        features: FeatureMaker,
        device: torch.device,
        part: int,
        offset: int,
    ) -> None:
        self._store = store
        self._features = features
        self._device = device
        self._part = part
        self._offset = offset
        self._rows = stores.shard_rows(features.width)
        self._expected: list[str] | None = None  # digests of the first checkpoint's shards

    def fit(self, m: int, weights: Mapping[str, Tensor], loader: Iterable[Any], bar: tqdm) -> None:
        """Fit checkpoint m: compare what the store holds with the data, compute and write the rest.

        Raises:
            ValueError: samples that are not finite, or data that change between checkpoints.
            StoreError: a store of other data.
        """
        store, part, rows = self._store, self._part, self._rows
        finished = store.read_mark(m, part)
        context = self._context(m, weights, loader, finished)
        digests: list[str] = []
        figures: list[list[Tensor]] = [[], [], []]
        builder = ShardBuilder(0, self._features.width)
        count = 0

        def close_shard() -> None:
            index = len(digests)
            if self._expected is not None and builder.data_digest != self._expected[index]:
                raise changed_data("train_loader", builder.start, count)
            shard = builder.compare_with_stored(count)
            if finished is not None and builder.data_digest != finished.data_digests[index]:
                raise other_data(builder.start, count)
            if shard is None:
                shard = builder.finish("train_loader")
                store.write(m, builder.start, shard, part)
            digests.append(shard.data_digest)
            for noted, figure in zip(
                figures, (shard.weight, shard.curvature, shard.output), strict=True
            ):
                noted.append(figure)

        for segment in loaders.segments(loader, self._device, rows):
            start, stop = segment.start, segment.stop
            if self._expected is not None and start // rows >= len(self._expected):
                raise changed_data("train_loader", start, stop)
            if finished is not None and stop > finished.num_samples:
                raise other_count(f"{stop} or more", finished.num_samples)
            if start % rows == 0:
                stored = store.read(m, start, part=part)
                builder = ShardBuilder(start, self._features.width, stored)
            builder.note_data(segment)
            if builder.stored is None:
                made = self._features(weights, segment, m, context, self._offset)
                with closing(made) as chunks:  # so that an error here ends eval mode at once
                    for gradients, features in chunks:
                        builder.append(gradients, features)
            count = stop
            bar.update(stop - start)
            if stop % rows == 0:
                close_shard()
        if count % rows:
            close_shard()
        if finished is not None and finished.num_samples != count:
            raise other_count(str(count), finished.num_samples)
        if store.read(m, -(-count // rows) * rows, part=part) is not None:
            raise other_count(str(count), "more")
        if self._expected is not None and len(digests) != len(self._expected):
            raise changed_data("train_loader", count, count)
        if finished is None:
            weight, curvature, output = (_joined(parts) for parts in figures)
            above = fitted_above(output)
            if part:
                first = store.read_mark(m)
                assert first is not None, "a part follows those before it"
                above = first.fitted_above
            # Where f is not log odds nothing is implied: sums of no samples.
            shards = self._stored(m, count) if self._features.gradients.task.log_odds else []
            sizes = (self._features.proj_dim, self._features.blocks)
            implied = implied_sums(shards, *sizes, above)
            mark = Mark(count, digests, above, weight, curvature, implied)
            store.write_mark(m, mark, part)
        self._expected = digests

    def _stored(self, m: int, count: int) -> Iterator[Shard]:
        """Yield the shards of `count` samples, which are in the store."""
        for start in range(0, count, self._rows):
            shard = self._store.read(m, start, min(start + self._rows, count), self._part)
            assert shard is not None, "written just now"
            yield shard

    def _context(
        self,
        m: int,
        weights: Mapping[str, Tensor],
        loader: Iterable[Any],
        finished: Mark | None,
    ) -> dict[str, Tensor] | None:
        """Return what the task prepares from the training data, made from part 0 once."""
        computer = self._features.gradients
        if computer.task.prepare is None:
            return None
        stored = self._store.read_context(m)
        if self._part or finished is not None:
            return on_device(require_context(stored, m), self._device)
        if stored is None:
            stored, _ = prepare_context(computer, weights, loader, self._device, m)
            self._store.write_context(m, stored)
        elif stored.data_digest != data_digest(loader, self._device):
            raise StoreError(
                f"store: expected one made with the data of train_loader, got what the task "
                f"prepared for checkpoint {m} from other data (use another folder)"
            )
        return on_device(stored.tensors, self._device)


def _joined(parts: list[Tensor]) -> Tensor:
    """Return figures of all samples, fp32 [n]."""
    return torch.cat([torch.zeros(0, dtype=torch.float32, device="cpu"), *parts])
