"""Which parameters are differentiated."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence

from torch import nn

ParameterChoice = Sequence[str] | str | Callable[[str, nn.Parameter], bool] | None


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
