"""Scores as text: one power of ten and one number of decimals for all that stand together."""

from __future__ import annotations

import math

SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def number_format(largest: float) -> tuple[int, int]:
    """Return a power of ten to take out of the scores and the decimals that leave three digits.

    Args:
        largest: The largest absolute score.
    """
    if largest == 0 or not math.isfinite(largest):
        return 0, 2
    exponent = math.floor(math.log10(largest))
    power = exponent if not -1 <= exponent <= 3 else 0
    return power, max(0, 2 - (exponent - power))


def format_score(value: float, power: int, decimals: int) -> str:
    """Return a score with its sign, in units of 10^power."""
    text = f"{value / 10.0**power:+.{decimals}f}"
    return text.replace("-", "−")


def power_of_ten(power: int) -> str:
    """Return 10 with a raised exponent."""
    return f"10{str(power).translate(SUPERSCRIPT)}"
