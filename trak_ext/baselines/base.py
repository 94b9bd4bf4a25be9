"""The interface that baselines share with `Attributor`: fit, attribute, and what they keep."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor, nn

from .. import _check
from ..attribution.features import changed_data, not_finite, on_device, prepare_context
from ..attribution.progress import Progress
from ..gradients import GradientComputer, ParameterChoice
from ..inputs import batches, loaders
from ..inputs.batches import SampleDigest
from ..inputs.checkpoints import Checkpoint, Checkpoints, choose_device
from ..kernels.projection import MAX_SEED, projection_matrix
from ..kernels.score_pass import RunningTopK, TopK
from ..store import SampleId
from ..tasks import Task, get_task

State = Mapping[str, Tensor]

_BLOCK_SCORES = 2**22  # scores that are made at a time: 16 MiB
_FP32_WHOLE = 2**24  # whole numbers up to here are exact in fp32
_FINER = 2.0**-8  # entries are rounded to bf16; a second, smaller one keeps ties rare


class Features(NamedTuple):
    """Features of samples under one checkpoint."""

    rows: Tensor  # fp32 [n, d]
    weight: Tensor  # fp32 [n], Q = -d loss / df


class Samples(NamedTuple):
    """All samples of a loader."""

    features: list[Features]  # of each checkpoint
    ids: list[SampleId] | None


class Baseline(ABC):
    """Scores pair by pair: the sum over checkpoints of a function of two samples' features.

    A subclass says what a sample's features are and how two of them meet. What a task prepares
    from the training set is prepared by `fit`, in a pass of its own for each checkpoint.

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
        _check.instance("model", model, nn.Module, "a torch.nn.Module")
        self.task = get_task(task)
        if chunk_size is not None:
            chunk_size = _check.integer("chunk_size", chunk_size, 1, 2**31)
        self.chunk_size = chunk_size
        self._model = model
        self._checkpoints = Checkpoints(model, checkpoints)
        self.device = choose_device(model, device)
        self._progress = progress
        self._contexts: list[State] = []  # what the task prepared, by checkpoint
        self._train: Samples | None = None

    # --- what a method is -------------------------------------------------------------------------

    _runs_task = True  # False for a method that needs nothing of what the task prepares

    @abstractmethod
    def _features(
        self, weights: State, m: int, batch: Any, context: State, index: Tensor
    ) -> Iterator[Features]:
        """Yield the features of a batch under checkpoint m, in order, a sample chunk at a time.

        Args:
            context: What the task prepared for the checkpoint; empty where it prepares nothing.
            index: int64 [B], the samples' positions in the training set, -1 for targets.
        """

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
        passes = len(self._checkpoints) * (2 if self._prepares() else 1)
        loaders.check_loader("train_loader", train_loader, passes)
        self._train = None
        self._train = self._samples("train_loader", train_loader, "fit", training=True)

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
                equal values with the lower index first. It carries the loaders' sample ids.
            largest: Whether top_k means the highest scores or, if False, the lowest.

        Raises:
            ValueError: before `fit`; targets with NaN or Inf (named).
        """
        loaders.check_loader("test_loader", test_loader, len(self._checkpoints))
        largest = _check.flag("largest", largest)
        train, ids = self._fitted()
        num_train = len(train[0].rows)
        if top_k is not None:
            top_k = _check.integer("top_k", top_k, 0, num_train)
        targets, target_ids = self._samples("test_loader", test_loader, "targets", training=False)
        size = (num_train, len(targets[0].rows))
        if top_k is None:
            scores = torch.empty(size, dtype=torch.float32, device="cpu")
            for start, block in self._score_blocks(train, targets):
                scores[start : start + len(block)] = block
            return scores
        running = RunningTopK(size[1], top_k, largest, torch.float32, torch.device("cpu"))
        for start, block in self._score_blocks(train, targets):
            running.add_scores(block, start)
        best = running.best
        if ids is not None:
            best.ids = [[ids[i] for i in row] for row in best.indices.tolist()]
        best.target_ids = target_ids
        return best

    def self_influence(self) -> Tensor:
        """Return each training sample's score for itself, the diagonal of `attribute`: fp32 [n].

        Raises:
            NotImplementedError: a method whose samples all have the same score for themselves.
        """
        train = self._fitted().features
        total = torch.zeros(len(train[0].rows), dtype=torch.float32, device="cpu")
        for m, features in enumerate(train):
            total += self._self(m, features)
        return total

    # --- steps ------------------------------------------------------------------------------------

    def _prepares(self) -> bool:
        return self._runs_task and self.task.prepare is not None

    def _fitted(self) -> Samples:
        if self._train is None:
            raise ValueError("fit: expected a call of it before this one, got none")
        return self._train

    def _score_blocks(
        self, train: list[Features], targets: list[Features]
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield (start, scores [rows, t]) of training samples in order, a bounded block each."""
        num_targets = len(targets[0].rows)
        step = max(1, _BLOCK_SCORES // max(num_targets, 1))
        for start in range(0, len(train[0].rows), step):
            parts = [Features(*(x[start : start + step] for x in features)) for features in train]
            size = (len(parts[0].rows), num_targets)
            block = torch.zeros(size, dtype=torch.float32, device="cpu")
            for m, part in enumerate(parts if num_targets else ()):  # else they have no length
                block += self._pair(m, part, targets[m])
            yield start, block

    def _samples(self, name: str, loader: Iterable[Any], label: str, *, training: bool) -> Samples:
        """Return the features of all of a loader's samples for each checkpoint, and their ids."""
        count, checkpoints = loaders.num_samples(loader), len(self._checkpoints)
        features: list[Features] = []
        ids: list[SampleId] = []
        passes = _Passes(name)
        if training:
            self._contexts = []
        with Progress(label, checkpoints, count, self._progress) as bar:
            for m in range(checkpoints):
                bar.begin(m)
                weights = self._checkpoints.load(m, self.device)
                if training:
                    self._contexts.append(self._prepared(m, weights, loader, passes))
                context = on_device(self._contexts[m], self.device)
                digest, stop = SampleDigest(), 0
                parts: list[Features] = []
                segments = batches.segments(loader, self.device, 2**62, self.task.ids_as)
                for start, stop, batch, own in segments:
                    digest.add(batch, own)
                    if m == 0:
                        ids.extend(own or [])
                    index = torch.arange(start, stop, device=self.device)
                    if not training:
                        index.fill_(-1)
                    for part in self._features(weights, m, batch, context, index):
                        parts.append(Features(*(x.float().cpu() for x in part)))
                        bar.advance(len(parts[-1].rows))
                if training:
                    loaders.refuse_none(name, stop)
                passes.compare(digest.hexdigest(), stop)
                features.append(_joined(name, parts))
        return Samples(features, ids or None)

    def _prepared(self, m: int, weights: State, loader: Iterable[Any], passes: _Passes) -> State:
        """Return what the task prepares for checkpoint m."""
        if not self._prepares():
            return {}
        computer = GradientComputer(self._model, self.task, "*")
        context, count = prepare_context(computer, weights, loader, self.device, m)
        passes.compare(context.data_digest, count)
        return context.tensors


class _Passes:
    """Refuses a loader whose passes bring different data."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._first: str | None = None

    def compare(self, digest: str, count: int) -> None:
        """Take the digest of a pass over `count` samples."""
        if self._first not in (None, digest):
            raise changed_data(self._name, 0, count)
        self._first = digest


def _joined(name: str, parts: list[Features]) -> Features:
    """Return features side by side, all finite and of one length."""
    if not parts:
        nothing = torch.zeros((0, 0), dtype=torch.float32, device="cpu")
        return Features(nothing, nothing.reshape(0))
    lengths = sorted({part.rows.shape[1] for part in parts})
    if len(lengths) != 1:
        raise ValueError(
            f"{name}: expected samples with features of one length, got lengths {lengths}"
        )
    joined = Features(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
    bad = ~(joined.rows.isfinite().all(1) & joined.weight.isfinite())
    if bad.any():
        raise not_finite(name, bad.nonzero()[:, 0].tolist(), "features")
    return joined


class Random(Baseline):
    """Independent normal scores: a function of the seed and both samples' positions alone.

    What any attribution must beat.

    Args:
        seed: Of the scores, 0 to 2**64 - 1.
        params: As in other methods, and all their other arguments: taken, so that it can stand in
            another's place; the model is never run.
    """

    _runs_task = False

    def __init__(
        self,
        model: nn.Module,
        task: str | Task,
        *,
        seed: int = 0,
        params: ParameterChoice = None,
        **arguments: Any,
    ) -> None:
        super().__init__(model, task, **arguments)
        self.seed = _check.integer("seed", seed, 0, MAX_SEED)

    def _features(
        self, weights: State, m: int, batch: Any, context: State, index: Tensor
    ) -> Iterator[Features]:
        # A sample's only feature is its position, in two numbers that fp32 holds exactly.
        rows = torch.stack([index // _FP32_WHOLE, index % _FP32_WHOLE], 1)
        yield Features(rows, torch.ones_like(index))

    def _pair(self, m: int, train: Features, targets: Features) -> Tensor:
        size = (len(train.rows), len(targets.rows))
        if m > 0 or size[0] == 0:
            return torch.zeros(size, dtype=torch.float32, device="cpu")
        high, low = (int(x) for x in train.rows[0])
        coarse, fine = (
            projection_matrix(
                *size,
                kind="normal",
                seed=self.seed,
                model_id=model_id,
                param_offset=high * _FP32_WHOLE + low,
            )
            for model_id in (0, 1)
        )
        return coarse + _FINER * fine
