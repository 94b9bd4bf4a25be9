"""The single pass over training features: scores of samples for targets that are solved for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _C
from . import cuda_paths, operators
from .streaming import Block, stream_blocks

_NAN_SCORES = "train_features: expected scores that can be ordered, got NaN"


class _Pair(NamedTuple):
    values: Tensor
    indices: Tensor


class TopK(_Pair):
    """The best training samples of each target: values and indices, both [t, k], best first.

    `Attributor` adds what the loaders say: `ids`, t lists of k sample ids, and `target_ids`, t ids;
    None where a loader gives none. A pair all the same: `values, indices = top_k`.
    """

    ids: list[list[int | str]] | None = None
    target_ids: list[int | str] | None = None

    def __repr__(self) -> str:
        num_targets, count = self.values.shape
        lines = [
            f"  target {t}: " + ", ".join(f"{i} ({v:.4g})" for i, v in zip(*row, strict=True))
            for t, row in enumerate(zip(self.indices[:3, :5], self.values[:3, :5], strict=True))
        ]
        if num_targets > 3:
            lines.append("  ...")
        ids = "" if self.ids is None else ", with their ids"
        title = f"TopK: {num_targets} targets, {count} training samples each{ids}: index (score)"
        return "\n".join([title, *lines])


class RunningTopK:
    """The best k of scores that come some samples at a time; equal ones by lower index.

    Args:
        num_targets: t.
        k: How many are kept, or as many as have come.
        largest: Whether the best are the largest, or the smallest.
        dtype, device: Of the scores, and of the result.
    """

    def __init__(
        self, num_targets: int, k: int, largest: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        nothing = torch.empty((num_targets, 0), dtype=dtype, device=device)
        self.best = TopK(nothing, nothing.long())
        self._k = k
        self._largest = largest

    def add(self, found: TopK, start: int = 0) -> None:
        """Take in the best, in order, of samples from number `start` on, after those before."""
        device = self.best.values.device
        found = TopK(found.values.to(device), found.indices.to(device) + start)
        if self.best.values.shape[1]:
            found = TopK(
                torch.cat([self.best.values, found.values], 1),
                torch.cat([self.best.indices, found.indices], 1),
            )
            found = self._sorted(found)
        best = (part[:, : self._k].contiguous() for part in found)
        self.best = TopK(*best)

    def add_scores(self, scores: Tensor, start: int) -> None:
        """Take in samples from number `start` on, with all of their scores [rows, t]."""
        indices = torch.arange(scores.shape[0], device=scores.device).expand(scores.shape[1], -1)
        found = self._sorted(TopK(scores.T, indices))
        self.add(TopK(found.values[:, : self._k], found.indices[:, : self._k]), start)

    def _sorted(self, found: TopK) -> TopK:
        # Stable, and equal values already stand with the lower index first.
        values, order = found.values.sort(dim=1, descending=self._largest, stable=True)
        return TopK(values, found.indices.gather(1, order))


def blocks_on(
    device: torch.device, features: Sequence[Tensor], block_bytes: int | None = None
) -> Iterator[Block]:
    """Yield features M x [n, k] on a device: as they are, or streamed there from host memory.

    Here alone is decided which.
    """
    if device.type == "cuda" and features[0].device.type == "cpu":
        yield from stream_blocks(features, device, block_bytes)
    else:
        yield Block(slice(0, features[0].shape[0]), list(features))


class SolvedTargets:
    """Targets with the inverse kernel applied, which training features meet in sample blocks.

    Args:
        solved: K_m^-1 phi_m(z) / M of each checkpoint and target, [M, t, k], fp64.
        dtype: fp64, or fp32 for everything else; of the scores and of the arithmetic.
        precision: Of fp32 on a CUDA device, see `score`.
        stream: How features M x [n, k] come to the targets' device; None for `blocks_on`.

    `score` and `top_k` take features in host memory where the targets are on a CUDA device: they
    are streamed there, and the device never holds them, or all scores of a top-k, as a whole.
    """

    def __init__(
        self,
        solved: Tensor,
        dtype: torch.dtype,
        precision: str = "highest",
        stream: Callable[[Sequence[Tensor]], Iterator[Block]] | None = None,
    ) -> None:
        self.dtype = dtype
        self._stream = stream
        self._solved = solved.to(dtype).contiguous()
        self._precision = operators.PRECISIONS[precision]

    @property
    def device(self) -> torch.device:
        """Where the targets are, and their scores will be."""
        return self._solved.device

    @property
    def num_targets(self) -> int:
        """How many targets there are."""
        return self._solved.shape[1]

    def _cuda_path(self) -> str:
        return cuda_paths.scoring_path(self._solved.device, self.dtype)

    def _cuda_queue(self) -> dict[str, int]:
        return operators.cuda_queue(self._solved.device)

    def _native(self) -> Any:
        return _C

    def _cuda_workspace(self, scoring: _C.Scoring, count: int) -> Tensor:
        """Return what scores (count 0) or a running top-k need on the device, 16-byte aligned."""
        limit = operators.CUDA_WORKSPACE_BYTES
        size = self._native().cuda_workspace_bytes(scoring, limit, count=count)
        return torch.empty(size, dtype=torch.uint8, device=self._solved.device)

    def _scoring(
        self, features: Sequence[Tensor], weights: Tensor, coefficients: Tensor | None
    ) -> tuple[_C.Scoring, list[Any]]:
        """Return what the kernels are told, and what must outlive the call."""
        _, num_targets, proj_dim = self._solved.shape
        rows = list(features)
        # The kernel reads one dtype as stored: its own, or a half type where its own is fp32.
        stored = rows[0].dtype
        readable = stored == self.dtype or (self.dtype == torch.float32 and stored.itemsize == 2)
        if not readable or any(phi.dtype != stored for phi in rows):
            rows = [phi.to(self.dtype) for phi in rows]
        rows = [phi if phi.stride(1) == 1 or proj_dim == 1 else phi.contiguous() for phi in rows]
        weights = weights.to(self.dtype).contiguous()
        keep: list[Any] = [rows, weights]
        coefficient_address = 0
        if coefficients is not None:
            coefficients = coefficients.to(self.dtype).contiguous()
            keep.append(coefficients)
            coefficient_address = coefficients.data_ptr()
        scoring = _C.Scoring(
            dtype=operators.DTYPE_CODES[self.dtype],
            features=[phi.data_ptr() for phi in rows],
            row_strides=[phi.stride(0) for phi in rows],
            feature_dtype=operators.DTYPE_CODES[rows[0].dtype],
            num_train=features[0].shape[0],
            num_targets=num_targets,
            proj_dim=proj_dim,
            solved=self._solved.data_ptr(),
            coefficients=coefficient_address,
            weights=weights.data_ptr(),
            precision=self._precision,
        )
        return scoring, keep

    def _blocks(
        self, features: Sequence[Tensor], weights: Tensor, coefficients: Tensor | None
    ) -> Iterator[tuple[int, list[Tensor], Tensor, Tensor | None]]:
        """Yield start, features, weights and coefficients of consecutive samples, on the device."""
        weights = weights.to(self.device)
        coefficients = None if coefficients is None else coefficients.to(self.device)
        stream = self._stream or (lambda given: blocks_on(self.device, given))
        for rows, block in stream(features):
            part = None if coefficients is None else coefficients[:, rows]
            yield rows.start, block, weights[rows], part

    def _calls(
        self, features: Sequence[Tensor], weights: Tensor, coefficients: Tensor | None
    ) -> Iterator[tuple[int, list[Tensor], Tensor, Tensor | None]]:
        """Yield the same for a kernel's calls: on the CPU so few samples that Ctrl-C is seen."""
        for start, block, weight, part in self._blocks(features, weights, coefficients):
            for rows in self._rows_of_calls(block[0].shape[0]):
                own = None if part is None else part[:, rows]
                yield start + rows.start, [phi[rows] for phi in block], weight[rows], own

    def _rows_of_calls(self, num_train: int) -> Iterator[slice]:
        if self.device.type == "cuda":
            yield slice(0, num_train)
            return
        work = self._solved.numel() * (2 if self.dtype == torch.float64 else 1)
        yield from operators.pieces(num_train, work, 64)

    def score(
        self, features: Sequence[Tensor], weights: Tensor, coefficients: Tensor | None = None
    ) -> Tensor:
        """Return scores [n, t] of samples with features M x [n, k] and weights [n].

        `coefficients` [M, n] scale each checkpoint's term.
        """
        scores = [
            self._score(block, weight, part)
            for _, block, weight, part in self._blocks(features, weights, coefficients)
        ]
        if len(scores) == 1:
            return scores[0]
        return torch.cat([self._solved.new_empty((0, self.num_targets)), *scores])

    def _score(
        self, features: Sequence[Tensor], weights: Tensor, coefficients: Tensor | None
    ) -> Tensor:
        out = self._solved.new_empty((features[0].shape[0], self.num_targets))
        if out.device.type == "cuda":
            self._cuda_score(features, weights, coefficients, out)
            return out
        for rows in self._rows_of_calls(out.shape[0]):
            own = None if coefficients is None else coefficients[:, rows]
            scoring, keep = self._scoring([phi[rows] for phi in features], weights[rows], own)
            threads = operators.get_num_threads()
            _C.score(scoring, out=out[rows].data_ptr(), num_threads=threads)
            del keep
        return out

    def _cuda_score(
        self,
        features: Sequence[Tensor],
        weights: Tensor,
        coefficients: Tensor | None,
        out: Tensor,
    ) -> None:
        path = self._cuda_path()
        scoring, keep = self._scoring(features, weights, coefficients)
        workspace = self._cuda_workspace(scoring, 0)
        self._native().cuda_score(
            scoring,
            path=path,
            out=out.data_ptr(),
            out_row_stride=out.stride(0),
            out_target_stride=out.stride(1),
            workspace=workspace.data_ptr(),
            workspace_bytes=workspace.numel(),
            **self._cuda_queue(),
        )
        del keep

    def top_k(
        self,
        features: Sequence[Tensor],
        weights: Tensor,
        k: int,
        largest: bool = True,
        coefficients: Tensor | None = None,
    ) -> TopK:
        """Return the best k of the same scores for each target without holding them all."""
        running = RunningTopK(self.num_targets, k, largest, self.dtype, self.device)
        for start, block, weight, part in self._calls(features, weights, coefficients):
            count = min(k, block[0].shape[0])
            # The kernels look for the largest: of opposite scores where the smallest are asked for.
            found = self._largest(block, weight if largest else -weight, count, part)
            if not largest:
                found = TopK(-found.values, found.indices)
            running.add(found, start)
        return running.best

    def _largest(
        self, features: Sequence[Tensor], weights: Tensor, k: int, coefficients: Tensor | None
    ) -> TopK:
        if self.device.type == "cuda":
            return self._cuda_top_k(features, weights, k, coefficients)
        scoring, keep = self._scoring(features, weights, coefficients)
        values = self._solved.new_empty((self.num_targets, k))
        indices = self._solved.new_empty((self.num_targets, k), dtype=torch.int64)
        addresses = {"values": values.data_ptr(), "indices": indices.data_ptr()}
        threads = operators.get_num_threads()
        finite = _C.top_k(scoring, count=k, **addresses, num_threads=threads)
        del keep
        if not finite:
            raise ValueError(_NAN_SCORES)
        return TopK(values, indices)

    def _cuda_top_k(
        self, features: Sequence[Tensor], weights: Tensor, k: int, coefficients: Tensor | None
    ) -> TopK:
        """Return the k largest; waits for the device to know that no score is NaN."""
        if k > _C.CUDA_TOP_K_MAX:
            return self._cuda_top_k_in_blocks(features, weights, k, coefficients)
        best, not_a_number = self._launch_cuda_top_k(features, weights, k, coefficients)
        if bool(not_a_number):
            raise ValueError(_NAN_SCORES)
        return best

    def _launch_cuda_top_k(
        self, features: Sequence[Tensor], weights: Tensor, k: int, coefficients: Tensor | None
    ) -> tuple[TopK, Tensor]:
        """Start looking for the k largest; return them and a flag [1], not 0 if a score is NaN."""
        num_targets, device = self._solved.shape[1], self._solved.device
        path = self._cuda_path()
        scoring, keep = self._scoring(features, weights, coefficients)
        values = self._solved.new_empty((num_targets, k))
        indices = torch.empty((num_targets, k), dtype=torch.int64, device=device)
        not_a_number = torch.zeros(1, dtype=torch.int32, device=device)
        workspace = self._cuda_workspace(scoring, k)
        self._native().cuda_top_k(
            scoring,
            path=path,
            count=k,
            values=values.data_ptr(),
            indices=indices.data_ptr(),
            not_a_number=not_a_number.data_ptr(),
            workspace=workspace.data_ptr(),
            workspace_bytes=workspace.numel(),
            **self._cuda_queue(),
        )
        del keep
        return TopK(values, indices), not_a_number

    def _cuda_top_k_in_blocks(
        self, features: Sequence[Tensor], weights: Tensor, k: int, coefficients: Tensor | None
    ) -> TopK:
        """Return the k largest for a k above the kernel's: scores of some samples at a time."""
        num_train, num_targets = features[0].shape[0], self._solved.shape[1]
        row_bytes = max(1, num_targets * self._solved.element_size())
        step = max(k, operators.CUDA_WORKSPACE_BYTES // row_bytes)
        running = RunningTopK(num_targets, k, True, self.dtype, self.device)
        for start in range(0, num_train, step):
            rows = slice(start, start + step)
            part = None if coefficients is None else coefficients[:, rows]
            scores = self._score([phi[rows] for phi in features], weights[rows], part)
            if bool(scores.isnan().any()):
                raise ValueError(_NAN_SCORES)
            running.add_scores(scores, start)
        return running.best
