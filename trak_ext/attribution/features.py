"""From samples to features: per-sample gradients of a task, projected for a checkpoint."""

from __future__ import annotations

from collections.abc import Generator, Mapping

import torch
from torch import Tensor

from .. import _check
from ..gradients import GradientComputer, SampleGradients
from ..inputs.loaders import Segment
from ..kernels import operators
from ..kernels.projection import MAX_PROJ_DIM, MAX_SEED, check_nnz, project


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

    @property
    def width(self) -> int:
        """Features a sample has in all, blocks * proj_dim."""
        return self.blocks * self.proj_dim

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
        """Yield gradients and features fp32 [B, width] of a segment, a chunk at a time.

        Args:
            context: What the task prepared for this checkpoint, if it does.
            offset: Position of the loader's first sample in the training set; None for targets.
        """
        index = None
        if offset is not None:
            index = torch.arange(segment.start + offset, segment.stop + offset, device="cpu")
        parts = self.gradients(weights, segment.batch, context, index)
        for part in parts:
            grads = {name: grad.detach() for name, grad in part.grads.items()}
            features = project(
                grads,
                self.width,
                kind=self.kind,
                seed=self.seed,
                model_id=checkpoint,
                precision=self.precision,
                # A repetition has columns to itself, so each block's see every parameter.
                nnz=self.blocks * self.nnz if self.kind == "sjlt" else 1,
            )
            yield part, features
