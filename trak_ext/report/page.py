"""Attributions as one HTML file that needs nothing else: no network, no script to be read.

The page is made by the templates beside this file, which escape every text; this module says what
they show: numbers in one scale, previews of long texts, settings as words.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

from .attributions import Attributions, Item, label_text
from .bundle import check_attributions, write_whole
from .pictures import png_data_uri

PIXELATED = 64  # pictures up to this many pixels a side are drawn with sharp pixels
PREVIEW = 260  # characters of a text that stand open; the rest unfolds
PREVIEW_LINES = 5  # and lines
LONG = 90  # characters of a setting that stand open; a longer one unfolds
MOST_LABELS = 60  # that a list to choose from holds
SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
# Characters that HTML cannot hold: controls but tab and line ends, and halves of surrogate pairs.
_UNPRINTABLE = dict.fromkeys(
    (*range(9), 11, 12, *range(14, 32), *range(127, 160), *range(0xD800, 0xE000)), 0xFFFD
)


def write_report(path: str | os.PathLike[str], attributions: Attributions) -> None:
    """Write attributions as one HTML file with pictures, style and script inside.

    The same attributions give the same bytes.

    Raises:
        TypeError: not `Attributions`.
        OSError: the file cannot be written.
    """
    check_attributions(attributions)
    write_whole(Path(path), render(attributions).encode())


def render(attributions: Attributions) -> str:
    """Return the page as text."""
    style, script = (_asset(name) for name in ("report.css", "report.js"))
    # Even text that slipped through escaping could then not run or load anything.
    policy = (
        "default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'; "
        f"style-src '{_hash(style)}'; script-src '{_hash(script)}'"
    )
    labels = sorted({label_text(item.label) for item in attributions.targets} - {""})
    page = _TEMPLATES.get_template("page.html").render(
        report=attributions,
        scale=number_scale(attributions),
        labels=labels if len(labels) <= MOST_LABELS else [],
        wrong=[attributions.is_wrong(i) for i in range(len(attributions.targets))],
        policy=policy,
        style=style,
        script=script,
    )
    return page.translate(_UNPRINTABLE) + "\n"


class Scale(NamedTuple):
    """One power of ten and one number of decimals for all scores that stand together."""

    largest: float  # absolute score; the length of a full bar
    centred: bool  # zero in the middle, as some proponent scores below 0 or opponent above
    power: int
    decimals: int

    @classmethod
    def of(cls, largest: float, centred: bool = False) -> Scale:
        """Return the scale that leaves the largest absolute score three digits."""
        if largest == 0 or not math.isfinite(largest):
            return cls(largest, centred, 0, 2)
        exponent = math.floor(math.log10(largest))
        power = exponent if not -1 <= exponent <= 3 else 0
        return cls(largest, centred, power, max(0, 2 - (exponent - power)))

    @property
    def unit(self) -> str:
        """The power of ten that the scores are in units of; empty for 1."""
        return f"10{str(self.power).translate(SUPERSCRIPT)}" if self.power else ""

    def text(self, score: float) -> str:
        """Return a score with its sign, in that unit."""
        return f"{score / 10.0**self.power:+.{self.decimals}f}".replace("-", "−")

    def bar(self, score: float, side: str) -> dict[str, Any]:
        """Return where a bar starts, how long it is (of 100) and where zero is.

        It grows from zero to the right for scores above it, else to the left. Zero is where `side`,
        "proponents" or "opponents", leaves all room to its scores.
        """
        zero, full = (50, 50) if self.centred else (0 if side == "proponents" else 100, 100)
        length = 0.0 if self.largest == 0 else round(full * abs(score) / self.largest, 2)
        start = zero if score >= 0 else zero - length
        colour = "proponent" if score >= 0 else "opponent"
        return {"zero": zero, "x": f"{start:g}", "width": f"{length:g}", "colour": colour}


def number_scale(attributions: Attributions) -> Scale:
    """Return the scale that fits every score shown."""
    proponents, opponents = attributions.proponents.values, attributions.opponents.values
    largest = max((float(v.abs().max()) for v in (proponents, opponents) if v.numel()), default=0.0)
    return Scale.of(largest, centred=bool((proponents < 0).any() or (opponents > 0).any()))


class Ranked(NamedTuple):
    """A training sample among a target's proponents or opponents."""

    item: Item
    position: int
    score: float


def ranked_samples(attributions: Attributions, side: str, i: int) -> list[Ranked]:
    """Return the "proponents" or "opponents" of target i in order."""
    values, indices = getattr(attributions, side)
    return [
        Ranked(attributions.train_items[index], index, score)
        for index, score in zip(indices[i].tolist(), values[i].tolist(), strict=True)
    ]


class Preview(NamedTuple):
    """The beginning of a long text, or the surroundings of its highlight."""

    text: str
    highlight: tuple[int, int] | None


def preview(item: Item) -> Preview | None:
    """Return what stands open of an item's text; None where all of it does."""
    text, mark = item.text or "", item.highlight
    if len(text) <= PREVIEW * 5 // 4 and text.count("\n") < PREVIEW_LINES:
        return None
    start = 0
    if mark is not None and mark[1] > PREVIEW:
        start = max(0, mark[0] - PREVIEW * 2 // 3)  # the highlight must stand in the preview
    stop = start + PREVIEW
    end = stop
    while end < len(text) and not text[end].isspace():
        end += 1
    if end - stop <= PREVIEW // 10:  # do not cut a word whose end is near
        stop = end
    before, after = "…" if start else "", "…" if stop < len(text) else ""
    if mark is not None:
        shift = len(before) - start
        mark = (max(start, mark[0]) + shift, max(start, min(mark[1], stop)) + shift)
    return Preview(before + text[start:stop] + after, mark)


def setting_name(key: str) -> str:
    """Return the name of a setting as people read it."""
    return "matrix definition" if key == "law_version" else key.replace("_", " ")


class Setting(NamedTuple):
    """A setting as text."""

    text: str
    is_code: bool = False
    summary: str | None = None  # what stands open of a long one


def setting(value: Any) -> Setting:
    """Return a setting as people read it; of a long list or mapping the count stands open."""
    if isinstance(value, bool) or value is None:
        return Setting({True: "yes", False: "no", None: "none"}[value])
    if isinstance(value, (int, float)):
        return Setting(f"{value:.6g}" if isinstance(value, float) else str(value))
    if isinstance(value, str):
        return Setting(value, summary=value[: LONG // 2] + "…" if len(value) > LONG else None)
    text = json.dumps(value, ensure_ascii=False)
    if len(text) <= LONG:
        return Setting(text, is_code=True)
    return Setting(json.dumps(value, ensure_ascii=False, indent=1), True, f"{len(value)} entries")


def _number(value: float, decimals: int = 3) -> str:
    return "not defined" if math.isnan(value) else f"{value:.{decimals}f}".replace("-", "−")


def _interval(pair: tuple[float, float]) -> str:
    low, high = map(_number, pair)
    return f"{low} to {high}" if not any(map(math.isnan, pair)) else "not defined"


def _asset(name: str) -> Markup:
    # Our own, and not escaped: what comes of users never passes here.
    path = resources.files(__package__) / "templates" / name
    return Markup("\n" + path.read_text(encoding="utf-8"))


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader(__package__),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.globals.update(
    PIXELATED=PIXELATED,
    preview=preview,
    ranked_samples=ranked_samples,
    setting=setting,
    setting_name=setting_name,
)
_TEMPLATES.filters.update(
    label=label_text, number=_number, interval=_interval, picture=png_data_uri
)
