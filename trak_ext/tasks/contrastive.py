"""Two towers trained against each other on pairs, CLIP's way (Radford et al. 2021).

The training loss of a pair depends on the batch it was in. Park et al. 2023 let a sample of the
training set stand for that batch: f of a pair (x, y), with normalised embeddings phi and psi and
the model's logit scale s, is

    f = -logsumexp_{y'}(-s phi(x).(psi(y) - psi(y'))) - logsumexp_{x'}(-s (phi(x) - phi(x')).psi(y))

y' and x' being the sample's embeddings under the same checkpoint, detached, without the pair's
own. Each half is log(p/(1-p)), p being softmax's probability of the pair among the sample and
itself. Q = 1 - (p_image + p_text)/2, and R is the mean of p(1-p) over the two.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .. import _check
from ..inputs.batches import batch_size, map_tensors
from .core import Batches, ModelOutput, Task, at_least_fp32

_NEGATIVES = 128


def clip_task(
    num_negatives: int = _NEGATIVES, seed: int = 0, logit_scale: float | None = None
) -> Task:
    """Return the task of image-text pairs under CLIP's loss; see this module for f, Q and R.

    The model is Hugging Face's CLIPModel (a mapping is its keyword arguments); a module with
    encode_image and encode_text, called with the two halves of (images, texts); or one whose
    result is (image embeddings, text embeddings, ...). Embeddings need not be normalised. The scale
    is exp(model.logit_scale) unless given.

    Args:
        num_negatives: Training samples that stand for the batch, at least 2; all, where the
            training set has no more. Checkpoint m has its own, chosen by `seed` and m.
        seed: Chooses the sample.
        logit_scale: A fixed scale s for a model without the attribute logit_scale.
    """
    num_negatives = _check.integer("num_negatives", num_negatives, 2, 2**62)
    seed = _check.integer("seed", seed, 0, 2**64 - 1)
    if logit_scale is not None and not logit_scale > 0:
        raise ValueError(f"logit_scale: expected None or a positive number, got {logit_scale!r}")

    given = {"num_negatives": num_negatives, "seed": seed, "logit_scale": logit_scale}
    usual = {"num_negatives": _NEGATIVES, "seed": 0, "logit_scale": None}
    changed = ",".join(f"{name}={value}" for name, value in given.items() if value != usual[name])
    name = f"clip({changed})" if changed else "clip"
    return Task(name, _PairOutput(logit_scale), _PairSample(num_negatives, seed))


# No closures, so that equal tasks are equal and can be pickled.
@dataclass(frozen=True)
class _PairOutput:
    """The task's function."""

    logit_scale: float | None

    def __call__(
        self, model: Callable[..., Any], batch: Any, context: Mapping[str, Tensor], index: Tensor
    ) -> ModelOutput:
        image, text = _embeddings(model, batch)
        return clip_output(image, text, _scale(model, self.logit_scale, image), context, index)


@dataclass(frozen=True)
class _PairSample:
    """The task's prepare: embeddings of the `count` positions with the smallest hashes.

    A hash depends on the position, the checkpoint and the seed alone, so that neither batches nor
    the length of the data, which is not known before its end, matter.
    """

    count: int
    seed: int

    def __call__(
        self, model: Callable[..., Any], batches: Batches, checkpoint: int
    ) -> dict[str, Tensor]:
        return _sample_pairs(model, batches, checkpoint, self.count, self.seed)


def clip_output(
    image: Tensor, text: Tensor, scale: Tensor, context: Mapping[str, Tensor], index: Tensor
) -> ModelOutput:
    """Return f, Q and R of pairs.

    Args:
        image, text: [B, d], normalised.
        scale: s, a number.
        context: "positions" int64 [N] in the training set, "images" and "texts" [N, d].
        index: int64 [B], the pairs' positions in the training set, -1 for none.
    """
    own = index[:, None] == context["positions"]
    pair = scale * (image * text).sum(1)
    to_texts = (scale * image @ context["texts"].to(image.dtype).T).masked_fill(own, float("-inf"))
    to_images = (scale * text @ context["images"].to(text.dtype).T).masked_fill(own, float("-inf"))
    f_image = pair - to_texts.logsumexp(1)
    f_text = pair - to_images.logsumexp(1)
    missed = torch.sigmoid(-f_image), torch.sigmoid(-f_text)
    found = torch.sigmoid(f_image), torch.sigmoid(f_text)
    curvature = (missed[0] * found[0] + missed[1] * found[1]) / 2
    return ModelOutput(f_image + f_text, (missed[0] + missed[1]) / 2, curvature)


def _sample_pairs(
    model: Callable[..., Any], batches: Batches, checkpoint: int, count: int, seed: int
) -> dict[str, Tensor]:
    """Return the sample's "positions", "images" and "texts", as `clip_output` takes them."""
    kept: list[tuple[int, int, Tensor, Tensor]] = []  # (-hash, position, ...), largest hash first
    for start, batch in batches:
        positions = np.arange(start, start + batch_size(batch))
        hashes = _hashes(positions, checkpoint, seed)
        order = sorted(range(len(positions)), key=lambda i, h=hashes: h[i])[:count]  # type: ignore[misc]
        if len(kept) == count:
            order = [i for i in order if hashes[i] < -kept[0][0]]
        if not order:
            continue
        rows = map_tensors(lambda t, rows=order: t[torch.tensor(rows, device=t.device)], batch)  # type: ignore[misc]
        image, text = _embeddings(model, rows)
        for row, i in enumerate(order):
            entry = (-hashes[i], int(positions[i]), image[row].detach(), text[row].detach())
            if len(kept) < count:
                heapq.heappush(kept, entry)
            else:
                heapq.heappushpop(kept, entry)
    if len(kept) < 2:
        raise ValueError(
            f"train_loader: expected at least 2 samples for the task clip, got {len(kept)}"
        )
    kept.sort(key=lambda entry: entry[1])
    images = torch.stack([entry[2] for entry in kept])
    return {
        "positions": torch.tensor([entry[1] for entry in kept], device=images.device),
        "images": images,
        "texts": torch.stack([entry[3] for entry in kept]),
    }


def _hashes(positions: np.ndarray, checkpoint: int, seed: int) -> list[int]:
    """Return a 64-bit number for each position: half of Philox4x32-10 of (position, checkpoint).

    Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 4.3.
    """
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    position = positions.astype(np.uint64)
    x0, x1 = position & low, position >> shift
    x2, x3 = np.full_like(x0, checkpoint), np.zeros_like(x0)
    key0, key1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        product0, product1 = x0 * np.uint64(0xD2511F53), x2 * np.uint64(0xCD9E8D57)
        x0, x2 = (
            (product1 >> shift) ^ x1 ^ np.uint64(key0),
            (product0 >> shift) ^ x3 ^ np.uint64(key1),
        )
        x1, x3 = product1 & low, product0 & low
        key0, key1 = (key0 + 0x9E3779B9) & 0xFFFFFFFF, (key1 + 0xBB67AE85) & 0xFFFFFFFF
    return [
        int(high) << 32 | int(word) for word, high in zip(x0.tolist(), x1.tolist(), strict=True)
    ]


def _embeddings(model: Callable[..., Any], batch: Any) -> tuple[Tensor, Tensor]:
    """Return normalised embeddings of images and texts, [B, d] each, in fp32 at least."""
    if isinstance(batch, Mapping):
        result = model(**batch)
    elif isinstance(batch, (tuple, list)) and len(batch) == 2:
        if hasattr(model, "encode_image") and hasattr(model, "encode_text"):
            result = (model.encode_image(batch[0]), model.encode_text(batch[1]))
        else:
            result = model(*batch)
    else:
        raise ValueError(
            "batch: expected (images, texts) or a mapping of the model's arguments, got a "
            f"{type(batch).__name__}"
            + (f" of {len(batch)}" if isinstance(batch, (tuple, list)) else "")
        )
    found = _two_of(result)
    if found is None or found[0].dim() != 2 or found[0].shape != found[1].shape:
        raise TypeError(
            "model: expected image and text embeddings [B, d] as .image_embeds and .text_embeds "
            "or as the first two of its result, got "
            + (
                f"a {type(result).__name__}"
                if found is None
                else f"shapes {[list(part.shape) for part in found]}"
            )
        )
    image, text = (F.normalize(at_least_fp32(part), dim=1) for part in found)
    return image, text


def _two_of(result: Any) -> tuple[Tensor, Tensor] | None:
    """Return the two embeddings that a model's result holds."""
    for names in (("image_embeds", "text_embeds"), ("image_features", "text_features")):
        if isinstance(result, Mapping):
            parts = [result.get(name) for name in names]
        else:
            parts = [getattr(result, name, None) for name in names]
        if all(isinstance(part, Tensor) for part in parts):
            return parts[0], parts[1]  # type: ignore[return-value]
    if isinstance(result, (tuple, list)) and len(result) >= 2:
        image, text = result[:2]
        if isinstance(image, Tensor) and isinstance(text, Tensor):
            return image, text
    return None


def _scale(model: Callable[..., Any], given: float | None, image: Tensor) -> Tensor:
    if given is not None:
        return torch.tensor(given, dtype=image.dtype, device=image.device)
    scale = getattr(model, "logit_scale", None)
    if not isinstance(scale, Tensor) or scale.numel() != 1:
        raise TypeError(
            "model: expected a parameter logit_scale, the logarithm of the scale (or "
            f"clip_task(logit_scale=...)), got {'none' if scale is None else scale!r}"
        )
    return at_least_fp32(scale).reshape(()).exp()
