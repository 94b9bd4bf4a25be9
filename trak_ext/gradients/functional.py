"""A module with other weights than its own, and the state it is called in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel


class FunctionalModel:
    """A module called with given weights: what a task gets as its model.

    Calls go to forward; attributes are the module's, read and called with the same weights, so
    that model.encode_image(x), model.logit_scale and model.config work.
    """

    def __init__(
        self, module: nn.Module, weights: Mapping[str, Tensor], path: tuple[str, ...] = ()
    ) -> None:
        self._module = module
        self._weights = weights
        self._path = path

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the module returns."""
        return self._visit(lambda module: module(*args, **kwargs))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = self._visit(lambda module: getattr(module, name))
        if isinstance(value, nn.Module):
            return FunctionalModel(self._module, self._weights, (*self._path, name))
        if callable(value):
            return lambda *args, **kwargs: self._visit(
                lambda module: getattr(module, name)(*args, **kwargs)
            )
        return value

    def _visit(self, function: Callable[[Any], Any]) -> Any:
        """Return function(module), the module holding the weights."""
        weights = {f"module.{name}": tensor for name, tensor in self._weights.items()}
        with _own_weights_after(self._module):
            return functional_call(_Visit(self._module, self._path), weights, (function,))


class _Visit(nn.Module):
    """`functional_call` calls forward alone; this one's runs any function of a module."""

    def __init__(self, module: nn.Module, path: tuple[str, ...]) -> None:
        super().__init__()
        self.module = module
        self.path = path

    def forward(self, function: Callable[[Any], Any]) -> Any:
        module: Any = self.module
        for name in self.path:
            module = getattr(module, name)
        return function(module)


@contextmanager
def _own_weights_after(model: nn.Module) -> Iterator[None]:
    """Put the module's tensors back.

    `functional_call` does, but for a module that is there under two names (a layer used twice, the
    embedding of an encoder and a decoder): it is left with the weights of the call.
    """
    stores: list[Any] = [store for m in model.modules() for store in (m._parameters, m._buffers)]
    before = [dict(store) for store in stores]
    try:
        yield
    finally:
        for store, tensors in zip(stores, before, strict=True):
            store.update(tensors)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put every module into eval mode and back: dropout off, BatchNorm on its running figures."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


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
    """Have Hugging Face's eager masks made in full, whatever they mask."""
    try:
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as MASKS
    except ImportError:  # before 4.53 models made their masks themselves
        yield
        return
    make_mask = MASKS["eager"]

    def make_whole_mask(*args: Any, **kwargs: Any) -> Any:
        return make_mask(*args, **{**kwargs, "allow_is_bidirectional_skip": False})

    MASKS["eager"] = make_whole_mask
    try:
        yield
    finally:
        del MASKS["eager"]
        if MASKS["eager"] is not make_mask:  # it was an override already
            MASKS["eager"] = make_mask
