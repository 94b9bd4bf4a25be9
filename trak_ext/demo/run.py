"""`trak-ext demo`: attribute digits, compare with retraining on subsets, write what was found.

The recipe is 1,200 training and 300 held-out digits of scikit-learn, a 64-64-10 network, 10
checkpoints, and 50 random halves of the training set with 5 networks each, the truth
that the linear datamodeling score of Park et al. 2023 compares with.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from .. import evaluation, report
from ..attribution.attributor import Attributor
from ..baselines import GradientProduct
from ..kernels.runtime import build_info
from ..kernels.score_pass import TopK
from . import digits, figure

TASK = "image_classification"
NUM_CHECKPOINTS = 10
NUM_SUBSETS = 50
MODELS_A_SUBSET = 5
SHOWN = 5  # proponents and opponents of each image in the picture and the report
IN_PICTURE, IN_REPORT = 7, 40  # images


class Stopwatch:
    """Seconds of each named stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the block."""
        begin = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - begin, 3)


def run(
    out: Path, *, seed: int = 1, kind: str = "rademacher", nnz: int = 1, progress: bool = True
) -> dict[str, Any]:
    """Run the demonstration; write a table, a picture, a report and its bundle into `out`.

    Args:
        out: Folder; made if it is not there.
        seed: Of the split, the subsets, every network and the projection.
        kind, nnz: Of the projection, as in `trak_ext.project`.
        progress: Whether to show progress bars.

    Returns:
        What results.json holds: "lds" (means by method), "intervals" (95 %, over targets and over
        subsets), "seconds" by stage, "settings" and "build".
    """
    watch = Stopwatch()
    # Missing extras, wrong arguments and a folder that cannot be should say so before training.
    figure.require_matplotlib()
    Attributor(digits.make_model(), TASK, kind=kind, nnz=nnz)
    split = digits.load_digits_split(seed=seed)
    out.mkdir(parents=True, exist_ok=True)
    num_train = len(split.train_labels)
    masks = digits.subset_masks(NUM_SUBSETS, num_train, seed=seed)

    with watch.stage("train_checkpoints"):
        everything = torch.arange(num_train, device="cpu").expand(NUM_CHECKPOINTS, -1)
        seeds = [seed * 10_000 + i for i in range(NUM_CHECKPOINTS)]
        stacked = digits.train_models(
            split.train_inputs,
            split.train_labels,
            everything,
            seeds,
            progress=progress,
            description="train checkpoints",
        )
        states = digits.unstack_states(stacked)
    with watch.stage("train_subsets"):
        members = masks.nonzero()[:, 1].view(NUM_SUBSETS, -1)
        members = members.repeat_interleave(MODELS_A_SUBSET, 0)
        seeds = [seed * 10_000 + 1_000 + i for i in range(len(members))]
        subset_states = digits.train_models(
            split.train_inputs,
            split.train_labels,
            members,
            seeds,
            progress=progress,
            description="train subset models",
        )
        outputs = digits.model_outputs(subset_states, split.test_inputs, split.test_labels)
        outputs = outputs.view(NUM_SUBSETS, MODELS_A_SUBSET, -1).mean(1)

    train_loader = DataLoader(TensorDataset(split.train_inputs, split.train_labels), batch_size=256)
    test_loader = DataLoader(TensorDataset(split.test_inputs, split.test_labels), batch_size=256)
    scores: dict[str, Tensor] = {}
    for name, checkpoints in (("trak_m1", states[:1]), ("trak_m10", states)):
        attributor = Attributor(
            digits.make_model(),
            TASK,
            checkpoints=checkpoints,
            seed=seed,
            kind=kind,
            nnz=nnz,
            progress=progress,
        )
        with watch.stage(f"fit_{name}"):
            attributor.fit(train_loader)
        with watch.stage(f"attribute_{name}"):
            scores[name] = attributor.attribute(test_loader)
    with watch.stage("baselines"):
        for name, checkpoints in (("grad_dot_m1", states[:1]), ("grad_dot", states)):
            baseline = GradientProduct(
                digits.make_model(), TASK, checkpoints=checkpoints, progress=progress
            )
            baseline.fit(train_loader)
            scores[name] = baseline.attribute(test_loader)
        generator = torch.Generator("cpu").manual_seed(seed)
        shape = scores["grad_dot"].shape
        scores["random"] = torch.randn(shape, generator=generator, device="cpu")
    with watch.stage("evaluate"):
        lds = {name: evaluation.lds(value, masks, outputs) for name, value in scores.items()}

    with watch.stage("figure"):
        logits = torch.func.functional_call(digits.make_model(), states[0], (split.test_inputs,))
        predictions = logits.argmax(1)
        shown = figure.choose_targets(split.test_labels, predictions, IN_REPORT)
        shown_loader = DataLoader(
            TensorDataset(split.test_inputs[shown], split.test_labels[shown]), batch_size=256
        )
        proponents = attributor.attribute(shown_loader, top_k=SHOWN)
        opponents = attributor.attribute(shown_loader, top_k=SHOWN, largest=False)
        pictured = shown[:IN_PICTURE]
        figure.plot_attributions(
            out / "attributions.png",
            split.images(split.test_inputs[pictured]),
            split.test_labels[pictured],
            split.images(split.train_inputs),
            split.train_labels,
            TopK(*(part[:IN_PICTURE] for part in proponents)),
            TopK(*(part[:IN_PICTURE] for part in opponents)),
            test_predictions=predictions[pictured],
        )

    results = {
        "lds": {name: lds[name].mean for name in ("trak_m1", "trak_m10", "grad_dot", "random")},
        "intervals": {
            name: {"targets": value.interval_targets, "subsets": value.interval_subsets}
            for name, value in lds.items()
        },
        "seconds": watch.seconds,
        "settings": {
            "seed": seed,
            "kind": kind,
            "nnz": nnz,
            **{name: attributor.settings[name] for name in ("proj_dim", "damping", "curvature")},
            "num_train": num_train,
            "num_targets": len(split.test_labels),
            "subsets": NUM_SUBSETS,
            "models_a_subset": MODELS_A_SUBSET,
            "test_accuracy": float((predictions == split.test_labels).float().mean()),
        },
        "build": build_info(),
    }
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    attributions = attributions_to_show(
        split, shown, predictions, proponents, opponents, lds, attributor
    )
    report.save_bundle(out / "bundle", attributions)
    report.write_report(out / "report.html", attributions)
    print(table(lds))
    print(f"\nwrote results.json, attributions.png, report.html and bundle/ into {out}")
    return results


def attributions_to_show(
    split: digits.DigitsSplit,
    shown: Tensor,
    predictions: Tensor,
    proponents: TopK,
    opponents: TopK,
    lds: dict[str, evaluation.LDS],
    attributor: Attributor,
) -> report.Attributions:
    """Return what the report shows of the test digits `shown` (indices)."""
    train_images = 1 - split.images(split.train_inputs)  # dark ink on white
    test_images = 1 - split.images(split.test_inputs)
    targets = [
        report.Item(
            test_images[i],
            label=int(split.test_labels[i]),
            prediction=int(predictions[i]),
            id=f"Test digit {i}",
        )
        for i in shown.tolist()
    ]
    return report.Attributions(
        targets,
        proponents,
        opponents,
        lambda i: report.Item(train_images[i], label=int(split.train_labels[i])),
        num_train=len(split.train_labels),
        note="Handwritten digits of 8 × 8 pixels from scikit-learn, and a network with one hidden "
        f"layer, trained {NUM_CHECKPOINTS} times. The first targets are ones that it gets wrong.",
        lds={
            f"TRAK, {NUM_CHECKPOINTS} checkpoints": lds["trak_m10"],
            "TRAK, 1 checkpoint": lds["trak_m1"],
            f"gradient product, {NUM_CHECKPOINTS} checkpoints": lds["grad_dot"],
            "random": lds["random"],
        },
        target_lds=lds["trak_m10"].per_target[shown],
        settings=attributor.settings,
        damping=attributor.damping_,
        fingerprint=attributor.fingerprint,
    )


def table(lds: dict[str, evaluation.LDS]) -> str:
    """Return the results as text: a row a method, with both 95 % intervals."""
    rows = [
        ("TRAK (this)", 1, lds["trak_m1"]),
        ("TRAK (this)", 10, lds["trak_m10"]),
        ("gradient product", 1, lds["grad_dot_m1"]),
        ("gradient product", 10, lds["grad_dot"]),
        ("random", "-", lds["random"]),
    ]
    lines = [
        "\nLinear datamodeling score on digits (rank correlation with retraining; 1 is perfect)\n",
        f"{'method':<18}{'M':>3}  {'LDS':>6}  {'95 % over targets':>18}  {'95 % over subsets':>18}",
    ]
    for name, checkpoints, value in rows:
        spans = [
            f"{low:.3f} to {high:.3f}"
            for low, high in (value.interval_targets, value.interval_subsets)
        ]
        lines.append(
            f"{name:<18}{checkpoints:>3}  {value.mean:6.3f}  {spans[0]:>18}  {spans[1]:>18}"
        )
    return "\n".join(lines)
