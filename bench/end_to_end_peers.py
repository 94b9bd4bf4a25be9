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

import argparse
import importlib
import importlib.metadata
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, default_collate

from end_to_end_models import make
from measure import median_ratio, medians, print_table, spent
from trak_ext import Attributor

OURS = "trak_ext"
OUR_BATCH = 64
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


# --- measuring ------------------------------------------------------------------------------------


def run(
    contender: str, model_name: str, samples: int, targets: int, batch: int, proj_dim: int
) -> tuple[Tensor, dict[str, float]]:
    """Return a contender's scores [samples, targets], and what they took."""
    torch.set_num_threads(1)
    model, task, rows = make(model_name, samples + targets)
    norm = gradient_norm(model, rows[:2])
    setting = Setting(model, task, rows[:samples], rows[samples:], batch, proj_dim, norm)
    module = PEERS.get(contender.split(",")[0])
    if module is not None:
        importlib.import_module(module)
    scores, took = spent(partial(CONTENDERS[contender], setting))
    assert scores.shape == (samples, targets), (contender, scores.shape)
    return scores, took


def run_apart(*arguments: str | int) -> tuple[Tensor, dict[str, float]]:
    """As `run`, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "scores.pt")
        command = [sys.executable, __file__, path, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{arguments}: {done.stderr}")
        return torch.load(path), json.loads(done.stdout.splitlines()[-1])


def spearman(a: Tensor, b: Tensor) -> float:
    """Return the rank correlation over samples of scores [n, t], its mean over targets."""
    ranks = [scores.argsort(0).argsort(0).double() for scores in (a, b)]
    centred = [rank - rank.mean(0) for rank in ranks]
    cosines = (centred[0] * centred[1]).sum(0) / (centred[0].norm(dim=0) * centred[1].norm(dim=0))
    return float(cosines.mean())


def compare(
    contenders: dict[str, int], model: str, samples: int, targets: int, repeats: int, proj_dim: int
) -> list[dict[str, Any]]:
    """Return medians for contenders, each with its batch size, in turn on the same samples."""
    scores: dict[str, Tensor] = {}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, batch in contenders.items():
            scores[name], took = run_apart(name, model, samples, targets, batch, proj_dim)
            runs[name].append(took)
    walls = {name: [took["wall"] for took in these] for name, these in runs.items()}
    return [
        {
            "name": name,
            "samples": samples,
            "batch": contenders[name],
            **medians(these),
            "ratio": median_ratio(walls[name], walls[OURS]),
            "spearman": spearman(scores[name], scores[OURS]),
            "runs": these,
        }
        for name, these in runs.items()
    ]


def fastest_batch(
    contender: str, model: str, samples: int, targets: int, batches: Sequence[int], proj_dim: int
) -> tuple[int, dict[int, float]]:
    """Return the batch size of the fastest of one run of each, and the seconds of each."""
    sizes = sorted({min(batch, samples) for batch in batches})
    if len(sizes) == 1:
        return sizes[0], {}
    seconds = {
        size: run_apart(contender, model, samples, targets, size, proj_dim)[1]["wall"]
        for size in sizes
    }
    return min(seconds, key=lambda size: seconds[size]), seconds


def measure(args: argparse.Namespace, proj_dim: int) -> dict[str, Any]:
    """Measure and print the contenders on each model."""
    installed = []
    for peer in args.peers:
        if version(peer) is None:
            print(f"{peer} is left out: it is not installed")
        else:
            installed.append(peer)
    rows: dict[str, Any] = {}
    for model in args.models:
        # By the number of samples: peers of one group are compared in the same turns.
        groups: dict[int, dict[str, int]] = {args.samples: {}}
        tried: dict[str, dict[int, float]] = {}
        for name in contenders(installed, model):
            if name.startswith("kronfluence"):
                batch, tried[name] = fastest_batch(
                    name, model, args.samples, args.targets, args.batches, proj_dim
                )
                groups[args.samples][name] = batch
            else:
                batch = min(args.peer_batch, max(args.peer_samples, args.targets))
                groups.setdefault(args.peer_samples, {})[name] = batch
        found = []
        for samples, group in groups.items():
            ours = {name: OUR_BATCH for name in CONTENDERS if name.startswith(OURS)}
            found += compare(
                {**ours, **group}, model, samples, args.targets, args.repeats, proj_dim
            )
        rows[model] = {"contenders": found, "batches_tried": tried}
        print_table(
            f"{model}: to scores of {args.targets} targets, proj_dim {proj_dim}, one thread",
            [
                "",
                "samples",
                "batch",
                "s",
                "/ trak_ext",
                "user s",
                "system s",
                "grew by MiB",
                "rank",
            ],
            table(found),
        )
    print("\nrank: mean over targets of the rank correlation with trak_ext's scores")
    return rows


def contenders(installed: Sequence[str], model: str) -> list[str]:
    """Return what of the installed peers is run on a model."""
    found = [name for name in CONTENDERS if name.split(",")[0] in installed]
    return [name for name in found if "," not in name or model == "gpt2"]


def table(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    return [
        [
            row["name"],
            str(row["samples"]),
            str(row["batch"]),
            f"{row['wall']:.2f}",
            f"{row['ratio']:.2f}",
            f"{row['user']:.2f}",
            f"{row['system']:.2f}",
            f"{row['peak_mib']:.0f}",
            f"{row['spearman']:.3f}",
        ]
        for row in rows
    ]


def _main() -> None:
    path, contender, model, *numbers = sys.argv[1:]
    scores, took = run(contender, model, *map(int, numbers))
    torch.save(scores, path)
    print(json.dumps(took))


if __name__ == "__main__":
    _main()
