"""Per-sample gradients of a task's output by `torch.func`, for the chosen parameters only."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import grad, vmap

from .functional import FunctionalModel, eval_mode, plain_attention
from .tasks import Task

ParameterChoice = Sequence[str] | str | Callable[[str, nn.Parameter], bool] | None

_CHUNK_BYTES = 2**28  # of gradients that a chunk of the default size may take
_MAX_CHUNK = 256

_RANDOM_MODEL = "model: expected an output that is not random in eval mode, got a random operation"


class SampleGradients(NamedTuple):
    """Gradients of f for B samples, with f, Q and R."""

    grads: dict[str, Tensor]  # [B, *parameter shape], in named_parameters() order
    output: Tensor  # [B]
    weight: Tensor  # [B]
    curvature: Tensor  # [B]


def choose_parameters(model: nn.Module, params: ParameterChoice) -> list[str]:
    """Return the names of the chosen parameters in named_parameters() order, tied ones once.

    Args:
        params: None for those with requires_grad; a glob pattern or several; or a predicate
            (name, parameter).

    Raises:
        ValueError: a pattern that matches no parameter, or a choice of none at all.
    """
    named = dict(model.named_parameters())
    if params is None:
        chosen = [name for name, parameter in named.items() if parameter.requires_grad]
        if not chosen:
            raise ValueError(
                "params: expected a model with a parameter that requires grad, got none"
            )
        return chosen
    if callable(params) and not isinstance(params, str):
        chosen = [name for name, parameter in named.items() if params(name, parameter)]
        if not chosen:
            raise ValueError("params: expected a predicate that chooses a parameter, got none")
        return _differentiable(named, chosen)
    if not isinstance(params, (str, Sequence)):
        raise TypeError(
            f"params: expected None, glob patterns or a predicate (name, parameter), got {params!r}"
        )
    patterns = [params] if isinstance(params, str) else list(params)
    if not patterns:
        raise ValueError("params: expected at least one glob pattern, got an empty list")
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"params: expected glob patterns as strings, got {pattern!r}")
        if not any(fnmatch.fnmatchcase(name, pattern) for name in named):
            shown = ", ".join(list(named)[:5])
            raise ValueError(
                f"params: expected patterns that match a parameter ({shown}, ...), got {pattern!r}"
            )
    chosen = [name for name in named if any(fnmatch.fnmatchcase(name, p) for p in patterns)]
    return _differentiable(named, chosen)


def _differentiable(named: Mapping[str, nn.Parameter], chosen: list[str]) -> list[str]:
    for name in chosen:
        if not named[name].is_floating_point():
            raise ValueError(
                f"params: expected floating-point parameters, got {name} of {named[name].dtype}"
            )
    return chosen


def map_tensors(function: Callable[[Tensor], Tensor], batch: Any) -> Any:
    """Return a batch (nested tuples, lists and mappings of tensors) with every tensor mapped."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        return {key: map_tensors(function, value) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return tuple(map_tensors(function, value) for value in batch)
    raise TypeError(
        f"batch: expected tensors in tuples, lists or mappings, got a {type(batch).__name__}"
    )


def batch_tensors(batch: Any) -> list[Tensor]:
    """Return a batch's tensors in order."""
    tensors: list[Tensor] = []
    map_tensors(lambda tensor: tensors.append(tensor) or tensor, batch)  # type: ignore[func-returns-value]
    return tensors


def batch_size(batch: Any) -> int:
    """Return the number of samples: the first dimension, the same for every tensor."""
    tensors = batch_tensors(batch)
    sizes = {tensor.shape[0] if tensor.dim() else None for tensor in tensors}
    if len(sizes) != 1 or None in sizes:
        raise ValueError(
            "batch: expected tensors with one number of samples in front, got shapes "
            f"{[list(tensor.shape) for tensor in tensors]}"
        )
    size = sizes.pop()
    assert size is not None
    return size


class GradientComputer:
    """Per-sample gradients of one model under given weights.

    `vmap(grad)` over chunks of samples. Where the model has an operator or a step that vmap cannot
    take, one sample at a time instead, with a warning that says so once.

    Args:
        model: Its parameters and buffers are replaced at each call by the weights given there.
        task: What is differentiated.
        params: See `choose_parameters`; other parameters are never differentiated.
        chunk_size: Samples whose gradients are held at a time; None for up to 256, fewer where
            their gradients would take more than 256 MiB.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        params: ParameterChoice = None,
        chunk_size: int | None = None,
    ) -> None:
        self.model = model
        self.task = task
        self.names = choose_parameters(model, params)
        named = dict(model.named_parameters())
        self.shapes = {name: tuple(named[name].shape) for name in self.names}
        self.num_params = sum(named[name].numel() for name in self.names)
        if chunk_size is None:
            sample_bytes = sum(named[n].numel() * named[n].element_size() for n in self.names)
            chunk_size = max(1, min(_MAX_CHUNK, _CHUNK_BYTES // max(sample_bytes, 1)))
        self.chunk_size = chunk_size
        self._one_by_one = False

    def prepare(
        self, weights: Mapping[str, Tensor], batches: Iterable[tuple[int, Any]], checkpoint: int
    ) -> dict[str, Tensor]:
        """Return what the task takes of the training set under a checkpoint; see `Task.prepare`.

        Args:
            weights: As for a call.
            batches: (position of the first sample in the training set, batch), in order.
            checkpoint: Its number, from 0.

        Returns:
            The context for calls with these weights; empty where the task needs none.
        """
        if self.task.prepare is None:
            return {}
        model = FunctionalModel(self.model, {**self._constant(weights), **self._chosen(weights)})
        with torch.no_grad(), eval_mode(self.model), plain_attention(self.model):
            context = self.task.prepare(model, batches, checkpoint)
        if not isinstance(context, Mapping) or not all(
            isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in context.items()
        ):
            raise TypeError(
                f"task {self.task.name!r}: expected prepare() to return tensors by name, "
                f"got a {type(context).__name__}"
            )
        return {name: tensor.detach() for name, tensor in context.items()}

    def __call__(
        self,
        weights: Mapping[str, Tensor],
        batch: Any,
        context: Mapping[str, Tensor] | None = None,
        index: Tensor | None = None,
    ) -> Iterator[SampleGradients]:
        """Yield gradients of a batch in order, chunk_size samples at a time.

        Args:
            weights: A state dict, or named parameters and buffers; what it lacks is the model's.
            batch: Tensors with samples in front, in tuples, lists or mappings.
            context: What `prepare` returned for these weights, for a task that has one.
            index: int64 [B], the samples' positions in the training set, -1 for those that are not
                in it, for such a task; None for -1 throughout.
        """
        total = batch_size(batch)
        if index is not None and index.shape != (total,):
            raise ValueError(
                f"index: expected one position for each of {total} samples, "
                f"got shape {list(index.shape)}"
            )
        if index is None:
            index = torch.full((total,), -1)
        tensors = batch_tensors(batch)
        index = index.to(tensors[0].device) if tensors else index
        chosen = self._chosen(weights)
        constant = self._constant(weights)
        with eval_mode(self.model):
            for start in range(0, total, self.chunk_size):
                stop = min(start + self.chunk_size, total)
                chunk = map_tensors(lambda t, a=start, b=stop: t[a:b], (batch, index))  # type: ignore[misc]
                with plain_attention(self.model):
                    part = self._chunk(chosen, constant, context or {}, chunk)
                yield part

    def _chosen(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights that are differentiated."""
        named = dict(self.model.named_parameters())
        return {name: weights.get(name, named[name]).detach() for name in self.names}

    def _constant(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return all other weights.

        Other names of a tied parameter follow the one that named_parameters() lists.
        """
        owned = [*self.model.named_parameters(), *self.model.named_buffers()]
        return {
            name: weights.get(name, tensor).detach()
            for name, tensor in owned
            if name not in self.shapes
        }

    def _output(
        self,
        chosen: dict[str, Tensor],
        constant: dict[str, Tensor],
        context: Mapping[str, Tensor],
        sample: Any,
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Return f of a sample (tensors without a batch dimension), and (f, Q, R)."""
        model = FunctionalModel(self.model, {**constant, **chosen})
        batch, index = map_tensors(lambda tensor: tensor.unsqueeze(0), sample)
        output = self.task(model, batch, context, index)
        if output.output.numel() != 1:
            raise ValueError(
                f"task {self.task.name!r}: expected one output for one sample, "
                f"got {output.output.numel()}"
            )
        f, q, r = (part.reshape(()) for part in output)
        return f, (f.detach(), q, r)

    def _chunk(
        self,
        chosen: dict[str, Tensor],
        constant: dict[str, Tensor],
        context: Mapping[str, Tensor],
        chunk: Any,
    ) -> SampleGradients:
        if self._one_by_one:
            return self._loop(chosen, constant, context, chunk)
        try:
            return self._vmap(chosen, constant, context, chunk)
        except (RuntimeError, NotImplementedError) as error:
            if "randomness" in str(error):
                raise RuntimeError(_RANDOM_MODEL) from error
            if isinstance(error, torch.OutOfMemoryError):
                raise
            # If the sample-by-sample way fails as well, the fault is not vmap's: it tells its own.
            result = self._loop(chosen, constant, context, chunk)
            self._one_by_one = True
            warnings.warn(
                "trak_ext computes gradients one sample at a time, which is slow: vmap cannot take "
                f"this model ({str(error).strip().splitlines()[0]})",
                RuntimeWarning,
                stacklevel=2,
            )
            return result

    def _vmap(
        self,
        chosen: dict[str, Tensor],
        constant: dict[str, Tensor],
        context: Mapping[str, Tensor],
        chunk: Any,
    ) -> SampleGradients:
        gradient = vmap(grad(self._output, has_aux=True), in_dims=(None, None, None, 0))
        grads, (f, q, r) = gradient(chosen, constant, dict(context), chunk)
        return SampleGradients({name: grads[name] for name in self.names}, f, q, r)

    def _loop(
        self,
        chosen: dict[str, Tensor],
        constant: dict[str, Tensor],
        context: Mapping[str, Tensor],
        chunk: Any,
    ) -> SampleGradients:
        rows: list[Sequence[Tensor]] = []
        outputs = []
        with torch.inference_mode(False), torch.enable_grad():
            leaves = {name: _ordinary(t).detach().requires_grad_() for name, t in chosen.items()}
            constant = {name: _ordinary(tensor) for name, tensor in constant.items()}
            context = {name: _ordinary(tensor) for name, tensor in context.items()}
            for i in range(batch_size(chunk)):
                sample = map_tensors(lambda tensor, i=i: _ordinary(tensor[i]), chunk)  # type: ignore[misc]
                random_state = torch.get_rng_state()
                f, parts = self._output(leaves, constant, context, sample)
                if not torch.equal(torch.get_rng_state(), random_state):
                    raise RuntimeError(_RANDOM_MODEL)
                if f.requires_grad:
                    row = torch.autograd.grad(
                        f, list(leaves.values()), allow_unused=True, materialize_grads=True
                    )
                else:  # no chosen parameter has a part in the output
                    row = tuple(torch.zeros_like(tensor) for tensor in leaves.values())
                rows.append([gradient.to_dense() for gradient in row])
                outputs.append(parts)
        grads = {name: torch.stack([row[i] for row in rows]) for i, name in enumerate(leaves)}
        f, q, r = (torch.stack(part) for part in zip(*outputs, strict=True))
        return SampleGradients(grads, f, q, r)


def _ordinary(tensor: Tensor) -> Tensor:
    """Return a tensor that autograd may keep: a copy, where it was made in inference mode."""
    return tensor.clone() if tensor.is_inference() else tensor
