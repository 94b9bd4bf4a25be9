"""From samples to features: gradients are projected and gathered; what contexts are made of."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _check
from ..gradients import GradientComputer, SampleGradients
from ..inputs import batches
from ..inputs.batches import SampleDigest, SampleId, Segment, batch_size
from ..kernels import operators
from ..kernels.projection import MAX_PROJ_DIM, MAX_SEED, check_nnz
from ..store import Context, Shard, StoreError
from ..tasks import ModelOutput


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
        skip: int = 0,
    ) -> Generator[tuple[ModelOutput, Tensor], None, None]:
        """Yield f, Q and R, and features fp32 [B, width], of a segment, a sample chunk at a time.

        Args:
            context: What the task prepared for this checkpoint, if it does.
            offset: Position of the loader's first sample in the training set; None for targets.
            skip: The segment's first samples that are left out, without another cut of the rest
                into sample chunks where they are whole ones.
        """
        index = None
        if offset is not None:
            index = torch.arange(segment.start + offset, segment.stop + offset, device="cpu")
        # Repetitions have columns of their own, so each projection block sees every parameter.
        nnz = self.blocks * self.nnz if self.kind == "sjlt" else 1
        words = (self.seed & 0xFFFFFFFF, self.seed >> 32)
        for chunk in self.gradients(weights, segment.batch, context, index, skip):
            how = (self.kind, *words, checkpoint)
            if not chunk.rows:
                grads = [g.detach().reshape(len(g), g[0].numel()) for g in chunk.grads.values()]
                features = operators.project(grads, self.width, *how, 0, self.precision, nnz)
                del grads
            else:
                features = torch.zeros(len(chunk.output), self.width, device="cpu")
                operators.project_placed(self._placed(chunk), features, *how, self.precision, nnz)
            figures = chunk.figures
            del chunk  # before the next is computed
            yield figures, features

    def _placed(self, chunk: SampleGradients) -> list[tuple[Tensor, int]]:
        """Return gradients [B, P_i], each with its param_offset, without a table's other rows."""
        placed: list[tuple[Tensor, int]] = []
        offset = 0
        for name, shape in self.gradients.shapes.items():
            if name in chunk.rows:
                placed += chunk.rows[name].placed(offset)
            else:
                grads = chunk.grads[name].detach()
                placed.append((grads.reshape(len(grads), math.prod(shape)), offset))
            offset += math.prod(shape)
        return placed


class ShardBuilder:
    """Collects features, Q, R and f of samples from number `start` on.

    Args:
        start: Number of the first sample.
        width: Features per sample.
    """

    def __init__(self, start: int, width: int) -> None:
        self.start = start
        self.count = 0  # samples that there are features of
        self._digest = SampleDigest()
        self._noted = 0  # samples whose data are in the digest
        self._ids: list[SampleId] | None = None
        nothing = torch.zeros(0, dtype=torch.float32, device="cpu")
        self._features = [nothing.reshape(0, width)]
        self._figures = [[nothing] for _ in range(3)]  # Q, R and f
        self.bad: list[int] = []

    @property
    def data_digest(self) -> str:
        """The digest of the samples so far."""
        return self._digest.hexdigest()

    @property
    def noted(self) -> int:
        """The samples so far, with features or without."""
        return self._noted

    @property
    def ids(self) -> list[SampleId] | None:
        """The ids of the samples so far, where they have any."""
        return self._ids

    def note_data(self, batch: Any, ids: list[SampleId] | None) -> None:
        """Take the data of samples, and their ids, into the digest."""
        self._digest.add(batch, ids)
        self._noted += batch_size(batch)
        if ids is not None:
            self._ids = [*(self._ids or []), *ids]

    def append(self, output: ModelOutput, features: Tensor) -> None:
        """Add a sample chunk's features, noting samples with NaN or Inf in anything."""
        figures = (output.weight, output.curvature, output.output)
        good = torch.isfinite(features).all(1)
        for kept, figure in zip(self._figures, figures, strict=True):
            good &= torch.isfinite(figure)
            kept.append(figure.float().cpu())
        bad = torch.nonzero(~good).reshape(-1) + self.start + self.count
        self.bad.extend(bad.tolist())
        self._features.append(features.cpu())
        self.count += features.shape[0]

    def take(self, kept: Shard) -> None:
        """Begin with features that were kept of the first samples."""
        self._features.append(kept.features)
        for own, figure in zip(self._figures, kept[1:4], strict=True):
            own.append(figure)
        self.count += len(kept.features)

    def finish(self, name: str, origin: str = "") -> Shard:
        """Return the shard, or refuse it and name the loader's samples with NaN or Inf."""
        if self.bad:
            raise not_finite(name, self.bad)
        return self.so_far(origin, self.data_digest, self._ids)

    def so_far(self, origin: str, data_digest: str, ids: list[SampleId] | None = None) -> Shard:
        """Return the samples that there are features of, given the digest of their data."""
        weight, curvature, output = (torch.cat(kept) for kept in self._figures)
        features = torch.cat(self._features)
        return Shard(features, weight, curvature, output, data_digest, ids, origin)


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
    batches = _DigestedBatches(loader, device, computer.task.ids_as)
    made = computer.prepare(weights, iter(batches), checkpoint)
    on_cpu = {name: tensor.cpu() for name, tensor in made.items()}
    return Context(on_cpu, batches.of_all()), batches.count


def context_digest(loader: Iterable[Any], device: torch.device, ids_as: Sequence[Any] = ()) -> str:
    """Return the digest of a loader's samples, as `Context.data_digest` has it.

    Args:
        ids_as: The task's.
    """
    return _DigestedBatches(loader, device, ids_as).of_all()


class _DigestedBatches:
    """(position of the first sample, batch), in order, with the digest and number of samples."""

    def __init__(self, loader: Iterable[Any], device: torch.device, ids_as: Sequence[Any]) -> None:
        self._digest = SampleDigest()
        self._batches = self._all(loader, device, ids_as)
        self.count = 0

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        return self._batches

    def of_all(self) -> str:
        """Return the digest of all samples, however many were looked at."""
        for _ in self._batches:
            pass
        return self._digest.hexdigest()

    def _all(
        self, loader: Iterable[Any], device: torch.device, ids_as: Sequence[Any]
    ) -> Iterator[tuple[int, Any]]:
        for segment in batches.segments(loader, device, 2**62, ids_as):
            self._digest.add(segment.batch, segment.ids)
            self.count = segment.stop
            yield segment.start, segment.batch


def require_context(context: Context | None, m: int, where: str) -> Context:
    """Return a stored context, which must be there; `where` is its place."""
    if context is None:
        raise StoreError(
            f"store: expected what the task prepared for checkpoint {m}, got none in {where} (put "
            f"the file back, or delete the folder of checkpoint {m} and fit again)"
        )
    return context


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


def other_data(start: int, stop: int, where: str) -> StoreError:
    """Return the error for a store that was made of other samples; `where` has them."""
    return StoreError(
        "store: expected one made with the data of train_loader, got other data in samples "
        f"{start} to {stop - 1} of {where} (use another folder)"
    )


def other_count(found: str, stored: int | str, where: str) -> StoreError:
    """Return the error for a store that was made of another number of samples."""
    return StoreError(
        f"train_loader: expected {stored} samples as the store holds, by {where}, got {found}"
    )
