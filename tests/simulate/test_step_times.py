"""A step on a device that computes while Python launches, against sums by hand."""

from __future__ import annotations

import pytest

from gcbench.simulate.costs import Work
from gcbench.simulate.step_times import step_seconds


class ByHand:
    """A byte takes a second on the device; Python takes `host` seconds a call, and ten times that under a policy."""

    source, step_s = "by hand", 0.0

    def __init__(self, host):
        self.host = host

    def seconds(self, work):
        return float(work.nbytes)

    def host_s(self, work):
        return self.host * (10 if work.caller == "policy" else 1)


def calls(*seconds, caller="model"):
    return tuple(Work(op="x", kind="pointwise", dtype="fp32", nbytes=each, caller=caller) for each in seconds)


FORWARD, BACKWARD = ("forward", 0), ("backward", 0)


def test_a_step_of_large_kernels_takes_as_long_as_the_device():
    found = step_seconds([(FORWARD, calls(5, 5)), (BACKWARD, calls(20, caller="backward"))], (), ByHand(1))
    assert (found.seconds, found.device_s, found.waiting_frac) == (30, 30, 0)


def test_a_step_of_small_kernels_takes_as_long_as_python():
    found = step_seconds([(FORWARD, calls(1, 1)), (BACKWARD, calls(1, caller="backward"))], (), ByHand(4))
    assert (found.seconds, found.device_s) == (12, 3)
    assert found.waiting_frac == pytest.approx(0.75)


def test_what_a_device_waited_for_in_one_part_is_not_made_up_for_in_the_next():
    """The trap: the larger of both sums, 20 here. The device finishes the forward pass at 16 and needs 16 more."""
    sections = [(FORWARD, calls(*[1] * 4)), (BACKWARD, calls(16, caller="backward"))]
    assert step_seconds(sections, (), ByHand(4)).seconds == 16 + 16


def test_python_runs_ahead_while_the_device_is_busy():
    """The first part gives Python the time in which it launches the second: 10 and 1, not 10 and 8."""
    sections = [(FORWARD, calls(10)), (BACKWARD, calls(*[0] * 7, 1, caller="backward"))]
    assert step_seconds(sections, (), ByHand(1)).seconds == 11


def test_a_policy_decides_in_the_recomputation_too():
    """A policy's mode is on again when its layer is recomputed; the calls there look like any other recomputation."""
    plain = [(FORWARD, calls(0, caller="checkpoint")), (BACKWARD, calls(0, caller="recompute"))]
    decided = [(FORWARD, calls(0, caller="policy")), (BACKWARD, calls(0, caller="recompute"))]
    other = [(FORWARD, calls(0, caller="policy")), (("backward", 1), calls(0, caller="recompute"))]
    assert [step_seconds(each, (), ByHand(1)).seconds for each in (plain, decided, other)] == [2, 20, 11]


def test_a_step_that_was_traced_in_full_is_split_by_its_passes():
    whole = calls(*[1] * 4) + calls(16, caller="backward") + calls(2, caller="optimizer")
    sections = [(FORWARD, calls(*[1] * 4)), (BACKWARD, calls(16, caller="backward"))]
    update = [(work, 1.0) for work in calls(2, caller="optimizer")]
    assert step_seconds([(None, whole)], (), ByHand(4)) == step_seconds(sections, update, ByHand(4))


def test_the_update_is_done_as_often_as_it_stands_for_parameters():
    found = step_seconds([], [(calls(2, caller="optimizer")[0], 3.5)], ByHand(1))
    assert (found.seconds, found.device_s) == (7, 7)


def test_an_empty_step_takes_no_time():
    assert step_seconds([], (), ByHand(1)).waiting_frac == 0.0
