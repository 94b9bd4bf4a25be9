"""A module that computes with given weights in eval mode, and is afterwards what it was before."""

from __future__ import annotations

import functools
import importlib.metadata
import operator
import threading
import types
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves

# Weights in a module and torch's attention switches are seen by every thread: one at a time.
_ONE_AT_A_TIME = threading.RLock()

_CONTAINERS = (dict, OrderedDict, defaultdict, list, set)


@contextmanager
def weights_in_place(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Have a model compute with weights until the end, backward passes that run it again included.

    Args:
        weights: By the names of named_parameters() and named_buffers(); tied names follow the one
            that is listed. What is left out is the model's.
    """
    owned = dict([*model.named_parameters(), *model.named_buffers()])
    given = {id(owned[name]): tensor for name, tensor in weights.items() if name in owned}
    places: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for module in model.modules():
        stores: list[dict[str, Any]] = [module._parameters, module._buffers]
        for tensors in stores:
            replaced = {name: t for name, t in tensors.items() if t is not None and id(t) in given}
            places.append((tensors, replaced))
    try:
        for tensors, replaced in places:
            tensors.update({name: given[id(tensor)] for name, tensor in replaced.items()})
        yield
    finally:
        for tensors, replaced in places:
            tensors.update(replaced)


def other_ways(model: nn.Module) -> list[str]:
    """Return the plain attributes that lead to a parameter or buffer past its name.

    Such as a list of weights, a closure or a partial function: whoever reads there may miss the
    weights that `weights_in_place` put under the name.
    """
    owned = {id(t) for t in [*model.parameters(), *model.buffers()]}
    found = []
    for module_name, module in model.named_modules():
        for key, value in vars(module).items():
            if key not in _OF_EVERY_MODULE and _leads_to(value, owned, 4):
                found.append(f"{module_name}.{key}" if module_name else key)
    return found


_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


def _leads_to(value: Any, wanted: set[int], depth: int) -> bool:
    if isinstance(value, Tensor):
        return id(value) in wanted
    if depth == 0 or isinstance(value, (nn.Module, type, str, bytes, int, float)):
        return False
    inner: list[Any] = []
    if isinstance(value, Mapping):
        inner += value.values()
    elif isinstance(value, (list, tuple, set, frozenset)):
        inner += value
    elif isinstance(value, functools.partial):
        inner += [value.func, *value.args, *value.keywords.values()]
    else:
        cells = getattr(value, "__closure__", None) or ()
        inner += [cell.cell_contents for cell in cells if cell != types.CellType()]
        inner += getattr(value, "__defaults__", None) or ()
        inner.append(getattr(value, "__self__", None))
        inner += getattr(value, "__dict__", {}).values()
    return any(_leads_to(part, wanted, depth - 1) for part in inner)


@contextmanager
def values_in_place(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Have a model's own tensors hold other values until the end."""
    owned = dict([*model.named_parameters(), *model.named_buffers()])
    with torch.no_grad():
        kept = {name: owned[name].detach().clone() for name in weights}
        try:
            for name, values in weights.items():
                owned[name].copy_(values)
            yield
        finally:
            for name, values in kept.items():
                owned[name].copy_(values)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Put back every attribute of a model's modules: mode flags, caches, counters, hooks, weights.

    Attributes are given their objects again, and lists, dicts and sets their items. The values of
    tensors are not looked at.
    """
    kept = []
    for module in model.modules():
        own = vars(module)
        # Most containers are empty and stay so: what they had need not be copied.
        containers = [
            (value, value.copy() if value else ())
            for value in own.values()
            if type(value) in _CONTAINERS
        ]
        kept.append((own, own.copy(), containers))
    try:
        yield
    finally:
        for own, attributes, containers in kept:
            if not _same_objects(own, attributes):
                _refill(own, attributes)
            for container, items in containers:
                if (container or items) and not _same_objects(container, items):
                    _refill(container, items)


def _same_objects(container: Any, items: Any) -> bool:
    """Return whether a container has these objects, in this order."""
    if len(container) != len(items):
        return False
    if isinstance(container, dict):
        values = map(operator.is_, container.values(), items.values())
        return all(map(operator.is_, container, items)) and all(values)
    return all(map(operator.is_, container, items))


def _refill(container: Any, items: Any) -> None:
    container.clear()
    container.extend(items) if isinstance(container, list) else container.update(items)


class EvalMode:
    """Puts a model into eval mode: dropout off, BatchNorm on its running figures.

    A module's own train() or eval() may do more than set flags. It is tried once, and what it sets
    is set from then on; but one that changes weights or keeps tensors, such as one that merges
    adapters into a weight, would not do it to a checkpoint's weights, and is refused.

    Raises:
        ValueError: such a module, by name.
    """

    def __init__(self, model: nn.Module) -> None:
        self._attributes: list[tuple[dict[str, Any], dict[str, Any]]] = []
        own = any(
            getattr(type(module), name) is not getattr(nn.Module, name) or name in vars(module)
            for module in model.modules()
            for name in ("train", "eval")
        )
        if own:
            with _ONE_AT_A_TIME:
                self._try(model)

    def set(self, model: nn.Module) -> None:
        """Put the model into eval mode; `undisturbed` puts it back."""
        for module in model.modules():
            module.training = False
        for own, attributes in self._attributes:
            own.update(attributes)

    def _try(self, model: nn.Module) -> None:
        modules = dict(model.named_modules())
        attributes = {name: vars(module).copy() for name, module in modules.items()}
        tensors = _tensors(modules)
        copies = {place: tensor.detach().clone() for place, tensor in tensors.items()}
        with undisturbed(model):
            try:
                model.eval()
                now = _tensors(modules)
                for place in {**tensors, **now}:
                    kept = now.get(place) is tensors.get(place)
                    if not kept or not _same_bits(tensors[place], copies[place]):
                        raise _eval_changes(modules, *place)
                for name, module in modules.items():
                    before = attributes[name]
                    changed = {
                        k: v for k, v in vars(module).items() if before.get(k, self) is not v
                    }
                    for key, value in changed.items():
                        if any(
                            isinstance(leaf, (Tensor, nn.Module)) for leaf in tree_leaves(value)
                        ):
                            raise _eval_changes(modules, name, key)
                    self._attributes.append((module.__dict__, changed))
            finally:
                for place, tensor in tensors.items():
                    if not _same_bits(tensor, copies[place]):
                        tensor.data.copy_(copies[place])


def _tensors(modules: Mapping[str, nn.Module]) -> dict[tuple[str, str], Tensor]:
    """Return parameters and buffers by the names of their module and their own."""
    return {
        (name, key): tensor
        for name, module in modules.items()
        for key, tensor in [*module._parameters.items(), *module._buffers.items()]
        if tensor is not None
    }


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.is_quantized or a.layout != torch.strided:
        return torch.equal(a, b)
    first, second = (t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(first, second)


def _eval_changes(modules: Mapping[str, nn.Module], name: str, what: str) -> ValueError:
    module = f"{name} ({type(modules[name]).__name__})" if name else type(modules[name]).__name__
    return ValueError(
        f"model: expected an eval() that sets modes alone, got one that changes {what} of "
        f"{module}, which would not be done to a checkpoint's weights (does it merge adapters? "
        "call eval() before state dicts are taken, or turn merging off)"
    )


@contextmanager
def computing(model: nn.Module, mode: EvalMode) -> Iterator[None]:
    """Have a model in eval mode for gradients, in this thread alone, and undisturbed after it.

    Outside the caller's inference mode, in which there are no gradients.
    """
    with (
        _ONE_AT_A_TIME,
        torch.inference_mode(False),
        undisturbed(model),
        plain_attention(model),
    ):
        mode.set(model)
        yield


@contextmanager
def plain_attention(model: nn.Module) -> Iterator[None]:
    """Have attention computed by operations that vmap can take, and put everything back.

    - The fused kernels under scaled_dot_product_attention, and the fast path of
      nn.MultiheadAttention, have no batching rule: torch would loop over samples and warn.
    - Hugging Face models look at the values of the padding mask (`if mask.all()`) to do without
      a mask, which vmap refuses. Their "eager" attention takes masks as they are, but for masks
      without a causal part, whose maker is replaced by the same one told not to look.
    - Hugging Face models fill caches for generation that nobody reads here.
    """
    configs = _hugging_face_configs(model)
    before = [(config, _settings(config)) for config in configs]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast_path)
        torch.backends.mha.set_fastpath_enabled(False)
        if configs:
            stack.enter_context(_whole_masks())
        stack.callback(_restore, before)
        for config in configs:
            for name in _settings(config):
                setattr(config, name, _PLAIN[name])
        yield


def old_transformers(model: nn.Module) -> str:
    """Return a clause on a transformers whose models vmap cannot take; empty for none of those."""
    if not _hugging_face_configs(model):
        return ""
    version = importlib.metadata.version("transformers")
    if int(version.split(".")[0]) >= 5:
        return ""
    return f"; transformers {version} is installed, and its models are fast from 5.0 on"


_PLAIN = {"_attn_implementation": "eager", "use_cache": False}


def _hugging_face_configs(model: nn.Module) -> list[Any]:
    """Return the configs that modules of a model hold, and configs within them, outer ones first.

    A tower of a two-tower model reads its own config, which is a part of the model's.
    """
    found: dict[int, Any] = {}

    def add(config: Any) -> None:
        if id(config) not in found and hasattr(config, "_attn_implementation"):
            found[id(config)] = config
            for part in list(vars(config).values()):
                add(part)

    for module in model.modules():
        add(getattr(module, "config", None))
    return list(found.values())


def _settings(config: Any) -> dict[str, Any]:
    return {name: getattr(config, name) for name in _PLAIN if hasattr(config, name)}


def _restore(before: list[tuple[Any, dict[str, Any]]]) -> None:
    # Setting an outer config sets its parts too, so that parts have to come after.
    for config, settings in before:
        for name, value in settings.items():
            setattr(config, name, value)


@contextmanager
def _whole_masks() -> Iterator[None]:
    """Have Hugging Face's eager masks made in full, whatever they mask, with no row of nothing."""
    try:
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as MASKS
    except ImportError:  # before 4.53 models made their masks themselves
        yield
        return
    make_mask = MASKS["eager"]

    def make_whole_mask(*args: Any, **kwargs: Any) -> Any:
        mask = make_mask(*args, **{**kwargs, "allow_is_bidirectional_skip": False})
        if isinstance(mask, Tensor) and mask.is_floating_point():
            # A token of padding on the left may look at nothing, which in fp64 is NaN for all that
            # look at it with a weight of zero. What it sees instead counts for nobody.
            mask = torch.where((mask < 0).all(-1, keepdim=True), 0, mask)
        return mask

    MASKS["eager"] = make_whole_mask
    try:
        yield
    finally:
        del MASKS["eager"]
        if MASKS["eager"] is not make_mask:  # it was an override already
            MASKS["eager"] = make_mask
