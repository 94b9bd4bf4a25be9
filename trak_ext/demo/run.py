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
from . import digits, figure

TASK = "image_classification"
NUM_CHECKPOINTS = 10
NUM_SUBSETS, MODELS_PER_SUBSET = 50, 5
SHOWN = 5  # proponents and opponents of each image in the picture and the report
IN_REPORT = 40  # images
# Methods by their name in results.json: what people call them, and of how many checkpoints.
METHODS = {
    "trak_m1": ("TRAK", 1),
    "trak_m10": ("TRAK", NUM_CHECKPOINTS),
    "grad_dot_m1": ("gradient product", 1),
    "grad_dot": ("gradient product", NUM_CHECKPOINTS),
    "random": ("random", None),
}


def run(
    out: Path, *, seed: int = 1, kind: str = "sjlt", nnz: int = 1, progress: bool = True
) -> dict[str, Any]:
    """Run the demonstration; write a table, a picture, a report and its bundle into `out`.

    Args:
        out: Folder; made if it is not there.
        seed: Of the split, the subsets, every network and the projection.
        kind, nnz: Of the projection, as in `trak_ext.project`.
        progress: Whether to say what is being done and to show progress bars.

    Returns:
        What results.json holds: "lds" (means by method), "intervals" (95 %, over targets and over
        subsets), "seconds" by step, "settings" and "build".
    """
    # Missing extras, wrong arguments and a folder that cannot be should say so before training.
    figure.require_matplotlib()
    choice: dict[str, Any] = {"seed": seed, "kind": kind, "nnz": nnz, "progress": progress}
    Attributor(digits.make_model(), TASK, **choice)
    split = digits.load_digits_split(seed=seed)
    out.mkdir(parents=True, exist_ok=True)
    num_train, num_test = len(split.train_labels), len(split.test_labels)
    first_seed = seed * 10_000
    seconds: dict[str, float] = {}

    def say(text: str) -> None:
        if progress:
            print(text, flush=True)

    @contextmanager
    def step(name: str, text: str) -> Iterator[None]:
        """Say what the block does and how long it took."""
        say(f"{text} ...")
        begin = time.perf_counter()
        yield
        seconds[name] = round(time.perf_counter() - begin, 3)
        say(f"  {seconds[name]:.1f} s")

    say("Which training digits made a network say this? Half a minute on two cores.\n")
    text = f"Train a small network on {num_train:,} digits, {NUM_CHECKPOINTS} times"
    with step("train_checkpoints", text):
        everything = torch.arange(num_train, device="cpu").expand(NUM_CHECKPOINTS, -1)
        seeds = range(first_seed, first_seed + NUM_CHECKPOINTS)
        stacked = digits.train_models(*split[:2], everything, seeds, progress=progress)
        states = digits.unstack_states(stacked)
    text = f"Train {NUM_SUBSETS * MODELS_PER_SUBSET} on {NUM_SUBSETS} random halves of the digits"
    with step("train_subsets", f"{text}: what leaving digits out really does"):
        masks = digits.subset_masks(NUM_SUBSETS, num_train, seed=seed)
        outputs = digits.outputs_after_retraining(
            split, masks, MODELS_PER_SUBSET, first_seed + 1_000, progress=progress
        )

    train_loader = _loader(split.train_inputs, split.train_labels)
    test_loader = _loader(split.test_inputs, split.test_labels)
    scores: dict[str, Tensor] = {}
    for name, checkpoints in (("trak_m1", states[:1]), ("trak_m10", states)):
        attributor = Attributor(digits.make_model(), TASK, checkpoints=checkpoints, **choice)
        with step(f"fit_{name}", f"{_method(name)}: features of the training digits"):
            attributor.fit(train_loader)
        with step(f"attribute_{name}", f"{_method(name)}: scores for {num_test} other digits"):
            scores[name] = attributor.attribute(test_loader)
    with step("baselines", "Gradient product and random scores, to compare with"):
        for name, checkpoints in (("grad_dot_m1", states[:1]), ("grad_dot", states)):
            baseline = GradientProduct(
                digits.make_model(), TASK, checkpoints=checkpoints, progress=progress
            )
            baseline.fit(train_loader)
            scores[name] = baseline.attribute(test_loader)
        generator = torch.Generator("cpu").manual_seed(seed)
        scores["random"] = torch.randn((num_train, num_test), generator=generator, device="cpu")
    with step("evaluate", "Compare scores with what retraining did"):
        lds = {name: evaluation.lds(scores[name], masks, outputs) for name in METHODS}
    with step("figure", "Draw the picture and write the report"):
        logits = torch.func.functional_call(digits.make_model(), states[0], (split.test_inputs,))
        predictions = logits.argmax(1)
        attributions = attributions_to_show(split, predictions, lds, attributor)
        figure.plot_attributions(out / "attributions.png", attributions)
        report.save_bundle(out / "bundle", attributions)
        report.write_report(out / "report.html", attributions)

    results = {
        "lds": {name: lds[name].mean for name in METHODS if name != "grad_dot_m1"},
        "intervals": {
            name: {"targets": value.interval_targets, "subsets": value.interval_subsets}
            for name, value in lds.items()
        },
        "seconds": seconds,
        "settings": {
            "seed": seed,
            "kind": kind,
            "nnz": nnz,
            **{name: attributor.settings[name] for name in ("proj_dim", "damping", "curvature")},
            "num_train": num_train,
            "num_targets": num_test,
            "subsets": NUM_SUBSETS,
            "models_a_subset": MODELS_PER_SUBSET,
            "test_accuracy": float((predictions == split.test_labels).float().mean()),
        },
        "build": build_info(),
    }
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(table(lds))
    print(f"\nwrote results.json, attributions.png, report.html and bundle/ into {out}")
    return results


def attributions_to_show(
    split: digits.DigitsSplit,
    predictions: Tensor,
    lds: dict[str, evaluation.LDS],
    attributor: Attributor,
) -> report.Attributions:
    """Return what the picture and the report show: some test digits, the wrong ones first."""
    shown = figure.choose_targets(split.test_labels, predictions, IN_REPORT)
    loader = _loader(split.test_inputs[shown], split.test_labels[shown])
    train_images, test_images = (  # dark ink on white
        1 - split.images(inputs) for inputs in (split.train_inputs, split.test_inputs)
    )

    def target(i: int) -> report.Item:
        label, prediction = int(split.test_labels[i]), int(predictions[i])
        return report.Item(test_images[i], None, label, prediction, id=f"Test digit {i}")

    return report.Attributions(
        [target(i) for i in shown.tolist()],
        attributor.attribute(loader, top_k=SHOWN),
        attributor.attribute(loader, top_k=SHOWN, largest=False),
        lambda i: report.Item(train_images[i], label=int(split.train_labels[i])),
        num_train=len(split.train_labels),
        note="Handwritten digits of 8 × 8 pixels from scikit-learn, and a network with one hidden "
        f"layer, trained {NUM_CHECKPOINTS} times. The first targets are ones that it gets wrong.",
        lds={_method(name): lds[name] for name in ("trak_m10", "trak_m1", "grad_dot", "random")},
        target_lds=lds["trak_m10"].per_target[shown],
        settings=attributor.settings,
        damping=attributor.damping_,
        fingerprint=attributor.fingerprint,
    )


def table(lds: dict[str, evaluation.LDS]) -> str:
    """Return the results as text: a row for each method, with both 95 % intervals."""
    lines = [
        "\nLinear datamodeling score on digits (rank correlation with retraining; 1 is perfect)\n",
        f"{'method':<18}{'M':>3}  {'LDS':>6}  {'95 % over targets':>18}  {'95 % over subsets':>18}",
    ]
    for name, (method, checkpoints) in METHODS.items():
        value = lds[name]
        shown = "TRAK (this)" if method == "TRAK" else method
        spans = "".join(
            f"  {f'{low:.3f} to {high:.3f}':>18}"
            for low, high in (value.interval_targets, value.interval_subsets)
        )
        lines.append(f"{shown:<18}{checkpoints or '-':>3}  {value.mean:6.3f}{spans}")
    return "\n".join(lines)


def _method(name: str) -> str:
    title, checkpoints = METHODS[name]
    if checkpoints is None:
        return title
    return f"{title}, {checkpoints} checkpoint{'s' if checkpoints > 1 else ''}"


def _loader(inputs: Tensor, labels: Tensor) -> DataLoader[Any]:
    return DataLoader(TensorDataset(inputs, labels), batch_size=256)
