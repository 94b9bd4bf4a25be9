"""The offline experiment: scikit-learn digits, a small MLP, and subset models trained side by side.

Attribution quality can so be measured anywhere in seconds, without a download: the images come
inside scikit-learn (``pip install trak-ext[demo]``), and `train_models` trains hundreds of networks
at once by mapping one training step over their stacked parameters (`torch.func.vmap`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from tqdm import tqdm

from .. import _check
from ..tasks import classification_output

IMAGE_SIDE = 8  # pixels
MAX_INTENSITY = 16.0  # the data set's pixels are counts 0..16


class DigitsSplit(NamedTuple):
    """Training and held-out digits; inputs are intensities in [0, 1] less `mean`, fp32."""

    train_inputs: Tensor  # [n, 64]
    train_labels: Tensor  # [n], int64 in 0..9
    test_inputs: Tensor  # [t, 64]
    test_labels: Tensor  # [t], int64 in 0..9
    mean: Tensor  # [64], the training set's mean intensity of each pixel

    def images(self, inputs: Tensor) -> Tensor:
        """Undo the centring: inputs [b, 64] to pictures [b, 8, 8] with intensities in [0, 1]."""
        return (inputs + self.mean).clamp(0.0, 1.0).reshape(-1, IMAGE_SIDE, IMAGE_SIDE)


def load_digits_split(num_train: int = 1200, num_test: int = 300, *, seed: int = 0) -> DigitsSplit:
    """Draw disjoint training and test sets from scikit-learn's 1,797 digits.

    Pixels are divided by 16 and centred by the training set's mean. The same seed gives the same
    split.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: num_train below 1, num_test below 0, or more samples than there are.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "load_digits_split: expected scikit-learn, which `pip install trak-ext[demo]` brings, "
            f"got {error}"
        ) from error

    pixels, digits = load_digits(return_X_y=True)
    num_train = _check.integer("num_train", num_train, 1, len(pixels))
    num_test = _check.integer("num_test", num_test, 0, len(pixels) - num_train)
    order = torch.randperm(len(pixels), generator=_generator(seed), device="cpu")
    inputs = torch.from_numpy(pixels).float().div(MAX_INTENSITY)[order]
    labels = torch.from_numpy(digits).long()[order]
    mean = inputs[:num_train].mean(0)
    inputs = inputs - mean
    test = slice(num_train, num_train + num_test)
    return DigitsSplit(inputs[:num_train], labels[:num_train], inputs[test], labels[test], mean)


def make_model() -> nn.Module:
    """A multilayer perceptron 64-64-10 with a ReLU, initialised from torch's global generator."""
    return nn.Sequential(nn.Linear(IMAGE_SIDE**2, 64), nn.ReLU(), nn.Linear(64, 10))


def subset_masks(num_subsets: int, num_train: int, *, alpha: float = 0.5, seed: int = 0) -> Tensor:
    """Draw random training subsets of equal size.

    Returns:
        Masks [num_subsets, num_train], bool, each row with exactly round(alpha · num_train) ones.
        `masks.nonzero()[:, 1].view(m, -1)` are the index lists that `train_models` takes.

    Raises:
        ValueError: a negative count, or alpha outside [0, 1].
    """
    num_subsets = _check.integer("num_subsets", num_subsets, 0)
    num_train = _check.integer("num_train", num_train, 0)
    alpha = _check.share("alpha", alpha)
    generator = _generator(seed)
    masks = torch.zeros((num_subsets, num_train), dtype=torch.bool, device="cpu")
    for row in masks:
        order = torch.randperm(num_train, generator=generator, device="cpu")
        row[order[: round(alpha * num_train)]] = True
    return masks


def train_models(
    inputs: Tensor,
    labels: Tensor,
    subsets: Tensor,
    seeds: Sequence[int],
    *,
    model_factory: Callable[[], nn.Module] = make_model,
    epochs: int = 30,
    batch_size: int = 64,
    lr: float = 0.1,
    momentum: float = 0.9,
    weight_decay: float = 1e-3,
    models_at_once: int = 64,
    progress: bool = False,
    description: str = "training",
) -> dict[str, Tensor]:
    """Train one model per row of `subsets`, many at once, by stochastic gradient descent.

    Each model minimises the mean cross-entropy on its own samples with torch.optim.SGD's update
    (v ← momentum · v + gradient + weight_decay · θ; θ ← θ − lr_s · v) and a cosine schedule over
    the S steps, lr_s = lr · (1 + cos(π s / S)) / 2. Its seed decides its initial parameters and the
    order of its samples, so a model depends on its subset and its seed and not on its neighbours
    (to rounding: the shape of a batched product may change last bits).

    Args:
        inputs: [n, d], floating point.
        labels: [n], int64 class indices.
        subsets: [num_models, s], int64 indices into the n samples, one row per model; with s = 0
            the models stay as initialised.
        seeds: one per model.
        model_factory: makes an untrained model from torch's global generator (whose state is kept).
        epochs, batch_size, lr, momentum, weight_decay: the recipe; an epoch's last batch holds what
            is left.
        models_at_once: models stepped together; bounds memory and keeps their state in cache.
        progress, description: whether to show a bar of models · epochs, and its label.

    Returns:
        Stacked parameters: name → [num_models, *shape], detached. `unstack_states` splits them.

    Raises:
        TypeError, ValueError: shapes or dtypes that do not fit, or indices outside the n samples.
    """
    labels = _checked_labels(inputs, labels)
    subsets = _check.indices("subsets", subsets, 2, len(inputs))
    if len(subsets) == 0 or len(seeds) != len(subsets):
        raise ValueError(
            f"seeds: expected at least one, and one per row of subsets ({len(subsets)}), got "
            f"{len(seeds)}"
        )
    batch_size = _check.integer("batch_size", batch_size, 1)
    models_at_once = _check.integer("models_at_once", models_at_once, 1)

    model = _meta_model(model_factory)

    def loss(parameters: dict[str, Tensor], batch: Tensor, targets: Tensor) -> Tensor:
        logits = functional_call(model, parameters, (batch,))
        return nn.functional.cross_entropy(logits, targets)

    gradients = vmap(grad(loss))
    num_steps = epochs * math.ceil(subsets.shape[1] / batch_size)
    schedule = [0.5 * lr * (1.0 + math.cos(math.pi * s / num_steps)) for s in range(num_steps)]
    hidden = None if progress else True  # None: where stderr is no terminal
    bar = tqdm(total=len(subsets) * epochs, desc=description, unit=" epochs", disable=hidden)

    def train_together(subsets: Tensor, seeds: Sequence[int]) -> dict[str, Tensor]:
        """Train as many models in step with each other as there are rows."""
        parameters = _initial_parameters(model_factory, seeds)
        velocity = {name: torch.zeros_like(value) for name, value in parameters.items()}
        generators = [_generator(seed) for seed in seeds]
        size, rates = subsets.shape[1], iter(schedule)
        for _ in range(epochs):
            shuffles = [torch.randperm(size, generator=g, device="cpu") for g in generators]
            order = subsets.gather(1, torch.stack(shuffles).to(subsets.device))  # [c, s]
            # An empty subset has no batch: the mean loss would be NaN.
            for index in order.split(batch_size, dim=1) if size else ():  # [c, b]
                rate = next(rates)
                step = gradients(parameters, inputs[index], labels[index])
                for name, value in parameters.items():
                    v = velocity[name].mul_(momentum)
                    v.add_(step[name]).add_(value, alpha=weight_decay)
                    value.sub_(v, alpha=rate)
            bar.update(len(subsets))
        return parameters

    trained = [
        train_together(subsets[start : start + models_at_once], seeds[start:][:models_at_once])
        for start in range(0, len(subsets), models_at_once)
    ]
    bar.close()
    return {name: torch.cat([part[name] for part in trained]) for name in trained[0]}


def unstack_states(states: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Split stacked parameters, name → [num_models, *shape], into a state dict for each model."""
    num_models = _num_models(states)
    return [{name: value[i].clone() for name, value in states.items()} for i in range(num_models)]


def model_outputs(
    states: Mapping[str, Tensor],
    inputs: Tensor,
    labels: Tensor,
    *,
    model_factory: Callable[[], nn.Module] = make_model,
) -> Tensor:
    """The classification output f = log(p_y / (1 − p_y)) of every model on every sample.

    Args:
        states: as `train_models` returns them.
        inputs, labels: [t, d] and [t].
        model_factory: makes a model of the states' architecture.

    Returns:
        Outputs [num_models, t] in the parameters' dtype.
    """
    labels = _checked_labels(inputs, labels)
    _num_models(states)
    model = _meta_model(model_factory)

    def outputs(state: dict[str, Tensor]) -> Tensor:
        return classification_output(functional_call(model, state, (inputs,)), labels).output

    with torch.no_grad():
        found: Tensor = vmap(outputs)(dict(states))
    return found


def outputs_after_retraining(
    split: tuple[Tensor, ...],
    masks: Tensor,
    models_per_subset: int,
    first_seed: int,
    *,
    model_factory: Callable[[], nn.Module] = make_model,
    **recipe: Any,
) -> Tensor:
    """What networks say of the test samples that were trained on subsets: mean outputs [m, t].

    Args:
        split: training inputs and labels, test inputs and labels, as `DigitsSplit` begins.
        masks: subsets of one size [m, n], bool.
        models_per_subset: networks whose outputs are averaged.
        first_seed: of the first network; the others have the next ones.
        model_factory, recipe: as in `train_models`.
    """
    inputs, labels, test_inputs, test_labels = split[:4]
    members = masks.nonzero()[:, 1].view(len(masks), -1).repeat_interleave(models_per_subset, 0)
    seeds = range(first_seed, first_seed + len(members))
    states = train_models(inputs, labels, members, seeds, model_factory=model_factory, **recipe)
    outputs = model_outputs(states, test_inputs, test_labels, model_factory=model_factory)
    return outputs.view(len(masks), models_per_subset, -1).mean(1)


def _initial_parameters(
    model_factory: Callable[[], nn.Module], seeds: Sequence[int]
) -> dict[str, Tensor]:
    """One freshly seeded model for each seed, stacked: name → [len(seeds), *shape]."""
    models = []
    with torch.random.fork_rng(devices=[]):
        for seed in seeds:
            torch.manual_seed(seed)
            models.append(model_factory())
    parameters, buffers = stack_module_state(models)
    if buffers:
        raise ValueError(f"model_factory: expected a model without buffers, got {sorted(buffers)}")
    return {name: value.detach().clone() for name, value in parameters.items()}


def _meta_model(model_factory: Callable[[], nn.Module]) -> nn.Module:
    """The architecture alone, for `functional_call`; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        return model_factory().to("meta")


def _checked_labels(inputs: Tensor, labels: Tensor) -> Tensor:
    _check.tensor("inputs", inputs, 2)
    _check.tensor("labels", labels, 1, "integer")
    _check.shape_is("labels", labels, (len(inputs),), "one per input")
    return labels.long()


def _num_models(states: Mapping[str, Tensor]) -> int:
    lengths = {len(value) for value in states.values()}
    if len(lengths) != 1:
        raise ValueError(
            f"states: expected parameters stacked along a leading axis of one length, got lengths "
            f"{sorted(lengths)}"
        )
    return lengths.pop()


def _generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)
