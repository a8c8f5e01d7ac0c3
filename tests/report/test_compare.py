"""Comparisons of two runs: which cells match, what is refused, what counts as a change."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from fixtures_report import OUT_OF_MEMORY, outcome, peaks, report, steady, workload

from gcbench.core.errors import UsageError
from gcbench.core.units import MIB
from gcbench.report import compare as comparing
from gcbench.report.formats.terminal import plain

PEAKS = peaks(300, 400, 200)


def run(*outcomes, **changes):
    return report(*outcomes, **changes)


def only(a, b, *, force=False):
    changes = comparing.compare(a, b, force=force).changes
    assert len(changes) == 1
    return changes[0]


def cell(memory=PEAKS, seconds=0.5, *, strategy="per-layer", spread=0.01, rounds=3, **changes):
    return outcome(strategy, memory, steady(seconds, rounds, spread), **changes)


def test_a_run_compared_with_itself_is_the_same():
    change = only(run(cell()), run(cell()))
    assert (change.memory_verdict, change.time_verdict) == ("same", "no difference shown")
    assert (change.memory_change_frac, change.time_change_frac) == (0.0, 0.0)
    assert change.time_change_low_frac < 0 < change.time_change_high_frac


@pytest.mark.parametrize(("backward", "verdict", "frac"), [(500, "worse", 0.25), (300, "better", -0.25)])
def test_memory_is_exact(backward, verdict, frac):
    change = only(run(cell()), run(cell(peaks(300, backward, 200))))
    assert change.memory_verdict == verdict
    assert change.memory_change_frac == pytest.approx(frac)
    assert (change.peak_allocated_a_bytes, change.peak_allocated_b_bytes) == (400 * MIB, backward * MIB)


def test_one_byte_more_is_worse():
    """Memory has no noise; rounding it to percent would hide the first step of a creeping change."""
    larger = replace(PEAKS, allocated_bytes=PEAKS.allocated_bytes + 1, backward_bytes=PEAKS.backward_bytes + 1)
    change = only(run(cell()), run(cell(larger)))
    assert change.memory_verdict == "worse"
    assert comparing.broken(comparing.compare(run(cell()), run(cell(larger)), force=False), {"memory": 0.0})


@pytest.mark.parametrize(("seconds", "verdict"), [(0.6, "worse"), (0.4, "better"), (0.502, "no difference shown")])
def test_time_is_judged_by_its_interval(seconds, verdict):
    change = only(run(cell()), run(cell(seconds=seconds)))
    assert change.time_verdict == verdict
    assert change.time_change_frac == pytest.approx(seconds / 0.5 - 1, abs=1e-6)


@pytest.mark.parametrize("rounds", [1, 2])
def test_a_time_with_too_few_rounds_for_an_interval_is_not_judged(rounds):
    """Twice the time, and nothing shown. The trap: "−100 to 104306 %" read as a measurement."""
    a, b = run(cell(rounds=rounds, seconds=0.5)), run(cell(rounds=8, seconds=1.0))
    change = only(a, b)
    assert change.time_verdict == "too few rounds"
    assert change.time_change_frac == pytest.approx(1.0, rel=0.02)
    assert (change.time_change_low_frac, change.time_change_high_frac) == (None, None)
    comparison = comparing.compare(a, b, force=False)
    assert comparing.broken(comparison, {"time": 0.05}) == []
    text = plain(comparing.render(comparison), width=120)
    assert "too few rounds" in text and "95 %" not in text and "--rounds 3 in both gives one" in text
    assert "no difference shown" not in text


def failing(strategy="per-layer", **changes):
    return outcome(strategy, failure=OUT_OF_MEMORY, **changes)


@pytest.mark.parametrize(
    ("a", "b", "verdict"),
    [
        (cell(), failing(), "newly failing"),
        (failing(), cell(), "newly passing"),
        (failing(), failing(), "both fail"),
        (cell(), cell(recomputed=3), "newly failing"),
        (cell(recomputed=3), cell(), "newly passing"),
    ],
)
def test_failures_are_verdicts_and_so_is_a_failed_proof(a, b, verdict):
    change = only(run(a), run(b))
    assert (change.memory_verdict, change.time_verdict) == (verdict, verdict)
    assert (change.memory_change_frac, change.time_change_frac) == (None, None)


def test_cells_of_one_run_only_are_listed():
    a = run(cell(), cell(strategy="off"), outcome("every:4"))
    b = run(cell(), cell(strategy="every:2"))
    found = {c.strategy: c.memory_verdict for c in comparing.compare(a, b, force=False).changes}
    assert found == {"per-layer": "same", "off": "only in A", "every:2": "only in B"}


def test_cells_match_by_everything_that_decides_them():
    works = [workload(), workload(batch=8), workload(seq=128), workload(optim="sgd"), workload(attn="eager")]
    a = run(*(cell(work=work) for work in works))
    b = run(*(cell(peaks(300, 401 + place, 200), work=work) for place, work in enumerate(works)))
    changes = comparing.compare(a, b, force=False).changes
    assert len(changes) == len(works)
    assert [c.peak_allocated_b_bytes // MIB for c in changes] == [401, 402, 403, 404, 405]


def test_another_card_of_the_same_kind_is_the_same_device():
    first, second = workload(device="cuda:0"), workload(device="cuda:1")
    assert only(run(cell(work=first)), run(cell(work=second))).memory_verdict == "same"


def test_another_device_is_refused_with_both_names_and_a_remedy():
    a, b = run(cell(), device_name="Old CPU"), run(cell(), device_name="New CPU")
    with pytest.raises(UsageError, match=r"different device \(A: Old CPU \(cpu\), B: New CPU \(cpu\)\).*--force"):
        comparing.compare(a, b, force=False)


def test_another_precision_is_refused_and_named_beside_the_device():
    a = run(cell())
    b = run(cell(work=workload(precision="bf16", device="cuda:0")), device_name="Card")
    with pytest.raises(UsageError) as caught:
        comparing.compare(a, b, force=False)
    assert "A: Example CPU (cpu), B: Card (cuda)" in str(caught.value)
    assert "different precision (A: fp32, B: bf16)" in str(caught.value)


def test_another_size_of_the_same_model_is_refused():
    """The trap: `--layers 2` changes the model and not its name."""
    a = run(cell())
    b = replace(a, model=replace(a.model, num_params=53_000_000))
    with pytest.raises(UsageError, match=r"number of parameters \(A: 124,439,808, B: 53,000,000\).*--force"):
        comparing.compare(a, b, force=False)
    assert only(a, b, force=True).precision == "fp32"


def test_force_matches_across_device_and_precision_with_a_notice():
    a = run(cell())
    b = run(cell(peaks(150, 200, 100), work=workload(precision="bf16", device="cuda:0")), device_name="Card")
    comparison = comparing.compare(a, b, force=True)
    change = comparison.changes[0]
    assert (change.precision, change.device) == (None, None)
    assert change.memory_change_frac == pytest.approx(-0.5)
    assert sum(notice.startswith("compared despite different") for notice in comparison.notices) == 2


def test_force_keeps_the_part_of_the_key_that_agrees():
    a, b = run(cell(), device_name="Old"), run(cell(), device_name="New")
    assert only(a, b, force=True).precision == "fp32"


def test_runs_without_a_common_cell_are_refused_with_what_they_have():
    with pytest.raises(UsageError) as caught:
        comparing.compare(run(cell()), run(cell(work=workload(batch=2))), force=False)
    assert "no cell in common" in str(caught.value)
    assert "batch 16 × 64 tokens" in str(caught.value)
    assert "batch 2 × 64 tokens" in str(caught.value)
    with pytest.raises(UsageError, match="B has none that was measured"):
        comparing.compare(run(cell()), run(), force=False)


def test_other_differences_are_notices():
    a = run(cell(), settings={"model": "gpt2", "seed": 0, "rounds": 3, "strategies": ["off"]})
    b = run(cell(), settings={"model": "gpt2", "seed": 1, "rounds": 3, "strategies": ["per-layer"]})
    machine = replace(b.machine, versions=b.machine.versions | {"torch": "2.14.0"}, settings={"threads": "4"})
    notices = comparing.compare(a, replace(b, machine=machine), force=False).notices
    assert "different torch (A: 2.13.0, B: 2.14.0)" in notices
    assert "different threads (A: 8, B: 4)" in notices
    assert "different seed (A: 0, B: 1)" in notices
    assert len(notices) == 3


def broken(a, b, **thresholds):
    return comparing.broken(comparing.compare(run(a), run(b), force=False), thresholds)


def test_memory_breaks_a_threshold_beyond_it_only():
    """404 / 400 - 1 is more than 0.01 in floating point; exactly the limit is allowed."""
    grown = cell(peaks(300, 404, 200))
    assert broken(cell(), grown, memory=0.01) == []
    (sentence,) = broken(cell(), grown, memory=0.009)
    assert sentence == (
        "per-layer at gpt2 · batch 16 × 64 tokens · fp32 · adamw_torch · sdpa · cpu: peak memory grew by 4.00 MiB "
        "(+1.0 %), and 0.9 % is allowed"
    )
    assert broken(grown, cell(), memory=0.0) == []
    assert broken(cell(), grown, time=0.0) == []


def test_time_breaks_a_threshold_only_when_the_interval_shows_a_difference():
    """A centre beyond the limit is not enough: a noisy machine would fail every second build."""
    (sentence,) = broken(cell(), cell(seconds=0.6), time=0.05)
    assert "a step takes 20 % longer (95 %: 19 to 21 %), and 5 % is allowed" in sentence
    assert broken(cell(spread=0.4), cell(seconds=0.6, spread=0.4), time=0.05) == []
    assert broken(cell(), cell(seconds=0.52), time=0.05) == []
    assert broken(cell(seconds=0.6), cell(), time=0.05) == []


@pytest.mark.parametrize("thresholds", [{"memory": 10.0}, {"time": 10.0}])
def test_a_newly_failing_cell_breaks_every_threshold(thresholds):
    (sentence,) = broken(cell(), failing(), **thresholds)
    assert "passed in A and fails in B (out of memory)" in sentence
    assert broken(failing(), failing(), **thresholds) == []
    assert broken(failing(), cell(), **thresholds) == []


def test_without_thresholds_nothing_breaks():
    assert broken(cell(), failing()) == []


def test_thresholds_are_parsed():
    assert comparing.parse_threshold("memory:1%") == ("memory", 0.01)
    assert comparing.parse_threshold(" time : 0.05 ") == ("time", 0.05)
    assert comparing.parse_threshold("memory:0") == ("memory", 0.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("memroy:1%", "did you mean memory"),
        ("peak:1%", "legal are memory and time"),
        ("memory", "has no limit; write it like memory:1%"),
        ("memory:", "has no limit"),
        ("time:fast", "write it like 5% or 0.05"),
        ("time:-1%", "write it like 5% or 0.05"),
        ("", "legal are memory and time"),
    ],
)
def test_a_wrong_threshold_is_answered_with_the_right_form(text, message):
    with pytest.raises(ValueError, match=message):
        comparing.parse_threshold(text)


def example():
    a = run(
        cell(strategy="off"),
        cell(),
        cell(strategy="every:2"),
        failing("every:4"),
        settings={"seed": 0},
    )
    b = run(
        cell(strategy="off"),
        cell(peaks(300, 420, 200), 0.6),
        failing("every:2"),
        failing("every:4"),
        cell(strategy="every:3"),
        settings={"seed": 1},
    )
    return comparing.compare(a, b, force=False)


def test_rows_are_plain_json_in_raw_units():
    rows = json.loads(json.dumps(comparing.to_rows(example()), allow_nan=False))
    assert [row["strategy"] for row in rows] == ["off", "per-layer", "every:2", "every:4", "every:3"]
    assert rows[1]["memory_change_frac"] == pytest.approx(0.05)
    assert (rows[2]["memory_verdict"], rows[2]["status_b"], rows[2]["peak_allocated_b_bytes"]) == (
        "newly failing",
        "oom",
        None,
    )


def test_the_screen_shows_equal_memory_and_why_a_cell_fails():
    text = plain(comparing.render(example()), width=120)
    lines = {line.split()[0]: line for line in text.splitlines() if line}
    assert " same " in lines["off"]
    assert all(part in lines["per-layer"] for part in ("400 MiB", "420 MiB", "+5.0 %", "worse", "500 ms", "600 ms"))
    assert "every:2: A ok, B out of memory" in text
    assert "Note: different seed (A: 0, B: 1)" in text


@pytest.mark.parametrize("width", [80, 100, 120, 160])
def test_verdicts_and_changes_survive_a_narrow_screen(width):
    text = plain(comparing.render(example()), width=width)
    assert max(map(len, text.splitlines())) <= width
    assert all(part in text for part in ("no difference shown", "+5.0 %", "+20 %", "newly failing", "only in B"))
