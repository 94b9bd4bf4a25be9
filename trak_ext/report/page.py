"""Attributions as one HTML file that needs nothing else: no network, no script to be read."""

from __future__ import annotations

import base64
import hashlib
import os
from importlib import resources
from pathlib import Path

from .attributions import Attributions
from .bundle import write_whole
from .facts import facts, provenance
from .markup import Scale, element, escape, label_text, number_scale
from .samples import ranked_list, subject

MOST_LABELS = 60  # that a list to choose from holds


def write_report(path: str | os.PathLike[str], attributions: Attributions) -> None:
    """Write attributions as one HTML file with pictures, style and script inside.

    The same attributions give the same bytes.

    Raises:
        TypeError: not `Attributions`.
        OSError: the file cannot be written.
    """
    if not isinstance(attributions, Attributions):
        raise TypeError(
            f"attributions: expected a trak_ext.report.Attributions, got {attributions!r}"
        )
    write_whole(Path(path), render(attributions).encode())


def render(attributions: Attributions) -> str:
    """Return the page as text."""
    style, script = _asset("report.css"), _asset("report.js")
    # Even text that slipped through escaping could then not run or load anything.
    policy = (
        "default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'; "
        f"style-src '{_hash(style)}'; script-src '{_hash(script)}'"
    )
    title = escape(attributions.title)
    scale = number_scale(attributions)
    targets = "\n".join(_target(attributions, i, scale) for i in range(len(attributions.targets)))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="generator" content="trak_ext">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<a class="skip" href="#targets">Skip to the targets</a>
<header class="page-header">
<div><p class="eyebrow">TRAK data attribution</p>
<h1>{title}</h1>
{element("p", attributions.note, "note")}</div>
{facts(attributions)}
{_key(attributions, scale)}
</header>
{_controls(attributions)}
<main id="targets" tabindex="-1">
{targets}
<p class="nothing" hidden>No target matches.</p>
</main>
<footer>
{provenance(attributions)}
</footer>
<script>{script}</script>
</body>
</html>
"""


def _target(attributions: Attributions, i: int, scale: Scale) -> str:
    item = attributions.targets[i]
    lds = None if attributions.target_lds is None else attributions.target_lds[i]
    strongest = attributions.proponents.values[i].tolist()[:1]
    data = {
        "label": label_text(item.label),
        "top": repr(strongest[0]) if strongest else "",
        "lds": "" if lds is None or lds != lds else repr(lds),
        "wrong": "1" if _is_wrong(attributions, i) else "0",
    }
    attributes = "".join(f' data-{name}="{escape(value)}"' for name, value in data.items())
    lists = [
        ranked_list(attributions, i, side, scale)
        for side in ("proponents", "opponents")
        if getattr(attributions, side).indices.shape[1]
    ]
    style = "target" if item.text is None else "target wide"
    return (
        f'<article class="{style}" aria-labelledby="target-{i}"{attributes}>\n'
        f"{subject(item, i, lds)}\n" + "\n".join(lists) + "\n</article>"
    )


def _is_wrong(attributions: Attributions, i: int) -> bool:
    item = attributions.targets[i]
    if item.label is None or item.prediction is None:
        return False
    return label_text(item.prediction) != label_text(item.label)


def _key(attributions: Attributions, scale: Scale) -> str:
    """How to read a page: what the two sides mean and how long a bar is."""
    sides = [
        '<li><span class="mark proponent" aria-hidden="true">▲</span> <b>Proponents</b>: '
        "training on them raised the model's output for the target.</li>"
    ]
    if attributions.opponents.indices.shape[1]:
        sides.append(
            '<li><span class="mark opponent" aria-hidden="true">▼</span> <b>Opponents</b>: '
            "training on them lowered it.</li>"
        )
    unit = f" Scores are in units of {scale.unit}." if scale.unit else ""
    differs = ""
    if any(item.label is not None for item in attributions.targets):
        differs = ' A <span class="differs">framed</span> label is not that of the target.'
    zero = "from the middle line to an end" if scale.centred else "a full one"
    sides.append(
        f'<li class="scale">All bars have one scale: {zero} is '
        f"{scale.text(scale.largest).lstrip('+')}.{unit}{differs}</li>"
    )
    return f'<ul class="key">{"".join(sides)}</ul>'


def _controls(attributions: Attributions) -> str:
    """Search and order, shown where scripts run; without them the page is simply whole."""
    orders = [("given", "as given")]
    if any(item.label is not None for item in attributions.targets):
        orders.append(("label", "label"))
    orders.append(("top", "strongest proponent"))
    if attributions.target_lds is not None:
        orders.append(("lds", "lowest LDS"))
    if any(_is_wrong(attributions, i) for i in range(len(attributions.targets))):
        orders.append(("wrong", "wrong predictions first"))
    options = "".join(f'<option value="{key}">{text}</option>' for key, text in orders)
    labels = sorted({label_text(item.label) for item in attributions.targets} - {""})
    chooser = ""
    if 1 < len(labels) <= MOST_LABELS:
        choices = "".join(f"<option>{escape(label)}</option>" for label in labels)
        chooser = f'<label>Label <select id="label"><option value="">all</option>{choices}</select>'
        chooser += "</label>\n"
    return f"""<search class="controls" role="search" hidden>
<label>Find <input type="search" id="find" autocomplete="off"
 placeholder="label, text or id of a target"></label>
{chooser}<label>Order <select id="order">{options}</select></label>
<output id="count" for="find" aria-live="polite"></output>
</search>"""


def _asset(name: str) -> str:
    text = resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
    return "\n" + text


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
