"""Per-sample gradients of a task's output by `torch.func`, a sample chunk at a time."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import grad, vmap

from ..inputs.loaders import batch_size, batch_tensors, map_tensors
from ..tasks import Task
from .functional import FunctionalModel, eval_mode, plain_attention
from .memory import PeakBytes, free_bytes, is_out_of_memory
from .parameters import ParameterChoice, choose_parameters

_RANDOM_MODEL = "model: expected an output that is not random in eval mode, got a random operation"

LARGEST = 256
SHARE = 0.5  # of free memory; the rest is for features, loaders and what kernels take
MOST_BYTES = 2**31  # on the CPU, whose cores are busy with far less and whose memory is shared
UNKNOWN = 2**30  # bytes to use where the system does not tell what is free
TINY = 2**30  # bytes of a thousand such models and inputs that any machine takes a few of
SAFE = 1000  # times weights and inputs: more than activations are, unless those two are tiny


class SampleGradients(NamedTuple):
    """Gradients of f for B samples, with f, Q and R."""

    grads: dict[str, Tensor]  # [B, *parameter shape], in named_parameters() order
    output: Tensor  # [B]
    weight: Tensor  # [B]
    curvature: Tensor  # [B]


class _Fixed(NamedTuple):
    """What gradients depend on but are not taken by."""

    constant: dict[str, Tensor]  # the other weights
    context: dict[str, Tensor]  # what the task prepared


class GradientComputer:
    """Per-sample gradients of one model under given weights.

    `vmap(grad)` over chunks of samples. Where the model has an operator or a step that vmap cannot
    take, one sample at a time instead, with a warning that says so once.

    Args:
        model: Its parameters and buffers are replaced at each call by the weights given there.
        task: What is differentiated.
        params: See `choose_parameters`; other parameters are never differentiated.
        chunk_size: Samples whose gradients are computed at a time; None for up to 256, as many as
            half of the free memory takes, and 2 GiB on the CPU. Either is halved, with a warning,
            when memory runs out.

    Memory: beside the model and the weights, at most chunk_size times `sample_bytes`.
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
        self.chunk_size = chunk_size
        self._chunk_size = ChunkSize(chunk_size)
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
    ) -> Generator[SampleGradients, None, None]:
        """Yield gradients of a batch in order, chunk_size samples at a time.

        Args:
            weights: A state dict, or named parameters and buffers; what it lacks is the model's.
            batch: Tensors with samples in front, in tuples, lists or mappings.
            context: What `prepare` returned for these weights, for a task that has one.
            index: int64 [B], the samples' positions in the training set, -1 for those that are not
                in it, for such a task; None for -1 throughout.
        """
        total = batch_size(batch)
        samples = (batch, self._positions(index, batch))
        chosen, fixed = self._chosen(weights), self._fixed(weights, context, samples[1].device)
        if total == 0:
            return
        with eval_mode(self.model):
            size = self._chunk_size.choose(
                next(iter(chosen.values())).device,
                total,
                sum(tensor[0].nbytes for tensor in batch_tensors(batch)),
                sum(tensor.nbytes for tensor in (*chosen.values(), *fixed.constant.values())),
                lambda: self._measure(chosen, fixed, samples),
            )
            start = 0
            while start < total:
                stop = min(start + size, total)
                chunk = map_tensors(lambda t, a=start, b=stop: t[a:b], samples)  # type: ignore[misc]
                part = self._fitting(chosen, fixed, chunk, stop - start)
                if part is None:
                    size = self._chunk_size.halve(stop - start)
                    continue
                yield part
                start = stop

    def sample_bytes(
        self,
        weights: Mapping[str, Tensor],
        batch: Any,
        context: Mapping[str, Tensor] | None = None,
        index: Tensor | None = None,
    ) -> int:
        """Return the bytes that each sample of a sample chunk takes, measured at the first.

        Its gradients, what is kept of the forward and made in the backward pass, and once more its
        gradients: a caller holds those of one chunk while the next is computed. Arguments as for a
        call.
        """
        samples = (batch, self._positions(index, batch))
        fixed = self._fixed(weights, context, samples[1].device)
        with eval_mode(self.model):
            return self._measure(self._chosen(weights), fixed, samples)

    def _measure(
        self,
        chosen: dict[str, Tensor],
        fixed: _Fixed,
        samples: Any,
    ) -> int:
        first = map_tensors(lambda tensor: tensor[:1], samples)
        with plain_attention(self.model), PeakBytes() as memory:
            part = self._chunk(chosen, fixed, first)
        return memory.peak + sum(grad.nbytes for grad in part.grads.values())

    def _fitting(
        self,
        chosen: dict[str, Tensor],
        fixed: _Fixed,
        chunk: Any,
        size: int,
    ) -> SampleGradients | None:
        """Return the gradients of a sample chunk, None where fewer samples might fit in memory."""
        try:
            with plain_attention(self.model):
                return self._chunk(chosen, fixed, chunk)
        except (RuntimeError, MemoryError) as error:
            if size == 1 or not is_out_of_memory(error):
                raise
            return None

    def _positions(self, index: Tensor | None, batch: Any) -> Tensor:
        """Return the samples' positions where the batch is, -1 for those without."""
        total = batch_size(batch)
        device = batch_tensors(batch)[0].device
        if index is None:
            return torch.full((total,), -1, device=device)
        if index.shape != (total,):
            raise ValueError(
                f"index: expected one position for each of {total} samples, "
                f"got shape {list(index.shape)}"
            )
        return index.to(device)

    def _chosen(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights that are differentiated."""
        named = dict(self.model.named_parameters())
        return {name: weights.get(name, named[name]).detach() for name in self.names}

    def _fixed(
        self,
        weights: Mapping[str, Tensor],
        context: Mapping[str, Tensor] | None,
        device: torch.device,
    ) -> _Fixed:
        on_device = {name: tensor.to(device) for name, tensor in (context or {}).items()}
        return _Fixed(self._constant(weights), on_device)

    def _constant(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return all other weights.

        Other names of a tied parameter follow the one that named_parameters() lists.
        """
        owned = [*self.model.named_parameters(), *self.model.named_buffers()]
        device = next(iter(self._chosen(weights).values())).device
        return {
            name: weights.get(name, tensor).detach().to(device)
            for name, tensor in owned
            if name not in self.shapes
        }

    def _output(
        self,
        chosen: dict[str, Tensor],
        fixed: _Fixed,
        sample: Any,
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Return f of a sample (tensors without a batch dimension), and (f, Q, R)."""
        model = FunctionalModel(self.model, {**fixed.constant, **chosen})
        batch, index = map_tensors(lambda tensor: tensor.unsqueeze(0), sample)
        output = self.task(model, batch, fixed.context, index)
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
        fixed: _Fixed,
        chunk: Any,
    ) -> SampleGradients:
        if self._one_by_one:
            return self._loop(chosen, fixed, chunk)
        try:
            return self._vmap(chosen, fixed, chunk)
        except (RuntimeError, NotImplementedError) as error:
            if "randomness" in str(error):
                raise RuntimeError(_RANDOM_MODEL) from error
            if is_out_of_memory(error):
                raise
            # If the sample-by-sample way fails as well, the fault is not vmap's: it tells its own.
            result = self._loop(chosen, fixed, chunk)
            self._one_by_one = True
            warnings.warn(
                "trak_ext computes gradients one sample at a time, which is slow: vmap cannot take "
                f"this model ({str(error).strip().splitlines()[0]})",
                RuntimeWarning,
                stacklevel=4,
            )
            return result

    def _vmap(
        self,
        chosen: dict[str, Tensor],
        fixed: _Fixed,
        chunk: Any,
    ) -> SampleGradients:
        gradient = vmap(grad(self._output, has_aux=True), in_dims=(None, None, 0))
        grads, (f, q, r) = gradient(chosen, fixed, chunk)
        return SampleGradients({name: grads[name] for name in self.names}, f, q, r)

    def _loop(
        self,
        chosen: dict[str, Tensor],
        fixed: _Fixed,
        chunk: Any,
    ) -> SampleGradients:
        rows: list[Sequence[Tensor]] = []
        outputs = []
        with torch.inference_mode(False), torch.enable_grad():
            leaves = {name: _ordinary(t).detach().requires_grad_() for name, t in chosen.items()}
            fixed = _Fixed(*({n: _ordinary(t) for n, t in part.items()} for part in fixed))
            for i in range(batch_size(chunk)):
                sample = map_tensors(lambda tensor, i=i: _ordinary(tensor[i]), chunk)  # type: ignore[misc]
                random_state = torch.get_rng_state()
                f, parts = self._output(leaves, fixed, sample)
                if not torch.equal(torch.get_rng_state(), random_state):
                    raise RuntimeError(_RANDOM_MODEL)
                if f.requires_grad:
                    row = torch.autograd.grad(
                        f, list(leaves.values()), allow_unused=True, materialize_grads=True
                    )
                else:  # the output depends on no chosen parameter
                    row = tuple(torch.zeros_like(tensor) for tensor in leaves.values())
                rows.append([gradient.to_dense() for gradient in row])
                outputs.append(parts)
        grads = {name: torch.stack([row[i] for row in rows]) for i, name in enumerate(leaves)}
        f, q, r = (torch.stack(part) for part in zip(*outputs, strict=True))
        return SampleGradients(grads, f, q, r)


def _ordinary(tensor: Tensor) -> Tensor:
    """Return a tensor that autograd may keep: a copy, where it was made in inference mode."""
    return tensor.clone() if tensor.is_inference() else tensor


class ChunkSize:
    """The size of a sample chunk: as given, or as many as half of the free memory takes.

    On the CPU that is 2 GiB at most.

    What is free is asked once, so that sample chunks, and the last bits of gradients with them,
    stay as they are while memory fills. What a sample takes is measured at the first sample and
    again when larger ones come (longer texts), so that the largest decides for smaller ones after
    it. Models so small that a thousand times their weights and inputs would fit are not measured.

    Args:
        given: A fixed number, None to choose.
    """

    def __init__(self, given: int | None) -> None:
        self.given = given
        self._most = LARGEST if given is None else given
        self._budget: int | None = None
        self._measured = -1  # input bytes of the largest sample measured
        self._sample_bytes = 0
        self._halved = False

    def choose(
        self,
        device: torch.device,
        samples: int,
        input_bytes: int,
        weight_bytes: int,
        measure: Callable[[], int],
    ) -> int:
        """Return how many samples a sample chunk may have.

        Args:
            device: Where the gradients are computed.
            samples: In the batch.
            input_bytes: Of one sample.
            weight_bytes: Of the model, which bounds a sample's gradients.
            measure: Returns all that one sample takes, by computing it; called only where needed.
        """
        if self.given is not None:
            return self._most
        tiny = min(samples, self._most) * SAFE * (input_bytes + weight_bytes)
        if tiny <= TINY:  # nobody need ask what is free
            return self._most
        if self._budget is None:
            free = free_bytes(device)
            self._budget = UNKNOWN if free is None else int(SHARE * free)
            if device.type == "cpu":
                self._budget = min(self._budget, MOST_BYTES)
        if tiny <= self._budget:
            return self._most
        if input_bytes > self._measured:
            self._sample_bytes = max(self._sample_bytes, measure())
            self._measured = input_bytes
        return max(1, min(self._most, self._budget // max(self._sample_bytes, 1)))

    def halve(self, tried: int) -> int:
        """Take half of what did not fit in memory from now on, and return it; say so once."""
        if not self._halved:
            warnings.warn(
                f"trak_ext ran out of memory with the gradients of {tried} samples at a time, and "
                "goes on with fewer",
                RuntimeWarning,
                stacklevel=3,
            )
        self._halved = True
        self._most = max(1, tried // 2)
        return self._most
