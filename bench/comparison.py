"""Methods beside each other: LDS of each, and how far one is above the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from measure import print_table
from trak_ext.evaluation import lds, lds_difference


def compare(
    scores: dict[str, Tensor], masks: Tensor, outputs: Tensor, ours: str
) -> list[dict[str, Any]]:
    """Return a row a method: its LDS, and how far `ours` is above it, with intervals."""
    rows = []
    for name, value in scores.items():
        own = lds(value, masks, outputs)
        row: dict[str, Any] = {
            "method": name,
            "lds": own.mean,
            "interval_targets": own.interval_targets,
            "interval_subsets": own.interval_subsets,
        }
        if name != ours:
            gap = lds_difference(scores[ours], value, masks, outputs)
            row |= {
                "difference": gap.mean,
                "difference_targets": gap.interval_targets,
                "difference_subsets": gap.interval_subsets,
                "excludes_0": gap.a_is_better,
            }
        rows.append(row)
    return rows


def print_rows(title: str, rows: list[dict[str, Any]], ours: str) -> None:
    def span(pair: Sequence[float] | None) -> str:
        return "" if pair is None else f"{pair[0]:.3f} to {pair[1]:.3f}"

    header = ["method", "LDS", "over targets", "over subsets", f"{ours} less it"]
    header += ["over targets", "over subsets"]
    table = [
        [
            row["method"],
            f"{row['lds']:.3f}",
            span(row["interval_targets"]),
            span(row["interval_subsets"]),
            f"{row['difference']:.3f}" if "difference" in row else "",
            span(row.get("difference_targets")),
            span(row.get("difference_subsets")),
        ]
        for row in rows
    ]
    print_table(title, header, table)
