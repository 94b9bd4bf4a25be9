"""What the kind of projection does to the linear datamodeling score (LDS), on several settings.

    python bench/accuracy_kinds.py            # docs/accuracy.md's table, an hour on one core
    python bench/accuracy_kinds.py --quick    # the MLP alone, one split

Every kind projects the same gradients of the same checkpoints; differences are from Rademacher
features in fp32, paired over targets and subsets. The splits had no part in any choice.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from accuracy_estimators import attribute, attribute_dual
from accuracy_settings import SETTINGS, Measured, Projection, features, parse_arguments, train
from measure import print_table, write_json
from trak_ext.evaluation import lds, lds_difference

SPLITS = (31, 32, 33)
PROJ_DIMS = (512, 2048, 8192)
NUM_CHECKPOINTS = (1, 10)
KINDS = {
    "rademacher": {},
    "rademacher, medium": {"precision": "medium"},
    "sjlt, nnz 1": {"kind": "sjlt"},
    "sjlt, nnz 2": {"kind": "sjlt", "nnz": 2},
    "sjlt, nnz 4": {"kind": "sjlt", "nnz": 4},
}


def scores_of(measured: Measured, num_checkpoints: int) -> Tensor:
    num_train, proj_dim = measured.train.shape[1:]
    if proj_dim > num_train:
        return attribute_dual(measured, num_checkpoints)
    return attribute(measured, num_checkpoints=num_checkpoints)


def compare(found: list[Measured], num_checkpoints: int, resamples: int) -> list[dict[str, Any]]:
    """Return a row for each kind, given its features in the order of KINDS."""
    truth = (found[0].masks, found[0].outputs)
    scores = [scores_of(measured, num_checkpoints) for measured in found]
    rows = []
    for kind, own in zip(KINDS, scores, strict=True):
        less = lds_difference(own, scores[0], *truth, num_resamples=resamples)
        rows.append(
            {
                "num_checkpoints": num_checkpoints,
                "kind": kind,
                "lds": lds(own, *truth, num_resamples=1).mean,
                "difference": less.mean,
                "targets": less.interval_targets,
                "subsets": less.interval_subsets,
            }
        )
    return rows


def rows_of(names: list[str], splits: list[int], resamples: int) -> list[dict[str, Any]]:
    rows = []
    for name in names:
        for split in splits:
            begin = time.perf_counter()
            trained = train(SETTINGS[name], split=split, halves=(False,))
            for proj_dim in PROJ_DIMS:
                kinds = [Projection(proj_dim, **how) for how in KINDS.values()]  # type: ignore[arg-type]
                found = features(trained, False, kinds)
                for num_checkpoints in NUM_CHECKPOINTS:
                    compared = compare(found, num_checkpoints, resamples)
                    rows += [
                        {"setting": name, "split": split, "proj_dim": proj_dim, **row}
                        for row in compared
                    ]
            print(f"{name}, split {split}: {time.perf_counter() - begin:.0f} s", flush=True)
    return rows


def mean_with_half_width(rows: list[dict[str, Any]]) -> tuple[float, float]:
    """Return the mean difference over splits, and half of the wider 95 % interval of that mean."""
    mean = sum(row["difference"] for row in rows) / len(rows)
    widths = []
    for kind in ("targets", "subsets"):
        squares = sum(((row[kind][1] - row[kind][0]) / 2) ** 2 for row in rows)
        widths.append(squares**0.5 / len(rows))
    return mean, max(widths)


def table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return a header, and a row for each setting, number of checkpoints and proj_dim."""
    lines = []
    keys = ("setting", "num_checkpoints", "proj_dim")
    for key in dict.fromkeys(tuple(row[name] for name in keys) for row in rows):
        chosen = [row for row in rows if tuple(row[name] for name in keys) == key]
        cells = [f"{key[0]}, M = {key[1]}, k = {key[2]}"]
        for kind in KINDS:
            of_kind = [row for row in chosen if row["kind"] == kind]
            if kind == "rademacher":
                cells.append(f"{sum(row['lds'] for row in of_kind) / len(of_kind):.3f}")
            else:
                mean, width = mean_with_half_width(of_kind)
                cells.append(f"{mean:+.3f} ± {width:.3f}")
        lines.append(cells)
    return ["LDS of rademacher, and the difference of", *list(KINDS)], lines


def main() -> None:
    args = parse_arguments(__doc__.splitlines()[0], SPLITS, quick=["mlp"])
    torch.set_num_threads(1)
    rows = rows_of(args.settings, args.splits, args.resamples)
    print_table(f"LDS by kind, mean of splits {args.splits}", *table(rows))
    write_json(args.json, "accuracy_kinds", {"splits": args.splits}, rows)


if __name__ == "__main__":
    main()
