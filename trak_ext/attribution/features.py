"""From samples to features in a store: gradients are projected, gathered into shards, compared."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import closing
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .. import _check
from ..estimator.damping import ImpliedRidge, fitted_above
from ..gradients import GradientComputer, SampleGradients
from ..inputs import loaders
from ..inputs.loaders import SampleDigest, SampleId, Segment, batch_tensors
from ..kernels import operators
from ..kernels.projection import MAX_PROJ_DIM, MAX_SEED, check_nnz
from ..store import CheckpointSummary, Context, Shard, Store, StoreError, base


class FeatureMaker:
    """Gradients and features of samples under a checkpoint's weights.

    Args:
        gradients: Of the task and the chosen parameters.
        proj_dim: Features k of each projection block.
        blocks: Independent projections; block b takes columns b k to (b + 1) k - 1 of the matrix.
        kind, seed, precision, nnz: As in `trak_ext.project`; nnz entries of each block.
    """

    def __init__(
        self,
        gradients: GradientComputer,
        proj_dim: int,
        blocks: int,
        kind: str,
        seed: int,
        precision: str,
        nnz: int = 1,
    ) -> None:
        self.gradients = gradients
        self.proj_dim = _check.integer("proj_dim", proj_dim, 1, MAX_PROJ_DIM)
        self.blocks = _check.integer("blocks", blocks, 1, MAX_PROJ_DIM // self.proj_dim)
        self.kind = _check.choice("kind", kind, operators.KINDS)
        self.seed = _check.integer("seed", seed, 0, MAX_SEED)
        self.precision = _check.choice("precision", precision, operators.PRECISIONS)
        self.nnz = check_nnz(nnz, self.kind, self.proj_dim)
        self.width = self.blocks * self.proj_dim  # features per sample

    def of_task(self, gradients: GradientComputer) -> FeatureMaker:
        """Return the same projections for the gradients of another task."""
        return FeatureMaker(
            gradients, self.proj_dim, self.blocks, self.kind, self.seed, self.precision, self.nnz
        )

    def __call__(
        self,
        weights: Mapping[str, Tensor],
        segment: Segment,
        checkpoint: int,
        context: Mapping[str, Tensor] | None = None,
        offset: int | None = None,
    ) -> Generator[tuple[SampleGradients, Tensor], None, None]:
        """Yield gradients and features fp32 [B, width] of a segment, a sample chunk at a time.

        Args:
            context: What the task prepared for this checkpoint, if it does.
            offset: Position of the loader's first sample in the training set; None for targets.
        """
        index = None
        if offset is not None:
            index = torch.arange(segment.start + offset, segment.stop + offset, device="cpu")
        # Repetitions have columns of their own, so each projection block sees every parameter.
        nnz = self.blocks * self.nnz if self.kind == "sjlt" else 1
        words = (self.seed & 0xFFFFFFFF, self.seed >> 32)
        for chunk in self.gradients(weights, segment.batch, context, index):
            grads = [g.detach().reshape(len(g), g[0].numel()) for g in chunk.grads.values()]
            yield (
                chunk,
                operators.project(
                    grads, self.width, self.kind, *words, checkpoint, 0, self.precision, nnz
                ),
            )


class ShardBuilder:
    """Collects features, Q, R and f of samples from number `start` on, or checks a stored shard.

    Args:
        start: Number of the first sample.
        width: Features per sample.
        stored: What the store already holds in this place, if anything.
    """

    def __init__(self, start: int, width: int, stored: Shard | None = None) -> None:
        self.start = start
        self.stored = stored
        self._digest = SampleDigest()
        self._ids: list[SampleId] | None = None
        nothing = torch.zeros(0, dtype=torch.float32, device="cpu")
        self._features = [nothing.reshape(0, width)]
        self._figures = [[nothing] for _ in range(3)]  # Q, R and f
        self._bad: list[int] = []
        self._count = 0

    @property
    def data_digest(self) -> str:
        """The digest of the samples so far."""
        return self._digest.hexdigest()

    def note_data(self, segment: Segment) -> None:
        """Take the data of samples, and their ids, into the digest."""
        self._digest.update(batch_tensors(segment.batch), segment.ids)
        if segment.ids is not None:
            self._ids = [*(self._ids or []), *segment.ids]

    def append(self, gradients: SampleGradients, features: Tensor) -> None:
        """Add a sample chunk's features, noting samples with NaN or Inf in anything."""
        figures = (gradients.weight, gradients.curvature, gradients.output)
        good = torch.isfinite(features).all(1)
        for kept, figure in zip(self._figures, figures, strict=True):
            good &= torch.isfinite(figure)
            kept.append(figure.float().cpu())
        bad = torch.nonzero(~good).reshape(-1) + self.start + self._count
        self._bad.extend(bad.tolist())
        self._features.append(features.cpu())
        self._count += features.shape[0]

    def compare_with_stored(self, stop: int) -> Shard | None:
        """Return the stored shard if it holds samples start .. stop - 1 of the same data."""
        if self.stored is None:
            return None
        rows = self.stored.features.shape[0]
        if rows != stop - self.start:
            raise other_count(str(stop), self.start + rows)
        if self.data_digest != self.stored.data_digest:
            raise other_data(self.start, stop)
        return self.stored

    def finish(self, name: str) -> Shard:
        """Return the shard, or refuse it and name the loader's samples with NaN or Inf."""
        if self._bad:
            raise not_finite(name, self._bad)
        weight, curvature, output = (torch.cat(kept) for kept in self._figures)
        features = torch.cat(self._features)
        return Shard(features, weight, curvature, output, self.data_digest, self._ids)


class Fitter:
    """Fits the checkpoints one after the other on the training set, or on an addition to it.

    Args:
        store: Opened for these settings.
        features: What is computed.
        device: Where gradients are computed.
        addition: 0 for the training set, or the addition's number.
        offset: Position of its first sample in the training set.
    """

    def __init__(
        self,
        store: Store,
        features: FeatureMaker,
        device: torch.device,
        addition: int,
        offset: int,
    ) -> None:
        self._store = store
        self._features = features
        self._device = device
        self._addition = addition
        self._offset = offset
        self._rows = base.shard_rows(features.width)
        self._expected: list[str] | None = None  # digests of the first checkpoint's shards

    def fit(self, m: int, weights: Mapping[str, Tensor], loader: Iterable[Any], bar: tqdm) -> None:
        """Fit checkpoint m: compare what the store holds with the data, compute and write the rest.

        Raises:
            ValueError: samples with NaN or Inf, or data that change between checkpoints.
            StoreError: a store of other data.
        """
        store, addition, rows = self._store, self._addition, self._rows
        finished = store.read_summary(m, addition)
        context = self._context(m, weights, loader, finished)
        digests: list[str] = []
        figures: list[list[Tensor]] = [[], [], []]  # Q, R and f of each shard
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
                store.write(m, builder.start, shard, addition)
            digests.append(shard.data_digest)
            for noted, figure in zip(figures, shard[1:4], strict=True):
                noted.append(figure)

        for segment in loaders.segments(loader, self._device, rows):
            start, stop = segment.start, segment.stop
            if self._expected is not None and start // rows >= len(self._expected):
                raise changed_data("train_loader", start, stop)
            if finished is not None and stop > finished.num_samples:
                raise other_count(f"{stop} or more", finished.num_samples)
            if start % rows == 0:
                stored = store.read(m, start, addition=addition)
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
        if store.read(m, -(-count // rows) * rows, addition=addition) is not None:
            raise other_count(str(count), "more")
        if self._expected is not None and len(digests) != len(self._expected):
            raise changed_data("train_loader", count, count)
        if finished is None:
            self._summarise(m, count, digests, figures)
        self._expected = digests

    def _summarise(
        self, m: int, count: int, digests: list[str], figures: list[list[Tensor]]
    ) -> None:
        """Say that checkpoint m's features are all there, and what damping its fit implies."""
        nothing = torch.zeros(0, dtype=torch.float32, device="cpu")
        weight, curvature, output = (torch.cat([nothing, *parts]) for parts in figures)
        above = fitted_above(output)
        if self._addition:
            first = self._store.read_summary(m)
            assert first is not None, "an addition follows the training set"
            above = first.fitted_above
        proj_dim = self._features.proj_dim
        ridges = [ImpliedRidge(proj_dim, above) for _ in range(self._features.blocks)]
        # Where f is not log odds nothing is implied: sums of no samples.
        for shard in self._stored(m, count) if self._features.gradients.task.log_odds else ():
            for ridge, features in zip(ridges, shard.features.split(proj_dim, 1), strict=True):
                ridge.add(features, shard.weight, shard.output, shard.curvature)
        implied = torch.stack([ridge.sums for ridge in ridges])
        summary = CheckpointSummary(count, digests, above, weight, curvature, implied)
        self._store.write_summary(m, summary, self._addition)

    def _stored(self, m: int, count: int) -> Iterator[Shard]:
        """Yield the shards of `count` samples, which are in the store."""
        for start in range(0, count, self._rows):
            shard = self._store.read(m, start, min(start + self._rows, count), self._addition)
            assert shard is not None, "written just now"
            yield shard

    def _context(
        self,
        m: int,
        weights: Mapping[str, Tensor],
        loader: Iterable[Any],
        finished: CheckpointSummary | None,
    ) -> dict[str, Tensor] | None:
        """Return what the task prepares from the training set, without additions, once."""
        computer = self._features.gradients
        if computer.task.prepare is None:
            return None
        stored = self._store.read_context(m)
        if self._addition or finished is not None:
            return on_device(require_context(stored, m), self._device)
        if stored is None:
            stored, _ = prepare_context(computer, weights, loader, self._device, m)
            self._store.write_context(m, stored)
        elif stored.data_digest != _DigestedBatches(loader, self._device).of_all():
            raise StoreError(
                f"store: expected one made with the data of train_loader, got what the task "
                f"prepared for checkpoint {m} from other data (use another folder)"
            )
        return on_device(stored.tensors, self._device)


# --- what a task prepares from the training data --------------------------------------------------


def prepare_context(
    computer: GradientComputer,
    weights: Mapping[str, Tensor],
    loader: Iterable[Any],
    device: torch.device,
    checkpoint: int,
) -> tuple[Context, int]:
    """Return what the computer's task prepares from all of a loader's samples, and their number.

    The tensors are on the CPU.
    """
    batches = _DigestedBatches(loader, device)
    made = computer.prepare(weights, iter(batches), checkpoint)
    on_cpu = {name: tensor.cpu() for name, tensor in made.items()}
    return Context(on_cpu, batches.of_all()), batches.count


class _DigestedBatches:
    """(position of the first sample, batch), in order, with the digest and number of samples."""

    def __init__(self, loader: Iterable[Any], device: torch.device) -> None:
        self._digest = SampleDigest()
        self._batches = self._all(loader, device)
        self.count = 0

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        return self._batches

    def of_all(self) -> str:
        """Return the digest of all samples, however many were looked at."""
        for _ in self._batches:
            pass
        return self._digest.hexdigest()

    def _all(self, loader: Iterable[Any], device: torch.device) -> Iterator[tuple[int, Any]]:
        for segment in loaders.segments(loader, device, 2**62):
            self._digest.update(batch_tensors(segment.batch), segment.ids)
            self.count = segment.stop
            yield segment.start, segment.batch


def require_context(context: Context | None, m: int) -> dict[str, Tensor]:
    """Return the tensors of a stored context, which must be there."""
    if context is None:
        raise StoreError(
            f"store: expected what the task prepared for checkpoint {m}, got none (fit the "
            "training set first, addition=0)"
        )
    return context.tensors


def on_device(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Return tensors on a device."""
    return {name: tensor.to(device) for name, tensor in tensors.items()}


# --- what is refused on the way -------------------------------------------------------------------


def not_finite(name: str, samples: list[int], what: str = "gradients") -> ValueError:
    """Return the error for a loader's samples, by number, with NaN or Inf in something."""
    shown = ", ".join(map(str, samples[:10])) + (", ..." if len(samples) > 10 else "")
    return ValueError(
        f"{name}: expected samples with finite outputs and {what}, got NaN or Inf for "
        f"{len(samples)} of them: {shown}"
    )


def changed_data(name: str, start: int, stop: int) -> ValueError:
    """Return the error for a loader whose passes differ."""
    return ValueError(
        f"{name}: expected the same samples in the same order for every checkpoint, got other "
        f"data around samples {start} to {stop} (a loader that shuffles or augments?)"
    )


def other_data(start: int, stop: int) -> StoreError:
    """Return the error for a store that was made of other samples."""
    return StoreError(
        "store: expected one made with the data of train_loader, got other data in samples "
        f"{start} to {stop - 1} (use another folder)"
    )


def other_count(found: str, stored: int | str) -> StoreError:
    """Return the error for a store that was made of another number of samples."""
    return StoreError(f"train_loader: expected {stored} samples as the store holds, got {found}")
