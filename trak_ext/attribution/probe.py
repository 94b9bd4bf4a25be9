"""A few samples are computed again: do model and task still give what they gave when fitted?

What a model computes is not in its state dict: a hook, a replaced forward, a function that it
holds, plain attributes, another function under the same task name. So the first samples are kept
in the store with their features, and wherever a checkpoint's weights are loaded anyway they are
computed again.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from .. import _check
from ..inputs.batches import Segment, map_tensors, put_together, take_apart
from ..store import Probe, Shard, StoreError
from ..store.codec import can_keep
from .features import FeatureMaker

SAMPLES = 2

# How far features may be from those of the fit, in shares of their norm, and f, Q and R in shares
# of their size: gradients have other last bits in a sample chunk of another size. By the narrowest
# dtype that computes; ten times that for a device that is not the CPU or not that of the fit,
# whose products may be of fewer bits.
TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
OTHER_DEVICE = 10.0
MEDIUM_PRECISION = 1e-2  # is added for precision="medium"


def tolerance(features: FeatureMaker, device: torch.device, fitted_on: str) -> float:
    """Return how far features may be from those of the fit, in shares of their norm."""
    named = dict(features.gradients.model.named_parameters())
    dtypes = {named[name].dtype for name in features.gradients.names}
    if torch.is_autocast_enabled(device.type):
        dtypes.add(torch.get_autocast_dtype(device.type))
    widest = max(TOLERANCES.get(dtype, TOLERANCES[torch.bfloat16]) for dtype in dtypes)
    if device.type != "cpu" or fitted_on != "cpu":
        widest = min(0.1, widest * OTHER_DEVICE)
    return widest + (MEDIUM_PRECISION if features.precision == "medium" else 0.0)


def first_samples(segment: Segment) -> Any:
    """Return a copy of the batch of a segment's first samples."""
    return map_tensors(lambda tensor: tensor[:SAMPLES].clone(), segment.batch)


def cannot_be_kept(batch: Any) -> str | None:
    """Return what in a batch cannot be kept as tensors and JSON; None where all can."""
    structure, tensors = take_apart(batch)
    try:
        put_together(structure, tensors)
    except ValueError as error:
        return str(error)
    bad = next((tensor for tensor in tensors if not can_keep(tensor)), None)
    return None if bad is None else f"a {bad.layout} tensor of {bad.dtype}"


def make(rows: Shard, batch: Any | None, position: int, device: torch.device) -> Probe:
    """Return a probe of samples that were fitted.

    Args:
        rows: Their features, Q, R and f.
        batch: Of them; None not to keep it, and to compute nothing again.
        position: Of the first one in the training set.
        device: Where they were computed.
    """
    structure, tensors = (None, []) if batch is None else take_apart(batch)
    return Probe(*rows[:4], position, structure, [t.detach().cpu() for t in tensors], device.type)


def check(
    probe: Probe,
    features: FeatureMaker,
    weights: Mapping[str, Tensor],
    m: int,
    context: Mapping[str, Tensor] | None,
    device: torch.device,
    where: str,
) -> None:
    """Compute a probe's samples again under checkpoint m.

    Args:
        features: What the store was fitted with, as far as its settings say.
        context: What the task prepared for this checkpoint, if it does.
        where: The probe's place, for the error.

    Raises:
        StoreError: features, f, Q or R that are further from those of the fit than `tolerance`.
    """
    if probe.structure is None:
        return
    try:
        batch = put_together(probe.structure, [tensor.to(device) for tensor in probe.batch])
    except ValueError as error:
        _check.warn(
            f"store: expected the classes that the probe's batch is made of, got {error}: "
            "whether model and task compute what was fitted is not looked at (import its module, "
            "or probe=False)"
        )
        return
    found = _computed(probe, batch, features, weights, m, context)
    allowed = tolerance(features, device, probe.device)
    then = [tensor.double() for tensor in probe[:4]]
    for name, now, before, size in zip(_NAMES, found, then, _sizes(then), strict=True):
        difference = now - before
        if difference.dim() > 1:
            difference = difference.norm(dim=1)
        worst = float((difference.abs() / size).max())
        if not worst <= allowed:
            raise StoreError(
                f"store: expected the {name} that the fit of checkpoint {m} gave for the samples "
                f"in {where}, got others by {worst:.2g} of their size where {allowed:.2g} is "
                "allowed (does the model or the task compute something else now: a hook, another "
                "forward, an attribute, another function of the same name? use another folder, or "
                "probe=False to go on all the same)"
            )


def _computed(
    probe: Probe,
    batch: Any,
    features: FeatureMaker,
    weights: Mapping[str, Tensor],
    m: int,
    context: Mapping[str, Tensor] | None,
) -> list[Tensor]:
    """Return features, Q, R and f of the probe's samples as they come out now, fp64 on the CPU."""
    count = len(probe.features)
    if not bool(probe.features.any()):  # gradients may be zero there, which is refused elsewhere
        index = torch.arange(probe.position, probe.position + count, device="cpu")
        output = features.gradients.outputs(weights, batch, context, index)
        figures = (output.weight, output.curvature, output.output)
        return [probe.features.double(), *(figure.double().cpu() for figure in figures)]
    made = []
    segment = Segment(0, count, batch, None)
    with closing(features(weights, segment, m, context, probe.position)) as chunks:
        for output, projected in chunks:
            figures = (output.weight, output.curvature, output.output)
            made.append((projected.cpu(), *(figure.float().cpu() for figure in figures)))
    return [torch.cat(parts).double() for parts in zip(*made, strict=True)]


_NAMES = ("features", "weight Q", "curvature R", "output f")


def _sizes(then: list[Tensor]) -> list[Tensor]:
    """Return what differences of features, Q, R and f are shares of, for each sample.

    f is a difference of logits, so that its error does not shrink with it, and what is near 1 - p
    has the relative error that f has an absolute one.
    """
    features, weight, curvature, output = then
    norms = features.norm(dim=1)
    of_output = output.abs().clamp_min(1.0)

    def kept_up(size: Tensor) -> Tensor:
        return torch.maximum(size, 1e-3 * size.max()).clamp_min(1e-12)

    return [
        kept_up(norms),
        kept_up(weight.abs()) * of_output,
        kept_up(curvature.abs()) * of_output,
        of_output,
    ]
