"""trak_ext.report.page.Scale: scores that stand together have one unit and three digits."""

from __future__ import annotations

import pytest

from trak_ext.report.page import Scale


@pytest.mark.parametrize(
    ("largest", "value", "power", "text"),
    [
        (0.0, 0.0, 0, "+0.00"),
        (1234.4, -1234.4, 0, "−1234"),
        (98765.0, 98765.0, 4, "+9.88"),
        (5.678, -5.678, 0, "−5.68"),
        (0.25, 0.25, 0, "+0.250"),
        (0.0143, 0.0119, -2, "+1.19"),
        (1.2e-9, 1.2e-9, -9, "+1.20"),
    ],
)
def test_scores_keep_three_digits_on_one_scale(largest, value, power, text):
    scale = Scale.of(largest)
    assert scale.power == power
    assert scale.text(value) == text


def test_the_unit_is_a_raised_power():
    assert Scale.of(3e-12).unit == "10⁻¹²"
    assert Scale.of(3.0).unit == ""
