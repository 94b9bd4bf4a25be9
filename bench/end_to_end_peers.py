"""Peers of bench/end_to_end.py: from a model and its data to scores of targets.

Everybody gets the same model, training samples and targets, on one thread, and shall return scores
[n, t]. What is timed begins when these are there and the libraries are imported; what a library
does once in a process counts.

- kronfluence: EK-FAC with sampled labels, then pairwise scores, all targets in one query batch.
  The training loss is cross-entropy, the measurement minus the log odds, the damping its heuristic
  (None), with which its scores are nearer to the others'. It tracks all nn.Linear and nn.Conv2d;
  GPT-2's Conv1D become nn.Linear, as it asks for. "kronfluence, no head" leaves out GPT-2's last
  layer, whose weights are the embedding's.
- traker: TRAKer with its BasicProjector (normal, its choice on CPUs) in fp32; its default of fp16
  takes over ten times as long on a CPU.
- dattri: TRAKAttributor with its projection on CPUs (BasicProjector, normal).

traker and dattri take the same f and Q as trak_ext does. Where they run transformers under `vmap`,
the models' attention is "eager" and there is no padding mask: no text is padded, and vmap refuses
the mask. Their damping is the mean of the kernel's diagonal, estimated from two samples before the
clock: fewer samples than proj_dim leave a singular kernel.

What the rank correlations with trak_ext's scores can be at best is seen in "trak_ext rademacher",
which is the same method with another matrix.
"""

from __future__ import annotations

import importlib.metadata
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, default_collate

from trak_ext import Attributor

OURS = "trak_ext"
# What has to be installed, and what is imported before the clock.
PEERS = {
    "kronfluence": "kronfluence.analyzer",
    "traker": "trak",
    "dattri": "dattri.algorithm.trak",
}


@dataclass
class Setting:
    """What everybody is given."""

    model: nn.Module
    task: str
    train: list[Any]
    targets: list[Any]
    batch: int
    proj_dim: int
    # Mean squared norm of the gradients of f.
    gradient_norm: float

    @property
    def num_params(self) -> int:
        """The number of parameters that are differentiated."""
        return sum(parameter.numel() for parameter in self.model.parameters())


def version(name: str) -> str | None:
    """Return the version of a peer, if it is installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


# --- f and Q --------------------------------------------------------------------------------------


def log_odds(logits: Tensor, labels: Tensor) -> Tensor:
    """Return log(p/(1-p)) of the labelled classes [...]; of the next tokens [B, T-1] for texts."""
    if labels.dim() == 2:
        logits, labels = logits[:, :-1], labels[:, 1:]
    index = labels[..., None]
    others = logits.scatter(-1, index, float("-inf")).logsumexp(-1)
    return logits.gather(-1, index)[..., 0] - others


def predict(
    model: nn.Module, inputs: Tensor, weights: Any = None, mask: Tensor | None = None
) -> Tensor:
    """Return logits, with other weights where they are given."""
    masks = {} if mask is None else {"attention_mask": mask}
    if weights is None:
        found = model(inputs, **masks)
    else:
        found = functional_call(model, weights, (inputs,), masks)
    return found if isinstance(found, Tensor) else found.logits


def f_of_one(model: nn.Module, weights: Any, inputs: Tensor, label: Tensor) -> Tensor:
    """Return f of one sample: the sum of its log odds."""
    return log_odds(predict(model, inputs[None], weights), label[None]).sum()


def mean_probability(odds: Tensor) -> Tensor:
    """Return 1 - Q [B]: the probability of the label, or the mean over tokens."""
    return torch.sigmoid(odds).flatten(1).mean(1) if odds.dim() == 2 else torch.sigmoid(odds)


def as_tuples(rows: list[Any]) -> list[tuple[Tensor, Tensor]]:
    """Return (inputs, label) of samples."""
    return [(row["input_ids"], row["labels"]) if isinstance(row, dict) else row for row in rows]


@contextmanager
def plain_attention(model: nn.Module) -> Iterator[None]:
    """Have a transformers model compute attention by operations that vmap batches."""
    if not hasattr(model, "set_attn_implementation"):
        yield
        return
    usual = model.config._attn_implementation
    model.set_attn_implementation("eager")
    yield
    model.set_attn_implementation(usual)


def gradient_norm(model: nn.Module, rows: list[Any]) -> float:
    """Return the mean squared norm of the gradients of f, by vmap(grad)."""
    inputs, labels = default_collate(as_tuples(rows))
    weights = {name: value.detach() for name, value in model.named_parameters()}
    gradient = vmap(grad(partial(f_of_one, model)), in_dims=(None, 0, 0))
    with plain_attention(model):
        found = gradient(weights, inputs, labels)
    return sum(float(value.square().sum()) for value in found.values()) / len(rows)


# --- contenders -----------------------------------------------------------------------------------


def trak_ext(setting: Setting, kind: str | None = None) -> Tensor:
    attributor = Attributor(
        setting.model, setting.task, proj_dim=setting.proj_dim, kind=kind, progress=False
    )
    attributor.fit(DataLoader(setting.train, batch_size=setting.batch))
    return attributor.attribute(DataLoader(setting.targets, batch_size=setting.batch))


def linear_for_conv1d(model: nn.Module) -> None:
    """Put nn.Linear in the place of each of GPT-2's Conv1D."""
    from transformers.pytorch_utils import Conv1D

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Conv1D):
                linear = nn.Linear(*child.weight.shape)
                linear.weight = nn.Parameter(child.weight.detach().T.contiguous())
                linear.bias = child.bias
                setattr(parent, name, linear)


def kronfluence(setting: Setting, head: bool = True) -> Tensor:
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task

    modules = None

    class Losses(Task):
        def logits_and_labels(self, batch: Any, model: nn.Module) -> tuple[Tensor, Tensor]:
            if isinstance(batch, dict):
                mask = batch["attention_mask"]
                return predict(model, batch["input_ids"], mask=mask), batch["labels"]
            inputs, labels = batch
            return predict(model, inputs), labels

        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            logits, labels = self.logits_and_labels(batch, model)
            if labels.dim() == 2:
                logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            if sample:
                labels = logits.detach().softmax(-1).multinomial(1)[:, 0]
            return cross_entropy(logits, labels, reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return -log_odds(*self.logits_and_labels(batch, model)).sum()

        def get_influence_tracked_modules(self) -> list[str] | None:
            return modules

        def get_attention_mask(self, batch: Any) -> Tensor | None:
            return batch["attention_mask"] if isinstance(batch, dict) else None

    model = setting.model
    if setting.task == "causal_lm":
        linear_for_conv1d(model)
    if not head:
        modules = [
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and name != "lm_head"
        ]
    task = Losses()
    with tempfile.TemporaryDirectory() as folder:
        analyzer = Analyzer(
            "bench", prepare_model(model, task), task, cpu=True, disable_tqdm=True,
            output_dir=folder,
        )  # fmt: skip
        analyzer.fit_all_factors(
            "ekfac", setting.train, per_device_batch_size=setting.batch,
            factor_args=FactorArguments(strategy="ekfac"),
        )  # fmt: skip
        analyzer.compute_pairwise_scores(
            "scores", "ekfac", setting.targets, setting.train,
            per_device_query_batch_size=len(setting.targets),
            per_device_train_batch_size=setting.batch,
            score_args=ScoreArguments(damping_factor=None),
        )  # fmt: skip
        return analyzer.load_pairwise_scores("scores")["all_modules"].T


def traker(setting: Setting) -> Tensor:
    from trak import TRAKer
    from trak.modelout_functions import AbstractModelOutput

    class TextOutput(AbstractModelOutput):
        def __init__(self) -> None:
            pass

        @staticmethod
        def get_output(
            model: nn.Module, weights: Any, buffers: Any, inputs: Tensor, label: Tensor
        ) -> Tensor:
            return f_of_one(model, (weights, buffers), inputs, label)

        def get_out_to_loss_grad(
            self, model: nn.Module, weights: Any, buffers: Any, batch: Any
        ) -> Tensor:
            inputs, labels = batch
            odds = log_odds(predict(model, inputs, (weights, buffers)), labels)
            return (1 - mean_probability(odds)).detach()[:, None]

    train, targets = as_tuples(setting.train), as_tuples(setting.targets)
    images = setting.task == "image_classification"
    model, count = setting.model, len(train)
    with plain_attention(model), tempfile.TemporaryDirectory() as folder:
        method = TRAKer(
            model, setting.task if images else TextOutput(), count, save_dir=folder, device="cpu",
            proj_dim=setting.proj_dim, use_half_precision=False, logging_level="ERROR",
            # Its features are proj_dim / num_params as long as the gradients, squared norms taken.
            lambda_reg=count * setting.gradient_norm / setting.num_params,
        )  # fmt: skip
        method.load_checkpoint(model.state_dict(), model_id=0)
        for batch in DataLoader(train, batch_size=setting.batch):
            method.featurize(batch, num_samples=len(batch[0]))
        method.finalize_features()
        method.start_scoring_checkpoint("targets", model.state_dict(), 0, len(targets))
        for batch in DataLoader(targets, batch_size=setting.batch):
            method.score(batch, num_samples=len(batch[0]))
        return torch.from_numpy(method.finalize_scores("targets").copy())


def dattri(setting: Setting) -> Tensor:
    from dattri.algorithm.trak import TRAKAttributor
    from dattri.task import AttributionTask

    model = setting.model

    def f(weights: Any, sample: Sequence[Tensor]) -> Tensor:
        return f_of_one(model, weights, *sample)

    def probability(weights: Any, sample: Sequence[Tensor]) -> Tensor:
        inputs, label = sample
        return mean_probability(log_odds(predict(model, inputs[None], weights), label[None]))

    scale = len(setting.train) * setting.gradient_norm / setting.num_params
    method = TRAKAttributor(
        AttributionTask(f, model, model.state_dict()),
        probability,
        {"proj_dim": setting.proj_dim},
        regularization=scale / setting.proj_dim,
    )
    train, targets = as_tuples(setting.train), as_tuples(setting.targets)
    with plain_attention(model):
        method.cache(DataLoader(train, batch_size=setting.batch))
        return method.attribute(DataLoader(targets, batch_size=setting.batch)).detach()


CONTENDERS: dict[str, Callable[[Setting], Tensor]] = {
    "trak_ext": trak_ext,
    "trak_ext rademacher": partial(trak_ext, kind="rademacher"),
    "kronfluence": kronfluence,
    "kronfluence, no head": partial(kronfluence, head=False),
    "traker": traker,
    "dattri": dattri,
}
