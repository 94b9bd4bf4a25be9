"""The numbers at the head of a report, and at its end how they came about, as HTML."""

from __future__ import annotations

import json
import math
from typing import Any

from .attributions import Attributions, LDSSummary
from .markup import escape

LONG = 90  # characters of a setting that stand open; a longer one unfolds


def facts(attributions: Attributions) -> str:
    """Return the headline numbers."""
    rows = [("Targets", f"{len(attributions.targets):,}", "")]
    if attributions.num_train is not None:
        rows.append(("Training samples", f"{attributions.num_train:,}", ""))
    if attributions.lds:
        name, value = next(iter(attributions.lds.items()))
        small = f"95 %: {_interval(value.interval_subsets)}"
        rows.append((f"LDS, {name}", _number(value.mean), small))
    cells = "".join(
        f"<div><dt>{escape(key)}</dt><dd>{escape(number)}"
        + (f" <small>{escape(small)}</small>" if small else "")
        + "</dd></div>"
        for key, number, small in rows
    )
    return f'<dl class="facts">{cells}</dl>'


def provenance(attributions: Attributions) -> str:
    """Return LDS with intervals, settings and fingerprint, as far as they are known."""
    parts = []
    if attributions.lds:
        parts.append(_lds_table(attributions.lds))
    if attributions.settings or attributions.fingerprint is not None:
        parts.append(_settings(attributions.settings, attributions.fingerprint))
    parts.append(
        "<section><h2>How to read a score</h2><p>A score of TRAK (Park et al. 2023) predicts how "
        "far the model's output for the target would move by training on the sample: up where it "
        "is positive, down where it is negative. It is an estimate. The linear datamodeling score "
        "(LDS) says how good: the rank correlation of its predictions with models retrained on "
        "random parts of the training data; 1 is perfect, 0 is chance.</p></section>"
    )
    return "\n".join(parts)


def _lds_table(lds: dict[str, LDSSummary]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{_number(value.mean)}</td>'
        f"<td>{_interval(value.interval_targets)}</td>"
        f"<td>{_interval(value.interval_subsets)}</td></tr>"
        for name, value in lds.items()
    )
    return (
        '<section><h2>How good the scores are</h2><div class="scroll" tabindex="0" role="region" '
        'aria-label="Linear datamodeling scores"><table><thead><tr><th scope="col">Method</th>'
        '<th scope="col">LDS</th><th scope="col">95 % over targets</th>'
        '<th scope="col">95 % over subsets</th></tr></thead>'
        f"<tbody>{rows}</tbody></table></div></section>"
    )


def _settings(settings: dict[str, Any], fingerprint: str | None) -> str:
    cells = "".join(
        f"<div><dt>{escape(key.replace('_', ' '))}</dt><dd>{_value(value)}</dd></div>"
        for key, value in settings.items()
    )
    if fingerprint is not None:
        cells += f'<div class="all"><dt>fingerprint</dt><dd><code>{escape(fingerprint)}</code>'
        cells += "</dd></div>"
    return f'<section><h2>How they were made</h2><dl class="settings">{cells}</dl></section>'


def _value(value: Any) -> str:
    """Return a setting as text; a long list or mapping as a count that unfolds."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "none"
    if isinstance(value, (int, float)):
        return escape(f"{value:.6g}" if isinstance(value, float) else str(value))
    if isinstance(value, str) and len(value) <= LONG:
        return escape(value).replace(".", ".<wbr>")
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if len(text) <= LONG:
        return f"<code>{escape(text)}</code>"
    if isinstance(value, (list, dict)):
        text = json.dumps(value, ensure_ascii=False, indent=1)
        short = f"{len(value)} entries"
    else:
        short = text[: LONG // 2] + "…"
    return f"<details><summary>{escape(short)}</summary><pre>{escape(text)}</pre></details>"


def _number(value: float) -> str:
    return "not defined" if math.isnan(value) else f"{value:.3f}".replace("-", "−")


def _interval(pair: tuple[float, float]) -> str:
    if any(math.isnan(bound) for bound in pair):
        return "not defined"
    return f"{_number(pair[0])} to {_number(pair[1])}"
