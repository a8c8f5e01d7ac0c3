"""Formatting of figures."""

from __future__ import annotations

import pytest

from gcbench.core.units import format_percent


@pytest.mark.parametrize(
    ("fraction", "text", "signed"),
    [
        (None, "–", "–"),
        (0.0, "0 %", "+0 %"),
        (-0.0004, "0 %", "+0 %"),
        (0.0004, "0 %", "+0 %"),
        (0.0006, "0.1 %", "+0.1 %"),
        (-0.031, "−3.1 %", "−3.1 %"),
        (0.413, "41 %", "+41 %"),
    ],
)
def test_a_share_has_the_digits_that_matter(fraction, text, signed):
    """The trap: "−0.0 %" for no difference."""
    assert format_percent(fraction) == text
    assert format_percent(fraction, sign=True) == signed
