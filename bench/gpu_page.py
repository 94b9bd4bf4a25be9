"""Write page.md, what docs/gpu.md shows of a GPU, from the JSON files of bench/gpu_check.sh.

python bench/gpu_page.py RESULTS
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def median(record: dict[str, Any]) -> float:
    """Return the median time of a record, in milliseconds."""
    return statistics.median(record["milliseconds"])


def ratio(record: dict[str, Any]) -> list[str]:
    """Return the cells of a time: itself, the floor and their ratio."""
    floor = record["floor"]
    return [
        f"{median(record):.2f}",
        *([f"{floor:.2f}", f"{median(record) / floor:.2f}"] if floor else ["", ""]),
    ]


def describe_ceilings(record: dict[str, Any]) -> str:
    """Return a sentence on what was measured on which device."""
    settings = record["settings"]
    ceilings = settings["ceilings"]
    return (
        f"{settings['device']}, {record['date']}: a bf16 product runs at "
        f"{ceilings['bf16_operations'] / 1e12:.0f} TFLOP/s and a copy at "
        f"{ceilings['bytes'] / 1e12:.2f} TB/s, both measured in the same run."
    )


def write_projection(record: dict[str, Any]) -> list[str]:
    """Return the part on projections."""
    settings, records = record["settings"], record["rows"]
    rows = []
    for r in records:
        batch, params, proj_dim = r["shape"]
        shape = f"({batch}, {params:.0e}, {proj_dim})".replace("e+0", "e")
        rows.append([r["name"], r.get("path", ""), shape, *ratio(r)])
    parts = [
        "## Projection",
        describe_ceilings(record),
        table(["projector", "path", "(B, P, k)", "ms", "floor, ms", "time / floor"], rows),
    ]
    if settings["same_bits"] is not None:
        parts.append(
            f"All paths gave the same bits on random fp32 gradients: {settings['same_bits']}."
        )
    parts.append("\n".join(f"- {line}" for line in settings["defaults"]))
    errors = [
        [e["path"], e["kind"], e["precision"], f"{e['error']:.1e}"] for e in settings["errors"]
    ]
    parts.append(table(["path", "kind", "precision", "norm of error / norm of result"], errors))
    parts.append(
        "Variance of ‖Rᵀx‖², in that of independent signs: "
        + ", ".join(f"{who} {value:.2f}" for who, value in settings["variance"].items())
        + "."
    )
    return parts


def write_scoring(record: dict[str, Any]) -> list[str]:
    """Return the part on scoring."""
    settings = record["settings"]
    rows = [[r["name"], *ratio(r)] for r in record["rows"]]
    return [
        "## Scoring",
        describe_ceilings(record)
        + f" n = {settings['samples']}, t = {settings['targets']}, k = {settings['proj_dim']} "
        "unless a line says otherwise.",
        table(["scoring", "ms", "floor, ms", "time / floor"], rows),
    ]


def main(results: Path) -> None:
    """Write what there is."""
    parts = []
    for name, write in (("projection", write_projection), ("scoring", write_scoring)):
        path = results / f"{name}.json"
        if path.exists():
            parts += write(json.loads(path.read_text()))
    summary = [line for line in (results / "summary.txt").read_text().splitlines() if line]
    parts += ["## Steps", "```\n" + "\n".join(summary) + "\n```"]
    (results / "page.md").write_text("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
