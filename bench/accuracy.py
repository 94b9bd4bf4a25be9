"""What the estimator's options do to the linear datamodeling score (LDS), on several settings.

    python bench/accuracy.py            # docs/accuracy.md's table, minutes on one core
    python bench/accuracy.py --quick    # two settings, one split

Damping's rule was made on split 0 of digits, of digits with other recipes, and of texts; the
default splits here had no part in it.
"""

from __future__ import annotations

import time
from typing import Any

import torch

import accuracy_estimators
from accuracy_estimators import attribute, attribute_many
from accuracy_settings import SETTINGS, Measured, measure, parse_arguments
from measure import print_table, write_json
from trak_ext import soft_threshold
from trak_ext.evaluation import lds

PROJ_DIM = 512
SPLITS = (11, 12)
KEPT = 0.2  # of the samples, after soft-thresholding
OPTIONS = {
    "gradient product": accuracy_estimators.gradient_product,
    "damping 0": lambda x: attribute(x, damping=0.0, curvature="none", proj_dim=128),
    "damping 1": lambda x: attribute(x, damping=1.0, curvature="none"),
    "auto": lambda x: attribute(x, curvature="none"),
    "auto, curvature of each": lambda x: attribute(x, curvature="own"),
    "auto, mean curvature": attribute,
    "the same, k = 128": lambda x: attribute(x, proj_dim=128),
    "the same, 4 blocks of 128": lambda x: attribute(x, proj_dim=128, blocks=4),
    "the same, leverage": lambda x: attribute(x, leverage=True),
    "the same, M = 1": lambda x: attribute(x, num_checkpoints=1),
}


def scores_of(measured: Measured) -> dict[str, torch.Tensor]:
    found = {name: option(measured) for name, option in OPTIONS.items()}
    plain = found["auto, mean curvature"]
    found["the same, soft-threshold"] = soft_threshold(plain, keep=round(KEPT * len(plain)))
    for name, curvature in (("none", "none"), ("mean", "mean")):
        several = attribute_many(measured, list(accuracy_estimators.FIXED), curvature=curvature)
        judged = [
            lds(scores, measured.masks, measured.outputs, num_resamples=1).mean
            for scores in several
        ]
        best = max(range(len(judged)), key=judged.__getitem__)
        found[f"best fixed damping, curvature {name}"] = several[best]
    return found


def rows_of(settings: list[str], splits: list[int], resamples: int) -> list[dict[str, Any]]:
    rows = []
    for name in settings:
        for split in splits:
            begin = time.perf_counter()
            for half, measured in measure(SETTINGS[name], split=split, proj_dim=PROJ_DIM).items():
                for option, scores in scores_of(measured).items():
                    found = lds(scores, measured.masks, measured.outputs, num_resamples=resamples)
                    rows.append(
                        {
                            "setting": name,
                            "checkpoints": "halves" if half else "all data",
                            "split": split,
                            "option": option,
                            "lds": found.mean,
                            "targets": found.interval_targets,
                            "subsets": found.interval_subsets,
                        }
                    )
            print(f"{name}, split {split}: {time.perf_counter() - begin:.0f} s", flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return a header and rows of mean LDS over splits, an option a row, a setting a column."""
    columns = list(dict.fromkeys((row["setting"], row["checkpoints"]) for row in rows))
    lines = []
    for option in dict.fromkeys(row["option"] for row in rows):
        cells = [option]
        for column in columns:
            chosen = [
                row
                for row in rows
                if row["option"] == option and (row["setting"], row["checkpoints"]) == column
            ]
            cells.append(f"{sum(row['lds'] for row in chosen) / len(chosen):.3f}")
        lines.append(cells)
    half_widths = ["half width, 95 % over subsets"]
    for column in columns:
        widths = [
            (row["subsets"][1] - row["subsets"][0]) / 2
            for row in rows
            if row["option"] == "auto, mean curvature"
            and (row["setting"], row["checkpoints"]) == column
        ]
        half_widths.append(f"{sum(widths) / len(widths):.3f}")
    return ["option", *(f"{name}, {kind}" for name, kind in columns)], [*lines, half_widths]


def main() -> None:
    args = parse_arguments(__doc__.splitlines()[0], SPLITS, quick=["softmax", "mlp"])
    torch.set_num_threads(1)
    rows = rows_of(args.settings, args.splits, args.resamples)
    header, lines = table(rows)
    print_table(
        f"LDS, 10 checkpoints, proj_dim {PROJ_DIM}, mean of splits {args.splits}", header, lines
    )
    write_json(args.json, "accuracy", {"proj_dim": PROJ_DIM, "splits": args.splits}, rows)


if __name__ == "__main__":
    main()
