"""A report of an emulated card: what it shows, what it says in words, and what it must never show."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fixtures_report import outcome, peaks, report, steady, workload
from golden import check

import gcbench
from gcbench.core.records import EMULATED
from gcbench.report import compare as comparing
from gcbench.report import formats, report_file, rows
from gcbench.report.formats import terminal
from gcbench.report.formats.terminal import plain
from gcbench.report.plots import run_plots

WORK = workload(model="gpt2", device="cuda:0", batch=4, seq=1024)
OFF, EACH = peaks(7_000, 8_000, 2_500, reserved=8_200), peaks(3_200, 4_000, 2_500, reserved=4_800)
OUT = ("oom", "memory ran out in the forward phase; try a smaller --batch")
NEVER = ("tokens/s", "tok/s", "step time", "overhead", "proof", "identical", "no reference", "measured against")


def emulated(*outcomes, **changes):
    made = report(*outcomes, device_name="NVIDIA H100 80GB HBM3", source="emulated", **changes)
    return replace(made, machine=replace(made.machine, settings={EMULATED: "h100"}))


def cell(strategy, memory=OFF, **changes):
    """A cell as an emulated card leaves it: one round, no times, no gradients."""
    return outcome(strategy, memory, [()], diffs=[None], **{"work": WORK, **changes})


def two_batches():
    larger = replace(WORK, batch_size=128)
    return emulated(
        cell("off"),
        cell("per-layer", EACH, retries=1),
        cell("every:2", peaks(5_000, 6_000, 2_500, reserved=6_100), recomputed=5),
        outcome("off", work=larger, failure=OUT),
        outcome("per-layer", work=larger),
    )


@pytest.mark.parametrize("name", ["csv", "markdown", "json"])
def test_text_is_the_golden_one(name):
    found = formats.get(name)
    check(f"emulated{found.suffix}", found.render(two_batches()))


@pytest.mark.parametrize("width", [80, 120])
def test_terminal_is_the_golden_one(width):
    check(f"emulated-{width}.txt", terminal.render(two_batches(), width=width))


def test_the_saving_is_shown_without_a_proof_by_gradients():
    off, each = rows.rows(emulated(cell("off"), cell("per-layer", EACH)))
    assert (each.source, each.memory_saved_frac, each.proof) == ("emulated", 0.5, None)
    assert (off.memory_saved_frac, off.proof) == (0.0, None)
    empty = (each.step_time_s, each.tokens_per_s, each.time_overhead_frac, each.grad_rel_diff, each.grad_noise_floor)
    assert empty == (None,) * 5


@pytest.mark.parametrize("fault", [{"recomputed": 5}, {"without_grad": 2}])
def test_layers_that_are_not_recomputed_as_planned_withhold_the_saving(fault):
    """The trap: no proof by gradients taken for no proof at all."""
    _, each = rows.rows(emulated(cell("off"), cell("every:2", EACH, **fault)))
    assert each.memory_saved_frac is None and each.proof.startswith("FAILED")
    _, each = rows.rows(emulated(cell("off", without_grad=3), cell("every:2", EACH, without_grad=3)))
    assert each.memory_saved_frac == 0.5


def test_a_measured_run_without_a_reference_is_not_excused():
    _, each = rows.rows(report(cell("off"), cell("per-layer", EACH)))
    assert each.proof == "no reference"


@pytest.mark.parametrize("strategies", [("off", "per-layer"), ("per-layer",), ("off",)])
def test_nothing_is_said_of_times_or_gradients_that_do_not_exist(strategies):
    text = terminal.render(emulated(*(cell(name, EACH) for name in strategies)), width=300)
    assert not [word for word in NEVER if word in text]
    assert "not measured" not in text and "was measured" not in text
    assert "Emulated: PyTorch's own CUDA code and its allocator ran on a card that is not there." in text
    assert "cuda:0" not in text and "emulated on NVIDIA H100 80GB HBM3" in text


def test_no_plot_of_times_is_drawn():
    assert run_plots.drawable(two_batches()) == (run_plots.MEMORY, "curves-batch.png")


def test_the_plot_says_that_the_card_is_emulated():
    assert "emulated on NVIDIA H100" in run_plots.memory_figure(two_batches()).get_suptitle()


def test_a_stored_run_loads_as_a_frame(tmp_path):
    made = two_batches()
    report_file.save(made, tmp_path)
    found = gcbench.load(tmp_path)
    assert found.report == made and found.kind == "run"
    frame = found.to_frame()
    assert list(frame["source"]) == ["emulated"] * 5
    assert frame["step_time_s"].isna().all() and frame["peak_allocated_bytes"].notna().sum() == 3


def measured(*outcomes):
    return report(*outcomes, device_name="NVIDIA H100 80GB HBM3")


def test_a_comparison_says_which_run_is_emulated():
    timed = measured(outcome("off", OFF, steady(0.5), work=WORK))
    bigger = emulated(cell("off", peaks(7_000, 8_001, 2_500)))
    found = comparing.compare(timed, bigger, force=False)
    (change,) = found.changes
    assert (change.memory_verdict, change.time_verdict) == ("above", "not measured")
    text = plain(comparing.render(found), width=300)
    assert "A is measured (NVIDIA H100 80GB HBM3); B is emulated: real steps that compute nothing" in text
    assert "B has no times" in text and "rounds" not in text
    same = comparing.compare(emulated(cell("off")), bigger, force=False)
    assert same.changes[0].memory_verdict == "worse"
    assert "A and B have no times" in same.notices[0]


def test_two_measured_runs_are_compared_without_a_word_about_sources():
    timed = measured(outcome("off", OFF, steady(0.5), work=WORK))
    assert comparing.compare(timed, timed, force=False).notices == ()
