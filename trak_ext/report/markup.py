"""Text and numbers as HTML."""

from __future__ import annotations

import html
from typing import NamedTuple

from .attributions import Attributions
from .numbers import format_score, number_format, power_of_ten

# Characters that HTML cannot hold: controls but tab and line ends, and halves of surrogate pairs.
_UNPRINTABLE = dict.fromkeys(
    (*range(9), 11, 12, *range(14, 32), *range(127, 160), *range(0xD800, 0xE000)), 0xFFFD
)


def escape(text: str) -> str:
    """Return text that is safe inside an element and inside a quoted attribute."""
    return html.escape(text.translate(_UNPRINTABLE), quote=True)


def element(name: str, text: str | None, style: str) -> str:
    """Return <name class=style>text</name>, or nothing for None."""
    return "" if text is None else f'<{name} class="{style}" dir="auto">{escape(text)}</{name}>'


def label_text(label: str | float | None) -> str:
    """Return a label as people write it: no more than six digits of a float."""
    if label is None:
        return ""
    if isinstance(label, float):
        return f"{label:.6g}".replace("-", "−")
    return str(label)


class Scale(NamedTuple):
    """One scale for every score of a page."""

    largest: float  # absolute score; the length of a full bar
    centred: bool  # zero in the middle, as some proponent scores below 0 or opponent above
    power: int
    decimals: int

    @property
    def unit(self) -> str:
        """The power of ten that the scores are in units of; empty for 1."""
        return power_of_ten(self.power) if self.power else ""

    def text(self, score: float) -> str:
        """Return a score in that unit."""
        return format_score(score, self.power, self.decimals)

    def bar(self, score: float, side: str) -> str:
        """Return a bar that grows from zero to the right for scores above it, else to the left.

        Zero is where `side`, "proponents" or "opponents", leaves all room to its scores.
        """
        zero, full = (50, 50) if self.centred else (0 if side == "proponents" else 100, 100)
        length = 0.0 if self.largest == 0 else round(full * abs(score) / self.largest, 2)
        start, colour = (zero, "proponent") if score >= 0 else (zero - length, "opponent")
        return (
            '<svg class="bar" viewBox="0 0 100 6" preserveAspectRatio="none" aria-hidden="true">'
            '<path class="track" d="M0 3H100"/>'
            f'<rect class="{colour}" x="{start:g}" width="{length:g}" height="6"/>'
            f'<path class="zero" d="M{zero} 0V6"/></svg>'
        )


def number_scale(attributions: Attributions) -> Scale:
    """Return the scale that fits every score shown."""
    proponents, opponents = attributions.proponents.values, attributions.opponents.values
    largest = max((float(v.abs().max()) for v in (proponents, opponents) if v.numel()), default=0.0)
    centred = bool((proponents < 0).any() or (opponents > 0).any())
    return Scale(largest, centred, *number_format(largest))
