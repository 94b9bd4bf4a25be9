"""TRAK end to end: from a model, its checkpoints and its data to scores (Park et al. 2023)."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor, nn

from .. import _C, _check
from ..estimator.formula import Estimator, FactorCache, Scorer
from ..gradients import GradientComputer, ParameterChoice
from ..gradients.memory import free_bytes
from ..inputs import batches, loaders
from ..inputs.batches import SampleId
from ..inputs.checkpoints import Checkpoint, Checkpoints, choose_device, state_digest
from ..kernels.score_pass import TopK
from ..store import Shard, StoredFeatures, open_store
from ..store.base import probe_name, settings_digest
from ..tasks import Task, get_task
from . import probe as probes
from .features import FeatureMaker, ShardBuilder, changed_data, on_device, require_context
from .fitting import Fitter
from .progress import Progress

USUAL_KIND = "sjlt"


class Attributor:
    """Scores how much each training sample speaks for a model's output on each target.

    Args:
        model: Module whose parameters and buffers checkpoints replace; used in eval mode.
        task: A name of `trak_ext.tasks.TASKS`, such as "image_classification" or "causal_lm", or a
            `trak_ext.tasks.Task`.
        checkpoints: M state dicts or paths (safetensors, or what torch.save wrote of a state dict);
            None for the model as it is. Checkpoint m has model_id m.
        proj_dim: Features k per sample, checkpoint and projection block, at least 1.
        kind: As in `trak_ext.project`; None for that of the store, where there is one, and else for
            "sjlt", whose scores predict retraining as well as those of "rademacher" do
            (`bench/accuracy_kinds.py`), at about the cost of reading the gradients.
        nnz: As in `trak_ext.project`, of each projection block; None for the store's, and else 1.
        seed, precision: As in `trak_ext.project`.
        damping: lambda / (tr(K)/k), or "auto" for what `choose_damping` says of each checkpoint's
            kernel and fit.
        ridge, leverage: As in `trak_ext.score`.
        curvature: What a kernel matrix weights samples by: "mean" for R averaged over the
            checkpoints, "own" for each checkpoint's R, None for 1 (Park et al. 2023). A store
            serves any damping, ridge, leverage and curvature; `fit` keeps the kernel matrices of
            its curvature, those of another are made from the features at each call.
        blocks: Independent projections of proj_dim features per checkpoint, whose scores are
            averaged; block b takes columns b proj_dim to (b + 1) proj_dim - 1 of the matrix.
        params: Which parameters are differentiated: None for those with requires_grad, a glob
            pattern or several, or a predicate (name, parameter).
        store: Folder for the features, to resume and to attribute later without the training data;
            None keeps them in memory.
        device: Where gradients, features and scores are computed; None for the model's. Features
            are kept in memory of the CPU, or in the store, and come to a CUDA device a block at a
            time for scoring.
        chunk_size: Samples whose gradients are computed at a time; None for up to 256, as many as
            half of the free memory takes, and 256 MiB on the CPU. Halved, with a warning, where
            memory runs out.
        progress: Whether to show progress bars, on a terminal or in a notebook.
        probe: Whether a store keeps the first samples of the training set, and whether they are
            computed again wherever a checkpoint's weights are loaded anyway, which costs a sample
            chunk: features that differ show that model or task compute something else than when
            they were fitted (`trak_ext.attribution.probe.TOLERANCES`).

    Loaders yield (inputs, labels) or mappings, in the same order every time: a sample's position is
    its identity. A mapping may carry ids under "sample_id", integers or strings, which results then
    carry too. Autocast is honoured: call `fit` and `attribute` under it.

    Memory of `fit`, beside the model and one checkpoint's weights: chunk_size times
    `GradientComputer.sample_bytes`, a batch, a shard of features (16 MiB with its copy) and up to
    24 blocks proj_dim^2 bytes of kernel matrices; without a store, all features too. `attribute`
    reads a shard (8 MiB) of every checkpoint at a time and holds 16 M blocks proj_dim bytes per
    target.

    One run at a time fits a store; another is refused. Runs that are given one token in the
    environment variable TRAK_EXT_STORE_TOKEN share a store. Any number may read one.

    A store made with fewer checkpoints is continued by `fit`, and one made with more is read as far
    as needed; the ones in common must be the same, in the same order.
    """

    def __init__(
        self,
        model: nn.Module,
        task: str | Task,
        *,
        checkpoints: Sequence[Checkpoint] | None = None,
        proj_dim: int = 2048,
        kind: str | None = None,
        seed: int = 0,
        damping: float | str = "auto",
        ridge: float = 0.0,
        curvature: str | None = "mean",
        leverage: bool = False,
        blocks: int = 1,
        params: ParameterChoice = None,
        store: str | os.PathLike[str] | None = None,
        device: str | torch.device | None = None,
        chunk_size: int | None = None,
        precision: str = "high",
        nnz: int | None = None,
        progress: bool = True,
        probe: bool = True,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {_check.describe(model)}")
        self.task = get_task(task)
        self.estimator = Estimator(damping, ridge, curvature, leverage)
        if chunk_size is not None:
            chunk_size = _check.integer("chunk_size", chunk_size, 1, 2**31)
        gradients = GradientComputer(model, self.task, params, chunk_size, tables_by_row=True)
        self._store = open_store(store)
        made = self._store.recorded() if kind is None or nnz is None else {}
        if kind is None:
            kind = made.get("kind", USUAL_KIND)
        if nnz is None:
            nnz = made.get("nnz", 1) if kind == "sjlt" else 1
        self._features = FeatureMaker(gradients, proj_dim, blocks, kind, seed, precision, nnz)
        self._checkpoints = Checkpoints(model, checkpoints)
        self._model = model
        self._chunk_size = chunk_size
        self._progress = _check.flag("progress", progress)
        self._probe = _check.flag("probe", probe)
        self.device = choose_device(model, device)
        free = free_bytes(torch.device("cpu"))
        self._factors = FactorCache(2**30 if free is None else free // 4)
        # The data it was chosen on, and the damping of each checkpoint's projection blocks.
        self._damping: tuple[list[list[str]], list[list[float]]] | None = None

    def __repr__(self) -> str:
        features = self._features
        blocks = f", {features.blocks} projection blocks" if features.blocks > 1 else ""
        nnz = f", nnz {features.nnz}" if features.kind == "sjlt" else ""
        return (
            f"Attributor({type(self._model).__name__}, task {self.task.name!r}, "
            f"{len(self._checkpoints)} checkpoints, {features.gradients.num_params} parameters -> "
            f"proj_dim {features.proj_dim}{blocks}, {features.kind}{nnz}, seed {features.seed}, "
            f"{self._store}, on {self.device})"
        )

    # --- fit --------------------------------------------------------------------------------------

    def fit(
        self,
        train_loader: Iterable[Any],
        *,
        addition: int = 0,
        part: int | None = None,
        probe: bool | None = None,
    ) -> None:
        """Compute and store the features of all training samples for every checkpoint.

        What the store already holds is compared with the loader's data and kept; only the rest is
        computed. In memory `addition=0` begins anew, and forgets all additions. While an addition
        is not finished for every checkpoint, nothing is attributed.

        Args:
            train_loader: The training samples, or those of an addition.
            addition: 0 for the training set; 1, 2, ... for samples that are added to it later,
                whose positions follow those of the ones before.
            part: The name of `addition` in 0.1.0.
            probe: Whether to keep and look at the first samples in this call; None for the
                Attributor's.

        Raises:
            ValueError: a shuffling loader; samples whose gradient or output has NaN or Inf (named).
            StoreError: a store of another configuration, other weights or other data, one that
                another run is fitting, a damaged file in it (named), or a probe that comes out
                otherwise.
            KeyboardInterrupt: Ctrl-C; says how many samples the store has kept.
        """
        loaders.check_loader("train_loader", train_loader, self._passes())
        if part is not None and addition not in (0, part):
            raise ValueError(f"part: expected addition or part, got both: {addition} and {part}")
        addition = _check.integer("addition", addition if part is None else part, 0, 9999)
        probe = self._probe if probe is None else _check.flag("probe", probe)
        self._factors.clear()
        with self._store.owned():
            versions = _versions(self._model)
            self._store.open(
                self._feature_settings(), create=True, addition=addition, versions=versions
            )
            offset = self._fitted(addition).num_samples if addition else 0
            self._features.gradients.agree_on_chunks(self.device, self._store.agree)
            fitter = Fitter(self._store, self._features, self.device, addition, offset, probe)
            try:
                with self._bar("fit", train_loader) as bar:
                    for m in range(len(self._checkpoints)):
                        bar.begin(m)
                        fitter.fit(m, self._checkpoints.load(m, self.device), train_loader, bar)
                fitted = self._fitted(addition + 1)
                fitted.write_kernels(addition)
            except KeyboardInterrupt:
                raise KeyboardInterrupt(self._what_was_kept(*fitter.kept)) from None
        self._choose_damping(fitted)

    def _what_was_kept(self, m: int, samples: int) -> str:
        if not self._store.durable:
            return "fit: stopped; nothing is kept in memory (give a store to go on later)"
        of = f" of checkpoint {m + 1} of {len(self._checkpoints)}"
        return (
            f"fit: stopped; kept {samples} samples{of if len(self._checkpoints) > 1 else ''} and "
            f"all before them, {self._store} (call fit again to go on)"
        )

    @property
    def damping_(self) -> Tensor:
        """The damping in use after `fit`, lambda / (tr(K)/k): fp64 [M], [M, blocks] with several.

        What "auto" chose for each checkpoint, or the number that was given.
        """
        fitted = self._open_fitted()
        chosen = torch.tensor(self._choose_damping(fitted), dtype=torch.float64, device="cpu")
        return chosen[:, 0] if fitted.blocks == 1 and fitted.num_samples else chosen

    def _choose_damping(self, fitted: StoredFeatures) -> list[list[float]]:
        """Return the damping of each checkpoint's projection blocks; none without samples."""
        if self._damping is None or self._damping[0] != fitted.data_digests:
            scorer = Scorer(fitted, self.estimator, self.device)
            checkpoints = range(fitted.num_checkpoints if fitted.num_samples else 0)
            self._damping = (fitted.data_digests, [scorer.damping(m) for m in checkpoints])
        return self._damping[1]

    # --- attribute --------------------------------------------------------------------------------

    @overload
    def attribute(
        self,
        test_loader: Iterable[Any],
        top_k: None = None,
        *,
        target_task: str | Task | None = ...,
    ) -> Tensor: ...

    @overload
    def attribute(
        self,
        test_loader: Iterable[Any],
        top_k: int,
        *,
        largest: bool = True,
        target_task: str | Task | None = ...,
    ) -> TopK: ...

    def attribute(
        self,
        test_loader: Iterable[Any],
        top_k: int | None = None,
        *,
        largest: bool = True,
        target_task: str | Task | None = None,
    ) -> Tensor | TopK:
        """Return scores [n_train, n_targets] fp32, or the top_k proponents of each target.

        Args:
            test_loader: Targets, as the training loader's samples.
            top_k: If given, 0 to n_train; returns TopK(values, indices), [n_targets, top_k] each,
                and n_train x n_targets is never held.
            largest: Whether top_k means proponents or, if False, opponents (lowest score first).
            target_task: What is attributed, if it is not the output that was fitted: any scalar of
                a sample, such as one token's output ("causal_lm_token").

        Raises:
            ValueError: before `fit`; targets with NaN or Inf (named); a kernel matrix that is not
                positive definite (names damping).
            StoreError: a damaged file (named); an addition that was begun and is not finished; a
                model or task that gives something else for the probe than when it was fitted.
        """
        loaders.check_loader("test_loader", test_loader, len(self._checkpoints))
        largest = _check.flag("largest", largest)
        fitted = self._open_fitted()
        if top_k is not None:
            top_k = _check.integer("top_k", top_k, 0, fitted.num_samples)
        scorer, target_ids = self._solve_targets(test_loader, fitted, target_task)
        if top_k is None:
            return scorer.score(torch.device("cpu"))
        best = scorer.top_k(top_k, largest, torch.device("cpu"))
        best.target_ids = target_ids
        return best

    def self_influence(self) -> Tensor:
        """Return each training sample's score for itself: fp32 [n_train].

        (1/M sum_m c_mi phi_mi^T K_m^-1 phi_mi) (1/M sum_m Q_mi): the diagonal of `attribute` on the
        training set.
        """
        return self._scorer(self._open_fitted()).self_influence()

    # --- provenance -------------------------------------------------------------------------------

    @property
    def settings(self) -> dict[str, Any]:
        """What the scores depend on but the data, as JSON."""
        return {**self._feature_settings(), **self.estimator.settings()}

    @property
    def fingerprint(self) -> str:
        """A digest of `settings` and of the training data, after `fit`."""
        fitted = self._open_fitted()
        return settings_digest({**self.settings, "data": fitted.data_digests})

    def sample_ids(self) -> list[SampleId] | None:
        """Return the ids of all training samples in order; None where the loaders give none."""
        return self._open_fitted().sample_ids()

    # --- steps ------------------------------------------------------------------------------------

    def _feature_settings(self) -> dict[str, Any]:
        """Return what a store's features depend on, as JSON."""
        model, features = self._model, self._features
        device_type = self.device.type
        autocast = (
            str(torch.get_autocast_dtype(device_type))
            if torch.is_autocast_enabled(device_type)
            else None
        )
        return {
            "law_version": _C.law_version(),
            "kind": features.kind,
            "seed": features.seed,
            "proj_dim": features.proj_dim,
            "blocks": features.blocks,
            "precision": features.precision,
            # Not said of other kinds, so that stores from before it was known still match.
            **({"nnz": features.nnz} if features.kind == "sjlt" else {}),
            "task": self.task.name,
            "model": f"{type(model).__module__}.{type(model).__qualname__}",
            "architecture": _architecture_digest(model),
            "params": [[name, list(shape)] for name, shape in features.gradients.shapes.items()],
            "checkpoints": self._checkpoints.digests,
            "autocast": autocast,
        }

    def _passes(self) -> int:
        """Return how often `fit` goes over its loader."""
        return len(self._checkpoints) * (1 if self.task.prepare is None else 2)

    def _fitted(self, additions: int | None = None) -> StoredFeatures:
        return StoredFeatures(
            self._store,
            len(self._checkpoints),
            self._features.proj_dim,
            self._features.blocks,
            self.estimator.curvature,
            additions,
        )

    def _open_fitted(self) -> StoredFeatures:
        """Return a store's features, which are fitted for every checkpoint."""
        versions = _versions(self._model)
        self._store.open(self._feature_settings(), create=False, versions=versions)
        return self._fitted()

    def _scorer(self, fitted: StoredFeatures) -> Scorer:
        """Return what scores fitted features: where features are kept, or on a CUDA device."""
        device = self.device if self.device.type == "cuda" else torch.device("cpu")
        known = self._damping is not None and self._damping[0] == fitted.data_digests
        damping = self._damping[1] if known and self._damping is not None else None
        return Scorer(fitted, self.estimator, device, damping=damping, cache=self._factors)

    def _solve_targets(
        self,
        test_loader: Iterable[Any],
        fitted: StoredFeatures,
        target_task: str | Task | None,
    ) -> tuple[Scorer, list[SampleId] | None]:
        """Return the scorer with all targets solved for, and the targets' ids."""
        features = self._target_features(target_task)
        scorer = self._scorer(fitted)
        digest: str | None = None
        ids: list[SampleId] | None = None
        with self._bar("targets", test_loader) as bar:
            for m in range(len(self._checkpoints)):
                bar.begin(m)
                targets = self._features_of_targets(m, test_loader, features, bar, fitted)
                if digest is not None and targets.data_digest != digest:
                    raise changed_data("test_loader", 0, targets.features.shape[0])
                digest, ids = targets.data_digest, targets.ids
                scorer.solve(targets.features.split(features.proj_dim, 1))
        return scorer, ids

    def _target_features(self, target_task: str | Task | None) -> FeatureMaker:
        """Return what makes the features of targets."""
        if target_task is None:
            return self._features
        task = get_task(target_task)
        if task.prepare is not None and task != self.task:
            raise ValueError(
                f"target_task: expected the fitted task or one that prepares nothing from the "
                f"training data, got {task.name!r}"
            )
        names = set(self._features.gradients.names)  # whatever requires_grad says by now
        computer = GradientComputer(
            self._model, task, lambda name, _: name in names, self._chunk_size, tables_by_row=True
        )
        return self._features.of_task(computer)

    def _features_of_targets(
        self,
        m: int,
        loader: Iterable[Any],
        features: FeatureMaker,
        bar: Progress,
        fitted: StoredFeatures,
    ) -> Shard:
        """Return the targets' features for a checkpoint, as one shard of all of them."""
        weights = self._checkpoints.load(m, self.device)
        prepared = self._check_probe(m, weights, fitted)
        context = prepared if features.gradients.task.prepare is not None else None
        targets = ShardBuilder(0, features.width)
        ids_as = features.gradients.task.ids_as
        with features.gradients.reusing_memory():
            for segment in batches.segments(loader, self.device, 2**62, ids_as):
                targets.note_data(segment.batch, segment.ids)
                with closing(features(weights, segment, m, context)) as chunks:
                    for output, made in chunks:
                        targets.append(output, made)
                        bar.advance(len(made))
        return targets.finish("test_loader")

    def _check_probe(
        self, m: int, weights: Mapping[str, Tensor], fitted: StoredFeatures
    ) -> dict[str, Tensor] | None:
        """Compute the probe of checkpoint m again; return what the task prepared for it."""
        store, context = self._store, None
        summaries = fitted.summaries(m)
        if self.task.prepare is not None:
            where = store.where(m, "context")
            stored = require_context(store.read_context(m, summaries[0].context), m, where)
            context = on_device(stored.tensors, self.device)
        addition = next((a for a, s in enumerate(summaries) if s.probe is not None), None)
        if self._probe and addition is not None:
            found = store.read_probe(m, addition, summaries[addition].probe)
            name = probe_name(addition)
            if found is None:
                raise store.missing(m, name)
            where = store.where(m, name)
            probes.check(found, self._features, weights, m, context, self.device, where)
        return context

    def _bar(self, label: str, loader: Iterable[Any]) -> Progress:
        """Return a progress bar over all samples of all checkpoints."""
        samples = loaders.num_samples(loader)
        return Progress(label, len(self._checkpoints), samples, self._progress)


def _versions(model: nn.Module) -> dict[str, str]:
    """Return the versions of what computes features, the model's own packages included."""
    from .. import __version__

    versions = {
        "python": ".".join(platform.python_version_tuple()[:2]),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "trak_ext": __version__,
    }
    for package in {type(module).__module__.partition(".")[0] for module in model.modules()}:
        version = getattr(sys.modules.get(package), "__version__", None)
        if isinstance(version, str):
            versions[package] = version
    return versions


def _architecture_digest(model: nn.Module) -> str:
    """Return a digest of what a model is beside its state dict, as far as it can be seen.

    How it prints, less the addresses that functions print with; how many heads modules have; and
    buffers that are not in the state dict. Other plain attributes are not seen (nor a Hugging Face
    config, which calls of the model may change).
    """
    text = [re.sub(r"0x[0-9a-fA-F]+", "", repr(model))]
    for name, module in model.named_modules():
        heads = {key: n for key, n in vars(module).items() if "head" in key and type(n) is int}
        text.append(f"{name}{sorted(heads.items())}")
    kept = model.state_dict()
    hidden = {name: buffer for name, buffer in model.named_buffers() if name not in kept}
    text.append(state_digest(hidden))
    return hashlib.blake2b("\n".join(text).encode(), digest_size=16).hexdigest()
