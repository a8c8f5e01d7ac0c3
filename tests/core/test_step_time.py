"""Bands around predicted times and overheads."""

from __future__ import annotations

import pytest

from gcbench.core.json_codec import decode, encode
from gcbench.core.step_time import StepTime, overhead


def time(seconds, **changes):
    return StepTime(**{"seconds": seconds, "basis": "card", "source": "by hand", **changes})


@pytest.mark.parametrize("basis", ["card", "this machine"])
def test_a_band_contains_its_centre_and_is_wider_the_longer_the_device_waits(basis):
    still, waiting = time(2.0, basis=basis), time(2.0, basis=basis, waiting_frac=0.5)
    assert 0 < waiting.low_s < still.low_s < 2.0 < still.high_s < waiting.high_s


def test_a_calibration_of_this_machine_is_trusted_more_than_a_cards_rates():
    card, here = time(1.0), time(1.0, basis="this machine")
    assert card.low_s < here.low_s and here.high_s < card.high_s


def test_an_overhead_has_a_band_narrower_than_two_step_times_give():
    off, step = time(1.0), time(1.3)
    found = overhead(step, off)
    assert found.frac == pytest.approx(0.3)
    assert found.low_frac < found.frac < found.high_frac
    assert found.high_frac - found.low_frac < step.high_s / off.low_s - step.low_s / off.high_s


def test_off_costs_nothing_for_sure():
    """The trap: a band around the comparison of a step with itself."""
    found = overhead(time(1.0), time(1.0))
    assert (found.frac, found.low_frac, found.high_frac) == (0.0, 0.0, 0.0)


def test_where_the_device_waits_the_overhead_is_less_certain():
    sure = overhead(time(1.3), time(1.0))
    unsure = overhead(time(1.3, waiting_frac=0.4), time(1.0))
    assert unsure.high_frac - unsure.low_frac > 2 * (sure.high_frac - sure.low_frac)


def test_it_is_stored_and_read_again():
    assert decode(StepTime, encode(time(1.5, waiting_frac=0.1))) == time(1.5, waiting_frac=0.1)
