"""The interface that baselines share with `Attributor`: fit, attribute, and what they keep."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .. import _check
from ..inputs import loaders
from ..inputs.batches import batch_tensors
from ..inputs.checkpoints import Checkpoint, Checkpoints
from ..inputs.devices import choose_device
from ..solved_targets import TopK, merge_top_k
from ..store.digest import SampleDigest
from ..tasks import Task, get_task

_BLOCK_SCORES = 2**22  # scores that are made at a time: 16 MiB


class Features(NamedTuple):
    """Features of samples under one checkpoint."""

    rows: Tensor  # fp32 [n, d]
    weight: Tensor  # fp32 [n], Q = -d loss / df


class Baseline(ABC):
    """Scores pair by pair: the sum over checkpoints of a function of two samples' features.

    A subclass says what a sample's features are and how two of them meet.

    Args:
        model, task, checkpoints, device, progress: As in `Attributor`.
        chunk_size: Samples taken through the model at a time; None for the method's own choice.

    Loaders yield what `Attributor`'s do, in the same order every time.

    The features of all training samples and checkpoints, M x n x d fp32 numbers, stay in memory;
    n_train x n_targets is held only where it is asked for.
    """

    def __init__(
        self,
        model: nn.Module,
        task: str | Task,
        *,
        checkpoints: Sequence[Checkpoint] | None = None,
        device: str | torch.device | None = None,
        chunk_size: int | None = None,
        progress: bool = True,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {_check.describe(model)}")
        self.task = get_task(task)
        if chunk_size is not None:
            chunk_size = _check.integer("chunk_size", chunk_size, 1, 2**31)
        self.chunk_size = chunk_size
        self._model = model
        self._checkpoints = Checkpoints(model, checkpoints)
        self.device = choose_device(model, device)
        self._progress = progress
        self._train: list[Features] | None = None

    # --- what a method is -------------------------------------------------------------------------

    @abstractmethod
    def _features(self, weights: dict[str, Tensor], m: int, batch: Any) -> Iterator[Features]:
        """Yield the features of a batch under checkpoint m, in order, a chunk at a time."""

    @abstractmethod
    def _pair(self, m: int, train: Features, targets: Features) -> Tensor:
        """Return checkpoint m's term of the scores of training samples for targets: [n, t]."""

    def _self(self, m: int, train: Features) -> Tensor:
        """Return checkpoint m's term of training samples' scores for themselves: [n]."""
        raise NotImplementedError(
            f"self_influence: expected a method with a score of a sample for itself, got "
            f"{type(self).__name__}, which has none that tells samples apart"
        )

    # --- the interface ----------------------------------------------------------------------------

    def fit(self, train_loader: Iterable[Any]) -> None:
        """Compute the features of all training samples for every checkpoint.

        Raises:
            ValueError: a shuffling loader; samples with NaN or Inf (named).
        """
        loaders.check_loader("train_loader", train_loader, len(self._checkpoints))
        self._train = list(self._all_features("train_loader", train_loader, "fit"))

    @overload
    def attribute(self, test_loader: Iterable[Any], top_k: None = None) -> Tensor: ...

    @overload
    def attribute(
        self, test_loader: Iterable[Any], top_k: int, *, largest: bool = True
    ) -> TopK: ...

    def attribute(
        self, test_loader: Iterable[Any], top_k: int | None = None, *, largest: bool = True
    ) -> Tensor | TopK:
        """Return scores [n_train, n_targets] fp32, or the top_k training samples of each target.

        Args:
            test_loader: Targets, as the training loader's samples.
            top_k: If given, 0 to n_train; returns TopK(values, indices), [n_targets, top_k] each,
                equal values with the lower index first.
            largest: Whether top_k means the highest scores or, if False, the lowest.

        Raises:
            ValueError: before `fit`; targets with NaN or Inf (named).
        """
        loaders.check_loader("test_loader", test_loader, len(self._checkpoints))
        train = self._fitted()
        num_train = len(train[0].rows)
        if top_k is not None:
            top_k = _check.integer("top_k", top_k, 0, num_train)
        targets = list(self._all_features("test_loader", test_loader, "targets"))
        num_targets = len(targets[0].rows)
        if top_k is None:
            scores = torch.empty((num_train, num_targets), dtype=torch.float32)
            for start, block in self._score_blocks(train, targets):
                scores[start : start + len(block)] = block
            return scores
        best = TopK(
            torch.empty((num_targets, 0), dtype=torch.float32),
            torch.empty((num_targets, 0), dtype=torch.int64),
        )
        for start, block in self._score_blocks(train, targets):
            indices = torch.arange(start, start + len(block)).expand(num_targets, -1)
            best = merge_top_k(best, TopK(block.T, indices), top_k, largest)
        return best

    def self_influence(self) -> Tensor:
        """Return each training sample's score for itself, the diagonal of `attribute`: fp32 [n].

        Raises:
            NotImplementedError: a method whose samples all have the same score for themselves.
        """
        train = self._fitted()
        total = torch.zeros(len(train[0].rows))
        for m, features in enumerate(train):
            total += self._self(m, features)
        return total

    # --- parts ------------------------------------------------------------------------------------

    def _fitted(self) -> list[Features]:
        if self._train is None:
            raise ValueError("fit: expected a call of it before this one, got none")
        return self._train

    def _score_blocks(
        self, train: list[Features], targets: list[Features]
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield (start, scores [rows, t]) of training samples in order, a bounded block each."""
        num_train, num_targets = len(train[0].rows), len(targets[0].rows)
        step = max(1, _BLOCK_SCORES // max(num_targets, 1))
        for start in range(0, num_train, step):
            block = torch.zeros((min(step, num_train - start), num_targets))
            for m, (features, ends) in enumerate(zip(train, targets, strict=True)):
                part = Features(*(tensor[start : start + step] for tensor in features))
                block += self._pair(m, part, ends)
            yield start, block

    def _all_features(self, name: str, loader: Iterable[Any], label: str) -> Iterator[Features]:
        """Yield the features of all of a loader's samples for each checkpoint."""
        samples = loaders.num_samples(loader)
        total = None if samples is None else samples * len(self._checkpoints)
        first_digest: str | None = None
        with tqdm(total=total, desc=label, unit=" samples", disable=not self._progress) as bar:
            for m in range(len(self._checkpoints)):
                weights = self._checkpoints.load(m, self.device)
                digest = SampleDigest()
                parts: list[Features] = []
                for segment in loaders.segments(loader, self.device, 2**62):
                    digest.update(batch_tensors(segment.batch), segment.ids)
                    for part in self._features(weights, m, segment.batch):
                        parts.append(Features(part.rows.float().cpu(), part.weight.float().cpu()))
                    bar.update(segment.stop - segment.start)
                if first_digest is not None and digest.hexdigest() != first_digest:
                    raise ValueError(
                        f"{name}: expected the same samples in the same order for every "
                        "checkpoint, got other data (a loader that shuffles or augments?)"
                    )
                first_digest = digest.hexdigest()
                yield _joined(name, parts)


def _joined(name: str, parts: list[Features]) -> Features:
    """Return features side by side, all finite and of one length."""
    if not parts:
        return Features(torch.zeros((0, 0)), torch.zeros(0))
    lengths = sorted({part.rows.shape[1] for part in parts})
    if len(lengths) != 1:
        raise ValueError(
            f"{name}: expected samples with features of one length, got lengths {lengths}"
        )
    joined = Features(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
    bad = ~(joined.rows.isfinite().all(1) & joined.weight.isfinite())
    if bad.any():
        found = bad.nonzero()[:, 0].tolist()
        shown = ", ".join(map(str, found[:10])) + (", ..." if len(found) > 10 else "")
        raise ValueError(
            f"{name}: expected samples with finite outputs and features, got NaN or Inf for "
            f"{len(found)} of them: {shown}"
        )
    return joined
