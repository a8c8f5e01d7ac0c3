"""Calls of operators timed on this machine, and what callers add to them."""

from __future__ import annotations

import inspect
import time
from types import SimpleNamespace

import pytest
import torch
from timed_calls import US, calibration_of, generic, overheads, pointwise, product, step_of, tensor

from gcbench.calibration import op_times
from gcbench.calibration import overheads as calibration_host
from gcbench.calibration import timer as calibration
from gcbench.calibration.calibrate import calibrate_for, measure
from gcbench.calibration.call_overhead import CORE_BYTES
from gcbench.calibration.op_times import Calibration, machine_key
from gcbench.devices import backends
from gcbench.operators import call_text as calls
from gcbench.plan.task import PlanTask
from gcbench.simulate.costs import Work

# Measuring.


def test_a_short_calibration_times_the_costliest_calls_within_its_budget(tmp_path):
    device = backends.open_device("cpu")
    works = step_of(tmp_path, "llama")
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    found = calibrate_for(works, device=device, budget_s=1.0, folder=tmp_path)
    assert torch.equal(torch.rand(4), expected), "random numbers go on as if none had been drawn"
    assert found.machine == machine_key(device.describe())
    assert found.points and all(point.seconds > 0 for point in found.points)
    assert all(found.seconds(work) > 0 for work in works)
    assert op_times.load(found.machine, tmp_path) == found
    # What is there is not measured again; on a busy machine that may be less than all.
    there = [work for work in works if not found.missing([work])]
    assert measure(there, device=device, budget_s=0.6, known=found).points == found.points


@pytest.mark.parametrize(("times", "anew"), [(1, True), (0.001, False)])
def test_where_what_is_missing_matters_all_is_measured_anew(monkeypatch, times, anew):
    """The trap: calls timed an hour ago beside calls timed now, and in between the machine got slower."""
    known = calibration_of(generic(64, 1e-6), pointwise(10**6, 1e-3), overheads=overheads(model=1e-6))
    asked: list[Work] = []
    monkeypatch.setattr(calibration.Timer, "points", lambda self, works, **kwargs: asked.extend(works) or ())
    there, lacking = pointwise(10**6), pointwise(10, op="gelu")
    by_itself = known.by_itself
    monkeypatch.setattr(
        Calibration, "by_itself", lambda self, work: times * 1e-3 if work.op == "gelu" else by_itself(work)
    )
    measure([there, lacking], device=backends.open_device("cpu"), budget_s=1.0, known=known)
    assert {work.op for work in asked} == ({"silu", "gelu"} if anew else {"gelu"})


def test_the_processor_time_of_a_call_leaves_out_when_it_waits():
    """The trap: a machine on which others compute, where a call takes what they leave of it."""
    timer = calibration.Timer(backends.open_device("cpu"))

    class Waits:
        hot = ()

        def __call__(self):
            time.sleep(0.05)

    took, _ = timer._time(Waits(), None)
    assert took.wall_s >= 0.05 > 10 * took.processor_s


def test_a_budget_goes_on_as_this_thread_computes_but_not_without_end(monkeypatch):
    """The trap: on a busy machine a budget in wall time ends before most calls were timed."""
    clocks = {"thread_time": 5.0, "monotonic": 100.0}
    monkeypatch.setattr(
        calibration, "time", SimpleNamespace(**{name: lambda name=name: clocks[name] for name in clocks})
    )
    timer = calibration.Timer(backends.open_device("cpu"))
    assert timer.now() == 0.0
    clocks.update(thread_time=6.0, monotonic=101.5)
    assert timer.now() == 1.0, "others took a third of it"
    clocks.update(thread_time=6.0, monotonic=109.0)
    assert timer.now() == pytest.approx(3.0), "at the latest after three times the budget"


def test_a_calibration_without_processor_times_is_measured_again(tmp_path):
    device = backends.open_device("cpu")
    works = [pointwise(1000)]
    key = machine_key(device.describe())
    op_times.save(calibration_of(pointwise(1000, 123.0), overheads=overheads(model=1e-6), machine=key), tmp_path)
    found = calibrate_for(works, device=device, budget_s=1.0, folder=tmp_path)
    assert found.has_processor_times and all(point.seconds < 100 for point in found.points)


def test_a_call_that_fails_or_is_too_large_is_left_out():
    device = backends.open_device("cpu")
    fails = product(8, 8, 8, call=calls.write("aten::mm", [tensor(8, 8), tensor(9, 8)], {}))
    too_large = pointwise(2**50)
    good = pointwise(64)
    timer = calibration.Timer(device)
    found = timer.points([too_large, fails, good], expected=lambda work: US, until=timer.now() + 5)
    assert [(point.op, point.nbytes) for point in found] == [("silu", 512)]


def test_no_call_is_started_that_exceeds_the_budget():
    made = []
    timer = calibration.Timer(backends.open_device("cpu"))
    took = calibration.Took(wall_s=US, processor_s=US)
    timer._time = lambda call, before: made.append(call) or (took, call())
    works = [pointwise(1000), pointwise(10)]
    found = timer.points(works, expected=lambda w: 1e3 if w.nbytes > 100 else US, until=timer.now() + 60)
    assert [point.nbytes for point in found] == [80]
    assert 1 < len(made) < 100
    assert not timer.points(works, expected=lambda w: US, until=timer.now() - 1)


def test_overheads_are_the_time_of_a_step_beyond_its_calls():
    """Calls of 10 us, and views of 4; the rest is attributed to the calls that cause it, by size where it grows."""
    sizes = dict(zip(calibration_host._BATCH_SIZES, (0, CORE_BYTES), strict=True))

    def work(caller, nbytes):
        return pointwise(nbytes // 8, caller=caller)

    def calls(nbytes, first, again):
        view = Work(op="t", kind="view", dtype="fp32", nbytes=0, caller="backward")
        parts = {
            "before": [work("model", nbytes)],
            "layers": [work(first, nbytes)] * 2,
            "after": [work("model", nbytes)],
            "backward": [work("backward", nbytes), view, *[work("recompute", nbytes)] * again],
            "optimizer": [work("optimizer", nbytes)],
        }
        # Two parameters are alike, of which one was traced.
        return {part: [(each, 2.0 if part == "optimizer" else 1.0) for each in found] for part, found in parts.items()}

    def turn(nbytes):
        # Twice a small one's 50 us, as those of another size; and 60 us for what is kept, whatever the size.
        checkpoint, policy = (60, 130) if nbytes else (40, 70)
        off = {"before": 30, "layers": 30, "after": 10, "backward": 16, "optimizer": 14}
        per_layer = off | {"layers": 50, "backward": 16 + 2 * 15 - 20 + checkpoint}
        selective = off | {"layers": 100, "backward": 16 + 15 - 70 + policy}
        steps = {"off": off, "per-layer": per_layer, "selective:matmul": selective}
        return {strategy: {part: took * US for part, took in parts.items()} for strategy, parts in steps.items()}

    def slow(turn):
        """A moment in which all takes twice as long."""
        return {strategy: {part: 2 * took for part, took in parts.items()} for strategy, parts in turn.items()}

    works = {
        (strategy, batch): calls(nbytes, first, again)
        for batch, nbytes in sizes.items()
        for (strategy, first), again in zip(calibration_host._STRATEGIES.items(), (0, 2, 1), strict=True)
    }
    turns = {batch: [turn(nbytes), slow(turn(nbytes)), turn(nbytes)] for batch, nbytes in sizes.items()}
    made = {each for one in works.values() for part in one.values() for each, _ in part}
    alone = {each: (4 if each.kind == "view" else 10) * US for each in made}
    found, step_s = calibration_host._solved(works, turns, alone)
    added = {each.caller: (round(each.call_s / US, 6), round(each.cold_s / US, 6)) for each in found}
    assert added == {
        "model": (5.0, 0.0),
        "recompute": (5.0, 0.0),
        "backward": (1.0, 0.0),
        "optimizer": (-3.0, 0.0),
        "checkpoint": (5.0 + 40 / 2, 20 / 2),  # a model's own, and what was left of one of the two calls
        "policy": (5.0 + 70 / 2, 60 / 2),
    }
    assert step_s == pytest.approx(10 * US)  # 40 us, less two calls of 10 with 5 each


def test_the_reference_model_gives_an_overhead_for_every_caller():
    timer = calibration.Timer(backends.open_device("cpu"))
    added = calibration_host.overheads(timer, until=0.0, least_s=0.3)
    for solved, step_s in (added.wall, added.processor):
        found = {each.caller: each for each in solved}
        assert found.keys() == {"model", "checkpoint", "policy", "recompute", "backward", "optimizer"}
        assert found["policy"].call_s >= found["model"].call_s >= 0
        assert found["checkpoint"].call_s >= found["model"].call_s
        assert all(each.cold_s >= 0 for each in solved) and step_s >= 0


def test_the_default_budget_is_enough_to_measure_overheads(tmp_path, monkeypatch):
    """The trap, seen on a whole grid: a budget too short for overheads, so that saving outputs costs nothing and the
    chosen plans are a third slower than the ones they beat."""
    asked = inspect.signature(PlanTask).parameters["calibration_s"].default
    given = []

    known, doubled = overheads(model=1e-5, policy=1e-4), overheads(model=2e-5, policy=2e-4)

    def added(timer, *, until):
        given.append(until - timer.now())
        return calibration_host.Overheads(wall=(known, 1e-3), processor=(doubled, 2e-3))

    monkeypatch.setattr(calibration_host, "overheads", added)
    found = calibrate_for((), device=backends.open_device("cpu"), budget_s=asked, folder=tmp_path)
    assert (found.overheads, found.step_s) == (known, 1e-3)
    assert (found.processor_overheads, found.processor_step_s) == (doubled, 2e-3)
    assert given == [pytest.approx(calibration_host.LEAST_S, abs=0.5)]
    calibrate_for((), device=backends.open_device("cpu"), budget_s=asked, folder=tmp_path)
    assert len(given) == 1, "once per machine"
