"""Predicted times in tables and sentences: centre and band, and never as if they were measured."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fixtures_predicted import CARD, card_report, cell, predicted_report, prediction
from fixtures_report import mixed_report, peaks

from gcbench.core.step_time import StepTime
from gcbench.report import compare, formats, gaps, predicted_times, sentences
from gcbench.report import predictions as predicted
from gcbench.report import rows as tables
from gcbench.report.formats import markdown, terminal
from gcbench.report.plots import run_plots

RATES = "the published rates of Example Card"
TOKENS = CARD.batch_size * CARD.seq_len


def timed(strategy, peak, seconds, *, why=None, **changes):
    time = None if seconds is None else StepTime(seconds=seconds, basis="card", source=RATES, **changes)
    found = prediction(peaks(peak - 100, peak, 400, reserved=peak + 100, process=peak + 500), limit=24 * 1024)
    return cell(strategy, replace(found, time=time, why_no_time=why))


def report(*more):
    return predicted_report(timed("off", 20_000, 1.0), timed("per-layer", 9_000, 1.25), *more)


def summary(built):
    (cells,) = predicted.by_workload(built).values()
    return predicted.summary(cells)


def test_a_row_has_its_time_its_band_and_its_source():
    off, per_layer = tables.rows(report())
    assert (off.step_time_s, off.tokens_per_s, off.time_source) == (1.0, TOKENS, RATES)
    assert off.step_time_low_s < 1.0 < off.step_time_high_s
    assert (off.time_overhead_frac, off.time_overhead_low_frac, off.time_overhead_high_frac) == (0.0, 0.0, 0.0)
    assert per_layer.time_overhead_frac == pytest.approx(0.25)
    assert per_layer.time_overhead_low_frac < 0.25 < per_layer.time_overhead_high_frac


def test_without_off_there_is_no_overhead():
    (row,) = tables.rows(predicted_report(timed("per-layer", 9_000, 1.25)))
    assert row.step_time_s == 1.25 and row.time_overhead_frac is None


def test_the_source_is_the_last_column():
    assert tables.columns()[-1] == "time_source"
    assert {row.time_source for row in tables.rows(mixed_report())} == {None}


def test_tables_have_the_columns_of_time_where_there_are_times():
    headers = [column.header for column in predicted.table_columns(tables.rows(report()))]
    assert headers[-5:] == ["step time", "overhead", "tokens/s", "headroom", "fits"]
    assert "step time" not in [column.header for column in predicted.table_columns(tables.rows(card_report()))]


@pytest.mark.parametrize("width", [60, 80, 100, 120, 200])
def test_no_line_is_wider_than_the_screen(width):
    text = terminal.render(report(), width=width)
    assert max(map(len, text.splitlines())) <= width
    assert "+25 %" in text or width < 80


def test_wide_tables_show_bands_and_narrow_ones_centres():
    wide, narrow = terminal.render(report(), width=200), terminal.render(report(), width=80)
    assert "~1.25 s (1.00 to 1.56 s)" in wide and "+25 % (17 to 33 %)" in wide
    assert "~1.25 s" in narrow and "(17 to 33 %)" not in narrow.split("\n\n")[0]


def test_the_summary_says_what_checkpointing_costs():
    text = summary(report())
    assert "per-layer saves 55 % of peak memory for about 25 % more time (predicted: 17 to 33 %)." in text
    assert f"Times are estimates from {RATES}." in text


def test_a_cell_without_a_time_says_why():
    text = summary(report(timed("offload", 8_000, None, why="copies are not modelled")))
    assert "The time of offload is not predicted: copies are not modelled." in text
    assert "per-layer saves" in text
    alone = summary(predicted_report(timed("off", 20_000, None, why="nothing is known")))
    assert "The time is not predicted: nothing is known." in alone


def test_nothing_is_said_of_time_in_reports_of_before():
    assert "ime" not in predicted.summary(next(iter(predicted.by_workload(card_report()).values()))).replace(
        "ometime", ""
    )
    assert gaps.not_covered(card_report())[0] == "time: how long a step takes is not predicted"
    assert predicted.not_measured(card_report()).endswith("Its time is not predicted.")


@pytest.mark.parametrize("name", ["terminal", "markdown"])
def test_a_predicted_time_is_never_called_measured(name):
    text = " ".join(formats.get(name).render(report()).split())
    assert f"{predicted.NOT_MEASURED}, and its time." in text
    assert "95 %" not in text and "Measured" not in text


def test_markdown_lists_what_is_not_known_of_times():
    text = markdown.render(report(timed("offload", 8_000, None, why="copies are not modelled")))
    assert "- time: copies are not modelled" in text and "- the exact time of a step" in text


def test_a_predicted_time_is_not_compared_with_a_measured_one():
    """The trap: a difference between an estimate and a measurement, as if the run had become slower."""
    guess = report()
    measured = replace(guess, source="measured")
    mixed = compare.compare(measured, guess, force=False)
    assert all(change.step_time_b_s is None and change.time_change_frac is None for change in mixed.changes)
    (note,) = sentences.sources(measured, guess)
    assert note.endswith("the times of B are predicted, and are not compared with measured ones")
    same = compare.compare(guess, guess, force=False)
    assert [change.step_time_a_s for change in same.changes] == [1.0, 1.25]


def test_the_trade_off_is_plotted_with_bands_that_are_labelled_as_predicted():
    assert run_plots.TRADEOFF in run_plots.drawable(report())
    assert run_plots.TRADEOFF not in run_plots.drawable(card_report())
    figure = run_plots.tradeoff_figure(report())
    assert "predicted; bars: band" in figure.axes[0].get_xlabel()


def test_a_band_in_one_unit_names_it_once():
    (row,) = tables.rows(predicted_report(timed("off", 20_000, 0.1)))
    assert predicted_times.step_time(row) == "~100 ms (80 to 125 ms)"
    (row,) = tables.rows(predicted_report(timed("off", 20_000, 0.9)))
    assert predicted_times.step_time(row) == "~900 ms (720 ms to 1.12 s)"
