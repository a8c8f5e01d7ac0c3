"""The summary over batch sizes: where each strategy ends, and when its tokens/s may be called more or less."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import pytest
from fixtures_predicted import cpu_report
from fixtures_report import OUT_OF_MEMORY, mixed_report, outcome, peaks, steady
from fixtures_sweep import CARD_MIB, LONG, emulated_grid, measured_grid, predicted_grid, with_times

from gcbench.core.units import MIB
from gcbench.report import formats, largest, sweep
from gcbench.report.formats import markdown, terminal


def table(report):
    """The only summary, as header -> strategy -> cell."""
    (found,) = largest.summaries(report)
    names = found.columns[0].cells
    return {column.header: dict(zip(names, column.cells, strict=True)) for column in found.columns}


def sentence(report, dimension="batch_size"):
    (found,) = sweep.series(report, dimension)
    return largest.sentence(found)


def test_the_sentence_says_where_off_and_the_best_end_and_how_they_compare():
    assert sentence(measured_grid((1, 2, 4, 8, 16, 32))) == (
        "off fits batch 4 at 5,120 tokens/s; per-layer fits batch 16 at 6,606 tokens/s (29 % more)."
    )


def test_the_largest_size_tried_is_no_limit():
    """The trap: `fits batch 16` where nothing larger was tried."""
    report = measured_grid((1, 2, 4, 8, 16))
    assert "per-layer fits at least batch 16" in sentence(report)
    assert table(report)["largest batch"] == {"off": "4", "per-layer": "≥ 16", "every:2": "8"}
    assert table(report)["next size"]["per-layer"] == "largest tried"


@pytest.mark.parametrize("kind", ["crash", "timeout", "killed"])
def test_a_crash_above_is_no_limit_of_memory(kind):
    report = measured_grid(
        changed={
            ("per-layer", 8): outcome("per-layer", failure=(kind, "x")),
            ("per-layer", 16): outcome("per-layer", failure=(kind, "x")),
        }
    )
    assert table(report)["largest batch"]["per-layer"] == "≥ 4"
    assert table(report)["next size"]["per-layer"].startswith("8: ")


def test_a_difference_is_named_only_where_the_intervals_do_not_overlap():
    clear, noisy = measured_grid(), measured_grid(spread=0.3)
    assert table(clear)["against off"] == {"off": "0 %", "per-layer": "+29 %", "every:2": "+21 %"}
    assert set(table(noisy)["against off"].values()) == {"0 %", largest.NONE_SHOWN}
    assert "(no difference shown)" in sentence(noisy)
    assert "more" not in sentence(noisy) and "less" not in sentence(noisy)


def test_a_slower_strategy_is_called_slower():
    """Both fit everywhere, so that recomputing only costs."""
    text = sentence(measured_grid((1, 2), names=("off", "per-layer"), spread=0.001))
    assert text.endswith("(9.1 % less).")


def test_without_intervals_nothing_is_called_more():
    few = measured_grid(rounds=2)
    assert "(too few rounds to compare)" in sentence(few)
    assert table(few)["against off"]["per-layer"] == largest.NO_INTERVAL


def broken(strategy="per-layer", seconds=0.01):
    """A cell that is far faster, because it recomputed too few layers."""
    return outcome(strategy, peaks(3000, 4000, 3000), steady(seconds), recomputed=3)


def test_a_failed_proof_is_never_a_gain():
    """The trap: a strategy that recomputes nothing is the fastest at the largest batch."""
    report = measured_grid(changed={("per-layer", 16): broken()})
    text = sentence(report)
    assert "per-layer at batch 16 failed the proof, so its figures are left out." in text
    assert table(report)["largest batch"]["per-layer"] == "≥ 8"
    assert table(report)["next size"]["per-layer"] == "16: failed the proof"
    assert f"{512 * 16 / 0.01:,.0f}" not in text + "".join(table(report)["tokens/s"].values())


def test_gradients_that_were_wrong_at_a_smaller_size_are_not_trusted_where_off_cannot_check_them():
    """Off runs out of memory at 8, so that the cell at 16 has no reference; at 4 the gradients were wrong."""
    wrong = outcome("per-layer", peaks(3000, 4000, 3000), steady(0.3), diffs=[0.5] * 3)
    unchecked = outcome("per-layer", peaks(9000, 9900, 3000), steady(0.3), diffs=[None] * 3)
    changed = {("per-layer", size): unchecked for size in (8, 16)}
    assert table(measured_grid(changed=changed))["largest batch"]["per-layer"] == "≥ 16"
    doubtful = measured_grid(changed={**changed, ("per-layer", 4): wrong})
    assert table(doubtful)["largest batch"]["per-layer"] == "≥ 2"


def test_where_off_does_not_repeat_itself_nothing_is_compared():
    report = measured_grid((1, 2, 4))
    outcomes = tuple(
        replace(each, rounds=tuple(replace(r, grad_rel_diff=0.5 if r.round else 0.0) for r in each.rounds))
        for each in report.outcomes
    )
    unrepeatable = replace(report, outcomes=outcomes)
    assert table(unrepeatable)["against off"]["per-layer"] == "–"
    assert "not compared with off, as the gradients are not proven" in sentence(unrepeatable)


def test_off_that_fits_nowhere_or_was_not_tried_is_said():
    assert sentence(measured_grid((8, 16))).startswith("off does not fit at batch 8 or more; per-layer fits")
    assert sentence(measured_grid(names=("per-layer",))).startswith("off is not among the strategies; per-layer fits")
    assert sentence(measured_grid(names=("off",))) == "off fits batch 4 at 5,120 tokens/s."


def test_the_largest_batch_is_named_where_another_strategy_is_faster():
    slow = outcome("per-layer", peaks(3000, 4000, 3000), steady(9.0))
    text = sentence(measured_grid(changed={("per-layer", 16): slow}))
    assert "every:2 fits batch 8 at" in text and "per-layer fits at least batch 16 at" in text


def test_nothing_that_fits_has_no_summary():
    assert largest.summaries(measured_grid(limit=100)) == ()
    assert largest.summaries(measured_grid((4,))) == ()


@pytest.mark.parametrize("build", [mixed_report, cpu_report])
def test_workloads_that_differ_in_batch_and_length_are_no_series(build):
    """The trap: a line from batch 1 × 64 to batch 8 × 256, which shows neither."""
    assert largest.summaries(build()) == ()


def test_lengths_have_a_summary_where_the_batch_does_not_vary():
    (found,) = largest.summaries(measured_grid((2,), (512, 1024, 2048, 4096)))
    assert found.title == "At each strategy's longest sequence"
    assert "off fits 1024 tokens at" in found.summary and "per-layer fits at least 4096 tokens" in found.summary


def test_each_length_has_its_own_limits():
    (found,) = largest.summaries(measured_grid((1, 2, 4, 8), (512, 1024)))
    by_header = {column.header: column.cells for column in found.columns}
    assert list(zip(by_header["strategy"], by_header["at"], by_header["largest batch"], strict=True)) == [
        ("off", "512 tokens", "4"),
        ("per-layer", "512 tokens", "≥ 8"),
        ("every:2", "512 tokens", "≥ 8"),
        ("off", "1024 tokens", "2"),
        ("per-layer", "1024 tokens", "≥ 8"),
        ("every:2", "1024 tokens", "4"),
    ]
    assert [line.partition(":")[0] for line in found.summary.splitlines()] == ["At 512 tokens", "At 1024 tokens"]


def test_an_emulated_report_has_memory_and_no_times():
    headers = list(table(emulated_grid()))
    assert "reserved" in headers and not {"tokens/s", "against off"} & set(headers)
    assert sentence(emulated_grid()) == "off fits batch 4; per-layer fits at least batch 16."


def test_a_prediction_without_times_has_no_column_of_them():
    (found,) = largest.summaries(predicted_grid())
    assert found.subtitle == "512 tokens · predicted for Example Card 24 GB, 24.00 GiB"
    assert [column.header for column in found.columns] == [
        "strategy", "largest batch", "peak allocated", "process", "next size",
    ]  # fmt: skip
    assert table(predicted_grid())["next size"] == {
        "off": "8: does not fit", "per-layer": "largest tried", "every:2": "16: does not fit",
    }  # fmt: skip
    assert sentence(predicted_grid((1, 2))) == "Every strategy fits batch 2, the largest tried."


def test_predicted_times_are_compared_by_their_bands(monkeypatch):
    sure = with_times(predicted_grid(), monkeypatch, half_width=0.02)
    assert "% more)" in sentence(sure)
    assert "(no difference shown)" in sentence(with_times(predicted_grid(), monkeypatch, half_width=0.6))


def test_what_is_too_close_to_tell_or_in_the_reserve_is_not_said_to_fit():
    """At batch 4 off needs 15,000 MiB, and headroom shrinks with what is added to the process."""
    room = CARD_MIB - 15_000
    close = predicted_grid(plus_mib=room - 100)
    assert table(close)["next size"]["off"] == "4: too close to tell"
    assert table(close)["largest batch"]["off"] == "≥ 2"
    reserved = predicted_grid(plus_mib=room - 1000, reserve=0.05)
    assert table(reserved)["next size"]["off"] == "4: fits only in the reserve"
    assert table(reserved)["largest batch"]["off"] == "2"


def test_the_memory_is_what_counts_against_the_limit():
    """The trap: allocated memory below a line that the process crosses."""
    assert sweep.counted_memory(measured_grid()).name == "process"
    assert sweep.counted_memory(emulated_grid()).name == "reserved"
    limited = sweep.counted_memory(measured_grid(settings={"memory_limit": 2**34}))
    assert (limited.name, limited.limit_bytes, limited.limit_name) == ("reserved", 2**34, "memory limit")
    on_cpu = sweep.counted_memory(measured_grid(device="cpu"))
    assert (on_cpu.name, on_cpu.limit_name) == ("allocated", "memory of the machine")
    card = sweep.counted_memory(predicted_grid(reserve=0.05))
    assert (card.name, card.limit_bytes) == ("process", CARD_MIB * MIB)
    assert card.usable_bytes == int(0.95 * CARD_MIB * MIB)
    assert sweep.counted_memory(predicted_grid(limit=None)).limit_bytes is None


def test_cells_that_are_missing_are_said_to_be():
    report = measured_grid()
    without = replace(
        report, outcomes=tuple(each for each in report.outcomes if each.cell.key not in ("b8-s512-per-layer",))
    )
    assert table(without)["largest batch"]["per-layer"] == "≥ 16"
    shorter = replace(
        report,
        outcomes=tuple(
            each for each in report.outcomes if not each.cell.key.endswith("per-layer") or "b16" not in each.cell.key
        ),
    )
    assert table(shorter)["next size"]["per-layer"] == "16: not among the cells"
    assert table(shorter)["largest batch"]["per-layer"] == "≥ 8"


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("names", [("off", "per-layer"), LONG])
def test_the_summary_is_below_the_tables_and_fits_the_screen(width, names):
    text = terminal.render(measured_grid(names=names), width=width)
    assert max(map(len, text.splitlines())) <= width
    assert text.rindex("At each strategy's largest batch") > text.rindex("batch 16 × 512 tokens")


def test_markdown_has_the_summary_before_the_plots_and_json_has_the_rows_alone():
    report = measured_grid()
    text = markdown.render(report)
    assert text.index("## At each strategy's largest batch") < text.index("## Plots")
    assert "512 tokens · measured on Example Card (cuda:0)." in text
    document = json.loads(formats.get("json").render(report))
    assert len(document["rows"]) == len(report.outcomes)
    assert set(document) == {"schema", "rows"}


def test_out_of_memory_at_a_small_size_and_not_at_a_larger_one_is_taken_as_it_is():
    """Memory of a shared card: what ran is what fits."""
    report = measured_grid(changed={("per-layer", 2): outcome("per-layer", failure=OUT_OF_MEMORY)})
    assert table(report)["largest batch"]["per-layer"] == "≥ 16"


def test_sizes_are_sorted_whatever_their_order_on_the_command_line():
    for order in itertools.permutations((1, 4, 16)):
        (found,) = sweep.series(measured_grid(order), "batch_size")
        assert found.sizes == (1, 4, 16)
        assert [size for size, _ in found.of("per-layer")] == [1, 4, 16]
