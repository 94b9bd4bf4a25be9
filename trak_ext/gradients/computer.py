"""Per-sample gradients of a task's output by `torch.func`, a sample chunk at a time."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import grad, vmap

from .. import _check
from ..inputs.batches import batch_size, batch_tensors, in_containers, map_tensors, plain_containers
from ..tasks import ModelOutput, Task
from ..tasks.core import naming_faults
from .embeddings import Lookups, RowGradients, looked_up_tables
from .functional import (
    EvalMode,
    computing,
    old_transformers,
    other_ways,
    values_in_place,
    weights_in_place,
)
from .memory import KeptHeap, PeakBytes, free_bytes, is_out_of_memory
from .parameters import ParameterChoice, choose_parameters

_RANDOM_MODEL = "model: expected an output that is not random in eval mode, got a random operation"
_PROBED = 2  # samples that every checkpoint's first gradients are computed of twice
_ZEROS = 2  # samples whose gradients may not all be zero
_REPEATED = {"rtol": 1e-5, "atol": 1e-6}  # of f, Q and R on a second call

LARGEST = 256
LOOPED = 16  # samples of a chunk that are taken one at a time, by models that may be slow
SHARE = 0.5  # of free memory; the rest is for features, loaders and what kernels take
# On the CPU, whose cores are busy with a few samples. Tensors of larger chunks outgrow the blocks
# of the allocator (32 MiB in glibc), and the pages they fault in can cost as much as all else.
MOST_BYTES = 2**28
UNKNOWN = 2**30  # bytes to use where the system does not tell what is free
TINY = 2**30  # bytes of a thousand such models and inputs that any machine takes a few of
SAFE = 1000  # times weights and inputs: more than activations are, unless those two are tiny


class SampleGradients(NamedTuple):
    """Gradients of f for B samples, with f, Q and R."""

    grads: dict[str, Tensor]  # [B, *parameter shape], in named_parameters() order
    output: Tensor  # [B]
    weight: Tensor  # [B]
    curvature: Tensor  # [B]
    rows: Mapping[str, RowGradients] = MappingProxyType({})  # tables that are not in grads

    @property
    def figures(self) -> ModelOutput:
        """f, Q and R."""
        return ModelOutput(self.output, self.weight, self.curvature)


class _Weights(NamedTuple):
    """What f depends on beside the sample."""

    chosen: dict[str, Tensor]  # what is differentiated
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
            half of the free memory takes, and 256 MiB on the CPU. Either is halved, with a warning,
            when memory runs out.
        tables_by_row: Whether `SampleGradients.rows` may have the gradients of embedding tables, on
            the CPU, where most of their rows are looked up by no sample of a chunk.

    Memory: beside the model and the weights, at most chunk_size times `sample_bytes`, if a caller
    lets go of a sample chunk before it asks for the next.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        params: ParameterChoice = None,
        chunk_size: int | None = None,
        tables_by_row: bool = False,
    ) -> None:
        self.model = model
        self.task = task
        if isinstance(model, torch.jit.ScriptModule):
            raise TypeError(
                "model: expected a torch.nn.Module whose weights can be replaced, got a "
                f"{type(model).__name__} (give the module that it was made from)"
            )
        self.names = choose_parameters(model, params)
        named = dict(model.named_parameters())
        self.shapes = {name: tuple(named[name].shape) for name in self.names}
        self.num_params = sum(named[name].numel() for name in self.names)
        self.chunk_size = chunk_size
        chosen = {name: named[name] for name in self.names}
        self._tables = looked_up_tables(model, chosen) if tables_by_row else []
        self._chunk_size = ChunkSize(chunk_size)
        self._one_by_one = False
        self._reentrant = False  # activation checkpointing that wants backward() itself
        self._reusing = False
        self._heap: KeptHeap | None = None
        self._mode: EvalMode | None = None
        self._written: set[str] | None = None  # weights that the forward writes to, once known
        self._probed: weakref.ref[Tensor] | None = None
        # Samples of this checkpoint whose gradients were all zero; None once one was not.
        self._nothing_yet: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mode": None, "_probed": None, "_heap": None}

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
        given = self._weights(weights, None)
        owned = {**given.constant, **given.chosen}
        copies = ((start, map_tensors(torch.clone, batch)) for start, batch in batches)
        with self._computing(), weights_in_place(self.model, self._fresh(owned)), torch.no_grad():
            context = self.task.prepare(self.model, copies, checkpoint)
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
        skip: int = 0,
    ) -> Generator[SampleGradients, None, None]:
        """Yield gradients of a batch in order, chunk_size samples at a time.

        Where a batch is cut depends on the batch and the free memory that was chosen from alone.

        Args:
            weights: A state dict, or named parameters and buffers; what it lacks is the model's.
            batch: Tensors with samples in front, in tuples, lists or mappings.
            context: What `prepare` returned for these weights, for a task that has one.
            index: int64 [B], the samples' positions in the training set, -1 for those that are not
                in it, for such a task; None for -1 throughout.
            skip: Samples at the front that are left out; where they are whole sample chunks the
                rest is cut as ever.
        """
        total = batch_size(batch)
        samples = (batch, self._positions(index, batch))
        given = self._weights(weights, context, samples[1].device)
        if total <= skip:
            return
        self._probe(given, samples, weights.get(self.names[0]))
        tensors = batch_tensors(batch)
        size = self._chunk_size.choose(
            next(iter(given.chosen.values())).device,
            total,
            tuple((tensor.dtype, tuple(tensor.shape[1:])) for tensor in tensors),
            sum(tensor[0].nbytes for tensor in tensors),
            sum(tensor.nbytes for tensor in (*given.chosen.values(), *given.constant.values())),
            lambda: self._measure(given, samples),
        )
        known = self._chunk_size.sample_bytes
        if self._reusing and known and given.chosen[self.names[0]].device.type == "cpu":
            self._heap = self._heap or KeptHeap()
            self._heap.keep(size * known)
        if self._one_by_one:  # no bit depends on it, and nobody waits long for the end of one
            size = min(size, LOOPED)
        start = skip
        while start < total:
            stop = min(start + size, total)
            part = self._fitting(given, _rows(samples, start, stop), stop - start)
            if part is None:
                size = self._chunk_size.halve(stop - start)
                continue
            self._explain(given, samples, start, part)
            yield part
            del part
            start = stop

    @contextmanager
    def reusing_memory(self) -> Iterator[None]:
        """Keep the memory of one sample chunk for the next, on the CPU, until the end."""
        before, self._reusing = self._reusing, True
        try:
            yield
        finally:
            self._reusing = before
            if not before:
                self._heap = None

    def agree_on_chunks(
        self, device: torch.device, agree: Callable[[str, int | None], int | None]
    ) -> None:
        """Cut sample chunks as another run does, so that gradients have the same bits.

        Args:
            device: Where gradients are computed.
            agree: Returns that run's number of a name, or the number that it is given.
        """
        size = agree("chunk_size", self.chunk_size)
        if self.chunk_size is None and size is not None:
            self._chunk_size = ChunkSize(size)
        budget = agree(f"chunk_bytes_{device.type}", self._chunk_size.budget(device))
        if budget is not None:
            self._chunk_size.use_budget(budget)

    def _explain(self, weights: _Weights, samples: Any, start: int, part: SampleGradients) -> None:
        """Say why outputs are NaN, where the task can tell, or all gradients zero."""
        finite = torch.stack([torch.isfinite(figure) for figure in part.figures]).all(0)
        if not bool(finite.all()):
            chunk = _rows(samples, start, start + len(finite))
            with self._alone(weights, chunk) as (batch, positions), naming_faults():
                self.task(self.model, batch, weights.context, positions)
        if self._nothing_yet is None:
            return
        values = [*part.grads.values(), *(table.values for table in part.rows.values())]
        if any(bool(value.any()) for value in values):  # NaN too
            self._nothing_yet = None
            return
        self._nothing_yet += len(part.output)
        if self._nothing_yet >= _ZEROS:
            raise ValueError(
                f"task {self.task.name!r}: expected gradients, got zero for every parameter of the "
                f"first {self._nothing_yet} samples (does f use the model that it is given, "
                "without detach()?)"
            )

    def outputs(
        self,
        weights: Mapping[str, Tensor],
        batch: Any,
        context: Mapping[str, Tensor] | None = None,
        index: Tensor | None = None,
    ) -> ModelOutput:
        """Return f, Q and R of a whole batch at once; arguments as for a call."""
        samples = (batch, self._positions(index, batch))
        given = self._weights(weights, context, samples[1].device)
        with self._alone(given, samples) as (copy, positions):
            return self.task(self.model, copy, given.context, positions)

    @contextmanager
    def _alone(self, weights: _Weights, samples: Any) -> Iterator[Any]:
        """Have the model hold weights without gradients, and yield a copy of samples for it."""
        owned = self._fresh({**weights.constant, **weights.chosen})
        with self._computing(), weights_in_place(self.model, owned), torch.no_grad():
            yield map_tensors(torch.clone, samples)

    def sample_bytes(
        self,
        weights: Mapping[str, Tensor],
        batch: Any,
        context: Mapping[str, Tensor] | None = None,
        index: Tensor | None = None,
    ) -> int:
        """Return the bytes that each sample of a sample chunk takes, measured at the first.

        Its gradients, and what is kept of the forward and made in the backward pass. Arguments as
        for a call.
        """
        samples = (batch, self._positions(index, batch))
        given = self._weights(weights, context, samples[1].device)
        self._probe(given, samples, weights.get(self.names[0]))
        return self._measure(given, samples)

    def _measure(self, weights: _Weights, samples: Any) -> int:
        with self._computing(), PeakBytes() as memory:
            self._attempt(weights, _rows(samples, 0, 1))
        return memory.peak

    def _probe(self, weights: _Weights, samples: Any, given: Tensor | None) -> None:
        """Compute a few samples twice, once for each checkpoint: f, Q and R must be the same.

        At the first checkpoint this also finds the weights that the forward writes to, on copies.
        """
        given = self.model.get_parameter(self.names[0]) if given is None else given
        if self._probed is not None and self._probed() is given:
            return
        self._nothing_yet = 0
        few = _rows(samples, 0, min(_PROBED, self.chunk_size or _PROBED))
        if self.task.check is not None:
            with self._alone(weights, few) as (batch, _):
                self.task.check(self.model, batch)
        try:
            self._compare(weights, few)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self._compare(weights, _rows(samples, 0, 1))
        self._probed = weakref.ref(given)

    def _compare(self, weights: _Weights, few: Any) -> None:
        owned = {**weights.constant, **weights.chosen}
        if self._written is None:
            self._check_names(weights, few)
            with torch.inference_mode(False):
                copies = {name: tensor.clone() for name, tensor in owned.items()}
            versions = {name: tensor._version for name, tensor in copies.items()}
            chosen = {name: copies[name] for name in weights.chosen}
            constant = {name: copies[name] for name in weights.constant}
            self._written = set()  # nothing is copied again
            try:
                with self._computing():
                    self._attempt(_Weights(chosen, constant, weights.context), few)
            except BaseException:
                self._written = None
                raise
            self._written = {name for name, t in copies.items() if t._version != versions[name]}
        with self._computing():
            once, again = (self._attempt(weights, few).figures for _ in range(2))
        for name, a, b in zip(ModelOutput._fields, once, again, strict=True):
            if not torch.allclose(a, b, **_REPEATED, equal_nan=True):
                worst = int((a - b).abs().argmax())
                raise RuntimeError(
                    f"{_RANDOM_MODEL}: the {name} of one sample was {float(a[worst]):.6g} and then "
                    f"{float(b[worst]):.6g} (NumPy, random or an own generator in model or task?)"
                )

    def _check_names(self, weights: _Weights, few: Any) -> None:
        """Refuse a model that reads a weight past its name, where another checkpoint's is not.

        Outputs for weights that nobody has are compared: put in by name, and as values.
        """
        places = other_ways(self.model)
        if not places:
            return
        given = {**weights.constant, **weights.chosen}
        moved = {k: t * (1 + 2**-7) if t.is_floating_point() else t for k, t in given.items()}
        outputs = []
        for put in (weights_in_place, values_in_place):
            with self._computing(), put(self.model, moved), torch.no_grad():
                batch, positions = map_tensors(torch.clone, few)
                outputs.append(self.task(self.model, batch, weights.context, positions).output)
        by_name, as_values = outputs
        if not torch.allclose(by_name, as_values, **_REPEATED, equal_nan=True):
            raise ValueError(
                "model: expected weights that are read by their names alone, got some that "
                f"{' or '.join(places[:3])} leads to, where a checkpoint's cannot be put (read "
                "them from their module in forward)"
            )

    def _fitting(self, weights: _Weights, chunk: Any, size: int) -> SampleGradients | None:
        """Return the gradients of a sample chunk, None where fewer samples might fit in memory."""
        owned = {**weights.constant, **weights.chosen}
        versions = {name: tensor._version for name, tensor in owned.items()}
        try:
            with self._computing():
                part = self._attempt(weights, chunk)
        except (RuntimeError, MemoryError) as error:
            if size == 1 or not is_out_of_memory(error):
                raise
            return None
        written = [name for name, tensor in owned.items() if tensor._version != versions[name]]
        if written:
            raise RuntimeError(
                "model: expected a forward that writes to the same weights for every sample, got "
                f"one that wrote to {', '.join(written[:3])} for some alone"
            )
        return part

    @contextmanager
    def _computing(self) -> Iterator[None]:
        if self._mode is None:
            self._mode = EvalMode(self.model)
        with computing(self.model, self._mode):
            yield

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

    def _weights(
        self,
        weights: Mapping[str, Tensor],
        context: Mapping[str, Tensor] | None,
        device: torch.device | None = None,
    ) -> _Weights:
        """Return the weights by use; where some lie elsewhere, they come to the chosen ones.

        Other names of a tied parameter follow the one that named_parameters() lists.
        """
        owned = dict([*self.model.named_parameters(), *self.model.named_buffers()])
        with torch.inference_mode(False):
            given = {
                name: _ordinary(weights.get(name, tensor).detach())
                for name, tensor in owned.items()
            }
            chosen = {name: given.pop(name) for name in self.names}
            where = next(iter(chosen.values())).device
            constant = {name: tensor.to(where) for name, tensor in given.items()}
            prepared = {name: _ordinary(t.to(device)) for name, t in (context or {}).items()}
        return _Weights(chosen, constant, prepared)

    def _fresh(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return weights with copies of those that the forward writes to, or of all unknown."""
        return {
            name: tensor.clone() if self._written is None or name in self._written else tensor
            for name, tensor in weights.items()
        }

    def _output(
        self,
        chosen: dict[str, Tensor],
        others: tuple[dict[str, Tensor], dict[str, Tensor]],
        sample: Any,
        held: ExitStack,
        batch: Any,
        lookups: Lookups | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Return f of a sample (tensors without a batch dimension), and (f, Q, R).

        The weights stay in the model until `held` is closed, after the backward pass. `batch` says
        what containers the task gets, `lookups` what notes lookups in tables.
        """
        constant, context = others
        held.enter_context(weights_in_place(self.model, {**constant, **chosen}))
        plain, index = map_tensors(lambda tensor: tensor.unsqueeze(0), sample)
        with lookups.watching(chosen, index) if lookups else nullcontext():
            output = self.task(self.model, in_containers(plain, batch), context, index)
        if output.output.numel() != 1:
            raise ValueError(
                f"task {self.task.name!r}: expected one output for one sample, "
                f"got {output.output.numel()}"
            )
        f, q, r = (value.reshape(()) for value in output)
        return f, (f.detach(), q, r)

    def _attempt(self, weights: _Weights, chunk: Any) -> SampleGradients:
        """Return the gradients of a sample chunk, on copies of all that the model may write to."""
        if self._one_by_one:
            return self._loop(weights, chunk)
        try:
            return self._vmap(weights, chunk)
        except (RuntimeError, NotImplementedError) as error:
            if "randomness" in str(error):
                raise RuntimeError(_RANDOM_MODEL) from error
            if is_out_of_memory(error):
                raise
            # If the sample-by-sample way fails as well, the fault is not vmap's: it tells its own.
            result = self._loop(weights, chunk)
            self._one_by_one = True
            _check.warn(
                "trak_ext computes gradients one sample at a time, which is slow: vmap cannot take "
                f"this model ({str(error).strip().splitlines()[0]}){old_transformers(self.model)}"
            )
            return result

    def _vmap(self, weights: _Weights, chunk: Any) -> SampleGradients:
        others = (self._fresh(weights.constant), weights.context)
        chosen = self._fresh(weights.chosen)
        on_cpu = all(chosen[name].device.type == "cpu" for name in self._tables)
        lookups = Lookups(self._tables) if self._tables and on_cpu else None
        with ExitStack() as held:
            output = partial(self._output, held=held, batch=chunk[0], lookups=lookups)
            gradient = vmap(grad(output, has_aux=True), in_dims=(None, None, 0))
            samples = plain_containers(map_tensors(torch.clone, chunk))
            grads, (f, q, r) = gradient(chosen, others, samples)
        ordered = {name: grads[name] for name in self.names}
        rows = lookups.take_from(ordered, chosen.values()) if lookups else {}
        return SampleGradients(ordered, f, q, r, rows)

    def _loop(self, weights: _Weights, chunk: Any) -> SampleGradients:
        rows: list[list[Tensor]] = []
        outputs = []
        batch = chunk[0]
        chunk = plain_containers(map_tensors(torch.clone, chunk))
        for i in range(batch_size(chunk)):
            leaves = {
                name: tensor.detach().requires_grad_()
                for name, tensor in self._fresh(weights.chosen).items()
            }
            others = (self._fresh(weights.constant), weights.context)
            sample = map_tensors(lambda tensor, i=i: tensor[i], chunk)  # type: ignore[misc]
            random_state = torch.get_rng_state()
            with ExitStack() as held, torch.enable_grad(), _whole_gradients():
                f, output = self._output(leaves, others, sample, held, batch)
                if not torch.equal(torch.get_rng_state(), random_state):
                    raise RuntimeError(_RANDOM_MODEL)
                try:
                    row = _gradients(f, list(leaves.values()), self._reentrant)
                except RuntimeError as error:
                    if self._reentrant or not _wants_backward(error):
                        raise
                    self._reentrant = True
                    return self._loop(weights, chunk)
            rows.append(row)
            outputs.append(output)
        grads = {name: torch.stack([row[i] for row in rows]) for i, name in enumerate(self.names)}
        f, q, r = (torch.stack(values) for values in zip(*outputs, strict=True))
        return SampleGradients(grads, f, q, r)


def _rows(samples: Any, start: int, stop: int) -> Any:
    return map_tensors(lambda tensor: tensor[start:stop], samples)


def _gradients(f: Tensor, leaves: list[Tensor], reentrant: bool) -> list[Tensor]:
    """Return the gradient of f for each leaf, zeros where f does not depend on it."""
    if not f.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    if reentrant:
        f.backward()
        return [torch.zeros_like(t) if t.grad is None else t.grad.to_dense() for t in leaves]
    found = torch.autograd.grad(f, leaves, allow_unused=True, materialize_grads=True)
    return [gradient.to_dense() for gradient in found]


def _wants_backward(error: RuntimeError) -> bool:
    """Return whether reentrant checkpointing refused autograd.grad, in either of its sentences."""
    said = str(error)
    return "Checkpointing is not compatible" in said or "incompatible with .grad()" in said


@contextmanager
def _whole_gradients() -> Iterator[None]:
    """Refuse activation checkpointing that leaves gradients out, of which torch only warns."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="None of the inputs have requires_grad=True")
        try:
            yield
        except UserWarning as warning:
            if "None of the inputs have requires_grad=True" not in str(warning):
                raise
            raise RuntimeError(
                "model: expected activation checkpointing that gives gradients, got one of the "
                "reentrant kind around layers whose inputs have none (use_reentrant=False)"
            ) from warning


def _ordinary(tensor: Tensor) -> Tensor:
    """Return a tensor that autograd may keep: a copy, where it was made in inference mode."""
    return tensor.clone() if tensor.is_inference() else tensor


class ChunkSize:
    """The size of a sample chunk: as given, or as many as half of the free memory takes.

    On the CPU that is 256 MiB at most, or one sample.

    What is free is asked once, or said by another run; what a sample takes is measured once for
    each kind of sample (its tensors' shapes and dtypes), whatever came before. So sample chunks,
    and the last bits of gradients with them, depend on the batch and that number alone. Models so
    small that a thousand times their weights and inputs would fit are not measured.

    Args:
        given: A fixed number, None to choose.
    """

    def __init__(self, given: int | None) -> None:
        self.given = given
        self._most = LARGEST if given is None else given
        self._budget: int | None = None
        self._measured: dict[Hashable, int] = {}  # bytes that each kind of sample takes
        self.sample_bytes = 0  # of the last kind, where it was measured
        self._halved = False

    def budget(self, device: torch.device) -> int:
        """Return the bytes that a sample chunk may take, asking what is free the first time.

        A number of three significant bits, so that it is the same again where about as much is
        free.
        """
        if self._budget is None:
            free = free_bytes(device)
            found = UNKNOWN if free is None else int(SHARE * free)
            if device.type == "cpu":
                found = min(found, MOST_BYTES)
            low = max(0, found.bit_length() - 3)
            self._budget = found >> low << low
        return self._budget

    def use_budget(self, budget: int) -> None:
        """Take a number of bytes that a run before this one chose."""
        self._budget = budget

    def choose(
        self,
        device: torch.device,
        samples: int,
        kind: Hashable,
        input_bytes: int,
        weight_bytes: int,
        measure: Callable[[], int],
    ) -> int:
        """Return how many samples a sample chunk may have.

        Args:
            device: Where the gradients are computed.
            samples: In the batch.
            kind: What samples that take equally much have in common.
            input_bytes: Of one sample.
            weight_bytes: Of the model, which bounds a sample's gradients.
            measure: Returns all that one sample takes, by computing it; called only where needed.
        """
        if self.given is not None:
            return self._most
        tiny = min(samples, LARGEST) * SAFE * (input_bytes + weight_bytes)
        if tiny <= TINY:  # nobody need ask what is free
            return self._most
        budget = self.budget(device)
        if tiny <= budget:
            return self._most
        if kind not in self._measured:
            self._measured[kind] = measure()
        self.sample_bytes = self._measured[kind]
        return max(1, min(self._most, budget // max(self.sample_bytes, 1)))

    def halve(self, tried: int) -> int:
        """Take half of what did not fit in memory from now on, and return it; say so once."""
        if not self._halved:
            _check.warn(
                f"trak_ext ran out of memory with the gradients of {tried} samples at a time, and "
                "goes on with fewer"
            )
        self._halved = True
        self._most = max(1, tried // 2)
        return self._most
