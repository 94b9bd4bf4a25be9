"""TRAK end to end: from a model, its checkpoints and its data to scores (Park et al. 2023)."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

import torch
from torch import Tensor, nn
from tqdm import tqdm

from . import _C, _check, loaders, ops
from .checkpoints import Checkpoint, Checkpoints
from .gradients import GradientComputer, ParameterChoice, SampleGradients
from .kernel import KernelAccumulator, factor_kernel, leverages, solve_targets
from .projector import MAX_PROJ_DIM, MAX_SEED, project
from .shard_builder import ShardBuilder, changed_data, other_count, other_data
from .solved_targets import SolvedTargets, TopK, merge_top_k
from .store import Kernel, Shard, StoreError, open_store, shard_rows
from .tasks import Task, get_task


class Attributor:
    """Scores how much each training sample speaks for a model's output on each target.

    Args:
        model: Module whose parameters and buffers checkpoints replace; used in eval mode.
        task: "image_classification", "text_classification", "regression", or a
            `trak_ext.tasks.Task`.
        checkpoints: M state dicts or paths (safetensors, or what torch.save wrote of a state dict);
            None for the model as it is. Checkpoint m has model_id m.
        proj_dim: Features k a sample and checkpoint, at least 1.
        kind, seed, precision: As in `trak_ext.project`.
        damping: lambda / (tr(K)/k); see `trak_ext.score`.
        params: Which parameters are differentiated: None for those with requires_grad, a glob
            pattern or several, or a predicate (name, parameter).
        store: Folder for the features, to resume and to attribute later without the training data;
            None keeps them in memory.
        device: Where gradients are computed; None for the model's.
        chunk_size: Samples whose gradients are held at a time; None for up to 256, fewer where
            they would take more than 256 MiB.
        progress: Whether to show progress bars.

    Loaders yield (inputs, labels) or mappings, in the same order every time: a sample's position is
    its identity. Autocast is honoured: call `fit` and `attribute` under it.
    """

    def __init__(
        self,
        model: nn.Module,
        task: str | Task,
        *,
        checkpoints: Sequence[Checkpoint] | None = None,
        proj_dim: int = 2048,
        kind: str = "rademacher",
        seed: int = 0,
        damping: float = 1.0,
        params: ParameterChoice = None,
        store: str | os.PathLike[str] | None = None,
        device: str | torch.device | None = None,
        chunk_size: int | None = None,
        precision: str = "high",
        progress: bool = True,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {_check.describe(model)}")
        self.task = get_task(task)
        self.proj_dim = _check.integer("proj_dim", proj_dim, 1, MAX_PROJ_DIM)
        self.kind = _check.choice("kind", kind, ops.KINDS)
        self.seed = _check.integer("seed", seed, 0, MAX_SEED)
        self.damping = _check.nonnegative("damping", damping)
        self.precision = _check.choice("precision", precision, ops.PRECISIONS)
        if chunk_size is not None:
            chunk_size = _check.integer("chunk_size", chunk_size, 1, 2**31)
        self._gradients = GradientComputer(model, self.task, params, chunk_size)
        self._checkpoints = Checkpoints(model, checkpoints)
        self._model = model
        self._store = open_store(store)
        self._progress = progress
        self.device = _device_of(model) if device is None else _check_device(device)

    # --- fit --------------------------------------------------------------------------------------

    def fit(self, train_loader: Iterable[Any]) -> None:
        """Compute and store the features of all training samples for every checkpoint.

        What the store already holds is compared with the loader's data and kept; only the rest is
        computed.

        Raises:
            ValueError: a shuffling loader; samples whose gradient or output is not finite (named).
            StoreError: a store of another configuration, other weights or other data, or a damaged
                file in it (named).
        """
        loaders.check_loader("train_loader", train_loader, len(self._checkpoints))
        self._store.open(self._settings(), create=True)
        digests: list[str] | None = None
        with self._bar("fit", train_loader) as bar:
            for m in range(len(self._checkpoints)):
                digests = self._fit_checkpoint(m, train_loader, digests, bar)

    def _fit_checkpoint(
        self, m: int, loader: Iterable[Any], expected: list[str] | None, bar: tqdm
    ) -> list[str]:
        """Fit one checkpoint; return the digests of the shards' data, compared with `expected`."""
        weights = self._checkpoints.load(m, self.device)
        finished = self._store.read_kernel(m)
        kernel = KernelAccumulator(self.proj_dim)
        rows = shard_rows(self.proj_dim)
        digests: list[str] = []
        builder = ShardBuilder(0, self.proj_dim)
        count = 0

        def close_shard() -> None:
            index = len(digests)
            if expected is not None and builder.data_digest != expected[index]:
                raise changed_data("train_loader", builder.start, count)
            shard = builder.compare_with_stored(count)
            if finished is not None and builder.data_digest != finished.data_digests[index]:
                raise other_data(builder.start, count)
            if shard is None:
                shard = builder.finish("train_loader")
                self._store.write(m, builder.start, shard)
            digests.append(shard.data_digest)
            if finished is None:
                kernel.add(shard.features)

        for start, stop, batch in loaders.segments(loader, self.device, rows):
            if expected is not None and start // rows >= len(expected):
                raise changed_data("train_loader", start, stop)
            if finished is not None and stop > finished.num_samples:
                raise other_count(f"{stop} or more", finished.num_samples)
            if start % rows == 0:
                builder = ShardBuilder(start, self.proj_dim, self._store.read(m, start))
            builder.note_data(batch)
            if builder.stored is None:
                for part in self._gradients(weights, batch):
                    builder.append(part, self._project(part, m))
            count = stop
            bar.update(stop - start)
            if stop % rows == 0:
                close_shard()
        if count % rows:
            close_shard()
        if finished is not None and finished.num_samples != count:
            raise other_count(str(count), finished.num_samples)
        if self._store.read(m, -(-count // rows) * rows) is not None:
            raise other_count(str(count), "more")
        if expected is not None and len(digests) != len(expected):
            raise changed_data("train_loader", count, count)
        if finished is None:
            self._store.write_kernel(m, Kernel(kernel.matrix, count, digests))
        return digests

    # --- attribute --------------------------------------------------------------------------------

    @overload
    def attribute(self, test_loader: Iterable[Any], top_k: None = None) -> Tensor: ...

    @overload
    def attribute(
        self, test_loader: Iterable[Any], top_k: int, *, largest: bool = True
    ) -> TopK: ...

    def attribute(
        self, test_loader: Iterable[Any], top_k: int | None = None, *, largest: bool = True
    ) -> Tensor | TopK:
        """Return scores [n_train, n_targets] fp32, or the top_k proponents of each target.

        Args:
            test_loader: Targets, as the training loader's samples.
            top_k: If given, 0 to n_train; returns TopK(values, indices), [n_targets, top_k] each,
                and n_train x n_targets is never held.
            largest: Whether top_k means proponents or, if False, opponents (lowest score first).

        Raises:
            ValueError: before `fit`; non-finite targets (named); a kernel matrix that is not
                positive definite (names damping).
        """
        loaders.check_loader("test_loader", test_loader, len(self._checkpoints))
        num_train = self._open_fitted()
        if top_k is not None:
            top_k = _check.integer("top_k", top_k, 0, num_train)
        solved = self._solve_targets(test_loader, num_train)
        num_targets = solved.shape[1]
        targets = SolvedTargets(solved, torch.float32)
        if top_k is None:
            scores = torch.empty((num_train, num_targets), dtype=torch.float32)
            for start, features, weight in self._shards(num_train):
                scores[start : start + len(weight)] = targets.score(features, weight)
            return scores
        best = TopK(
            torch.empty((num_targets, 0), dtype=torch.float32),
            torch.empty((num_targets, 0), dtype=torch.int64),
        )
        for start, features, weight in self._shards(num_train):
            found = targets.top_k(features, weight, min(top_k, len(weight)), largest)
            best = merge_top_k(best, TopK(found.values, found.indices + start), top_k, largest)
        return best

    def self_influence(self) -> Tensor:
        """Return each training sample's score for itself: fp32 [n_train].

        (1/M sum_m phi_mi^T K_m^-1 phi_mi) (1/M sum_m Q_mi): the diagonal of `attribute` on the
        training set.
        """
        num_train = self._open_fitted()
        total = torch.zeros(num_train, dtype=torch.float64)
        if num_train == 0:
            return total.float()
        for m in range(len(self._checkpoints)):
            factor = self._factor(m)
            for start, features, _ in self._shards(num_train, [m]):
                part = leverages(factor, features[0], None)
                total[start : start + len(part)] += part / len(self._checkpoints)
        weight = torch.cat([weight for _, _, weight in self._shards(num_train)])
        return (total * weight).float()

    # --- parts ------------------------------------------------------------------------------------

    def _settings(self) -> dict[str, Any]:
        """Return what a store's features depend on, as JSON."""
        model = self._model
        device_type = self.device.type
        autocast = (
            str(torch.get_autocast_dtype(device_type))
            if torch.is_autocast_enabled(device_type)
            else None
        )
        return {
            "law_version": _C.law_version(),
            "kind": self.kind,
            "seed": self.seed,
            "proj_dim": self.proj_dim,
            "precision": self.precision,
            "task": self.task.name,
            "model": f"{type(model).__module__}.{type(model).__qualname__}",
            "architecture": _architecture_digest(model),
            "params": [[name, list(shape)] for name, shape in self._gradients.shapes.items()],
            "checkpoints": self._checkpoints.digests,
            "autocast": autocast,
        }

    def _open_fitted(self) -> int:
        """Return the number of training samples of a store that is fitted for every checkpoint."""
        self._store.open(self._settings(), create=False)
        counts = []
        for m in range(len(self._checkpoints)):
            kernel = self._store.read_kernel(m)
            if kernel is None:
                raise StoreError(
                    f"store: expected features of all {len(self._checkpoints)} checkpoints, got "
                    f"none or a part for checkpoint {m} (call fit first)"
                )
            counts.append(kernel.num_samples)
        if len(set(counts)) != 1:
            raise StoreError(f"store: expected one number of samples, got {counts} by checkpoint")
        return counts[0]

    def _solve_targets(self, test_loader: Iterable[Any], num_train: int) -> Tensor:
        """Return K_m^-1 phi_m(z) / M of every checkpoint and target: fp64 [M, t, k]."""
        solved: list[Tensor] = []
        digest: str | None = None
        with self._bar("targets", test_loader) as bar:
            for m in range(len(self._checkpoints)):
                targets = self._target_features(m, test_loader, bar)
                if digest is not None and targets.data_digest != digest:
                    raise changed_data("test_loader", 0, targets.features.shape[0])
                features, digest = targets.features, targets.data_digest
                if num_train:  # without samples there is no kernel matrix, nor a score to make
                    features = solve_targets(self._factor(m), features)
                solved.append(features.double() / len(self._checkpoints))
        return torch.stack(solved)

    def _factor(self, m: int) -> Tensor:
        kernel = self._store.read_kernel(m)
        assert kernel is not None, "_open_fitted() comes first"
        return factor_kernel(kernel.matrix, self.damping, 0.0)

    def _shards(
        self, num_train: int, checkpoints: Sequence[int] | None = None
    ) -> Iterator[tuple[int, list[Tensor], Tensor]]:
        """Yield (start, features of each checkpoint [rows, k], mean Q [rows]) in order."""
        rows = shard_rows(self.proj_dim)
        for start in range(0, num_train, rows):
            stop = min(start + rows, num_train)
            features, weight = [], torch.zeros(stop - start, dtype=torch.float64)
            chosen = range(len(self._checkpoints)) if checkpoints is None else checkpoints
            for m in chosen:
                shard = self._store.read(m, start, stop)
                if shard is None:
                    raise StoreError(
                        f"store: expected samples {start} to {stop - 1} of checkpoint {m}, got none"
                    )
                features.append(shard.features)
                weight += shard.weight.double() / len(chosen)
            yield start, features, weight

    def _bar(self, label: str, loader: Iterable[Any]) -> tqdm:
        """Return a progress bar over all samples of all checkpoints."""
        samples = loaders.num_samples(loader)
        total = None if samples is None else samples * len(self._checkpoints)
        return tqdm(total=total, desc=label, unit=" samples", disable=not self._progress)

    def _project(self, part: SampleGradients, m: int) -> Tensor:
        return project(
            {name: grad.detach() for name, grad in part.grads.items()},
            self.proj_dim,
            kind=self.kind,
            seed=self.seed,
            model_id=m,
            precision=self.precision,
        )

    def _target_features(self, m: int, loader: Iterable[Any], bar: tqdm) -> Shard:
        """Return the targets' features for a checkpoint, as one shard of all of them."""
        weights = self._checkpoints.load(m, self.device)
        targets = ShardBuilder(0, self.proj_dim)
        for start, stop, batch in loaders.segments(loader, self.device, 2**62):
            targets.note_data(batch)
            for part in self._gradients(weights, batch):
                targets.append(part, self._project(part, m))
            bar.update(stop - start)
        return targets.finish("test_loader")


def _architecture_digest(model: nn.Module) -> str:
    """Return a digest of how a model prints, less the addresses that functions print with."""
    text = re.sub(r"0x[0-9a-fA-F]+", "", repr(model))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _check_device(device: Any) -> torch.device:
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, TypeError, AssertionError, ValueError) as error:
        reason = ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])
        raise ValueError(
            f"device: expected a torch device of this machine, got {device!r} ({reason})"
        ) from error
    return found


def _device_of(model: nn.Module) -> torch.device:
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device
