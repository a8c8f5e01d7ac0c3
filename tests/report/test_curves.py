"""Curves over batch size and length: what is drawn, what is marked, and that every label is legible."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace

import pytest
from fixtures_predicted import cpu_report
from fixtures_report import mixed_report, outcome, peaks, steady
from fixtures_sweep import CARD_MIB, LONG, NAMES, emulated_grid, measured_grid, predicted_grid, with_times

from gcbench.report import report_file
from gcbench.report.formats import markdown
from gcbench.report.plots import curve_panels, curves, run_plots
from gcbench.report.plots.figure import MARKERS
from gcbench.report.publish import publish
from gcbench.report.run_folder import Store

LIMIT_GIB = CARD_MIB / 1024
CASES = {
    "three strategies": measured_grid(),
    "one strategy": measured_grid(names=("off",)),
    "twelve strategies": measured_grid((1, 2, 4, 8, 16, 32), names=NAMES),
    "twelve batches, long names": measured_grid(range(1, 13), names=LONG, model="an-organisation/a-model-" + "x" * 90),
    "twelve batches, 1 to 2048": measured_grid([2**power for power in range(12)], limit=10**7),
    "six lengths": measured_grid((1, 2, 4), (128, 256, 512, 1024, 2048, 4096)),
    "long names, three lengths": measured_grid((1, 2, 4, 8), (512, 1024, 2048), names=LONG),
    "two batches": measured_grid((1, 2), limit=10**6),
    "wild intervals": measured_grid(spread=1.5),
    "too few rounds": measured_grid(rounds=2),
    "equal peaks and times": measured_grid((1, 2), names=("every:3", "every:4", "every:5")),
    "one cell fits": measured_grid((1, 8, 16), names=("off", "per-layer"), limit=7300),
    "a CPU": measured_grid((1, 2), device="cpu", limit=10**6),
    "emulated": emulated_grid(),
    "predicted": predicted_grid(reserve=0.05),
    "predicted, three lengths": predicted_grid(seqs=(256, 512, 1024), names=NAMES),
    "predicted without a limit": predicted_grid(limit=None),
}


@functools.cache
def figure(case, dimension="batch_size"):
    """The figure after layout; the tests only read it."""
    drawn = curves.curves_figure(CASES[case], dimension)
    drawn.draw_without_rendering()
    return drawn


def points(axes):
    """The markers of cells that have figures, as (x, y); crosses and limits are left out."""
    return [
        (line.get_xdata()[0], line.get_ydata()[0])
        for container in axes.containers
        for line in [container.lines[0]]
        if line is not None and line.get_marker() in MARKERS
    ]


def crosses(axes):
    return sum(len(line.get_xdata()) for line in axes.lines if line.get_marker() == "x")


def legend(drawn):
    return [text.get_text() for text in drawn.legends[0].get_texts()]


def note(drawn):
    return " ".join(drawn.legends[0].get_title().get_text().split())


def test_there_is_a_picture_for_each_dimension_that_varies_alone():
    assert list(curves.files(measured_grid((1, 2)))) == ["curves-batch.png"]
    assert list(curves.files(measured_grid((2,), (64, 128)))) == ["curves-length.png"]
    assert list(curves.files(measured_grid((1, 2), (64, 128)))) == ["curves-batch.png", "curves-length.png"]
    assert curves.files(measured_grid((2,))) == curves.files(mixed_report()) == curves.files(cpu_report()) == {}
    assert curves.files(measured_grid(limit=100)) == {}, "nothing fits"


def test_the_report_links_what_is_written(tmp_path):
    report = measured_grid((1, 2), (64, 128))
    written = [path.name for path in run_plots.draw(report, tmp_path)]
    assert written == list(run_plots.drawable(report))
    assert {"curves-batch.png", "curves-length.png"} <= set(written)
    text = markdown.render(report)
    assert "![Memory and speed against batch size, by strategy](plots/curves-batch.png)" in text
    assert "(plots/curves-length.png)" in text


def test_times_add_three_panels():
    titles = [axes.get_title(loc="left") for axes in figure("three strategies").axes]
    assert titles == ["peak memory", "step time", "tokens per second", "tokens/s at the largest batch that fits"]
    for case in ("emulated", "predicted", "predicted without a limit"):
        assert [axes.get_title(loc="left") for axes in figure(case).axes] == ["peak memory"]


@pytest.mark.parametrize(
    ("case", "source"),
    [
        ("three strategies", "measured"),
        ("emulated", "emulated on Example Card"),
        ("predicted", "predicted for Example Card 24 GB, 24.00 GiB"),
    ],
)
def test_the_heading_says_where_the_figures_come_from(case, source):
    assert source in figure(case).get_suptitle()
    assert "512 tokens" in figure(case).get_suptitle()


def test_each_cell_is_a_point_or_a_cross():
    drawn = figure("three strategies")
    fitting, cells = 3 + 4 + 5, 3 * 5
    assert [len(points(axes)) for axes in drawn.axes[:3]] == [fitting] * 3
    assert crosses(drawn.axes[0]) == cells - fitting
    assert "out of memory" in legend(drawn)
    assert "does not fit" in legend(figure("predicted"))
    assert crosses(figure("two batches").axes[0]) == 0


def test_no_cross_lies_on_another_or_below_the_limit():
    for case in ("three strategies", "twelve strategies", "predicted, three lengths", "one cell fits"):
        for axes in figure(case).axes:
            places = [
                (x, y)
                for line in axes.lines
                if line.get_marker() == "x"
                for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)
            ]
            assert len(set(places)) == len(places)
            limit = LIMIT_GIB if case != "one cell fits" else 7300 / 1024
            assert all(limit < y < axes.get_ylim()[1] for _, y in places)
            assert all(tick <= 1.05 * limit for tick in axes.get_yticks()) or not places


def test_the_limit_is_a_line_and_the_reserve_of_a_prediction_a_second():
    heights = [line.get_ydata()[0] for line in figure("predicted").axes[0].lines if line.get_color() == "#7A0019"]
    assert heights == pytest.approx([LIMIT_GIB, 0.95 * LIMIT_GIB])
    assert "device memory, 24.00 GiB" in legend(figure("predicted"))
    assert "usable, 22.80 GiB (less the reserve)" in legend(figure("predicted"))


def test_a_device_far_larger_than_the_peaks_does_not_flatten_the_curves():
    drawn = figure("a CPU")
    assert "memory of the machine, 977 GiB, is above the scale" in note(drawn)
    highest = max(y for _, y in points(drawn.axes[0]))
    assert drawn.axes[0].get_ylim()[1] < 1.2 * highest


@pytest.mark.parametrize("case", CASES)
def test_every_point_lies_inside_its_panel(case):
    for axes in figure(case).axes:
        (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
        if axes.get_xlabel() == "tokens/s":
            continue
        assert points(axes)
        assert all(left < x < right and bottom < y < top for x, y in points(axes))


def test_wide_intervals_do_not_flatten_the_curves():
    for axes in figure("wild intervals").axes[1:3]:
        assert max(y for _, y in points(axes)) > 0.25 * axes.get_ylim()[1]


@pytest.mark.parametrize("case", CASES)
def test_nothing_overlaps_or_exceeds_the_edge(case):
    drawn = figure(case)
    renderer = drawn.canvas.get_renderer()
    boxes = [axes.get_tightbbox(renderer) for axes in drawn.axes]
    boxes += [drawn.legends[0].get_window_extent(renderer), drawn._suptitle.get_window_extent(renderer)]
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other)
    for box in boxes:
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= drawn.bbox.x1 + 1 and box.y1 <= drawn.bbox.y1 + 1


@pytest.mark.parametrize("case", CASES)
def test_labels_of_sizes_do_not_touch_and_those_of_bars_stay_inside(case):
    renderer = figure(case).canvas.get_renderer()
    for axes in figure(case).axes:
        labels = [label for label in axes.get_xticklabels() if label.get_text()]
        assert labels
        extents = sorted((label.get_window_extent(renderer) for label in labels), key=lambda box: box.x0)
        assert all(one.x1 < other.x0 for one, other in itertools.pairwise(extents))
        for text in axes.texts:
            assert text.get_window_extent(renderer).x1 <= axes.get_window_extent().x1 + 1


def test_sizes_that_span_a_large_factor_have_a_logarithmic_axis():
    assert figure("three strategies").axes[0].get_xscale() == "log"
    assert figure("two batches").axes[0].get_xscale() == "linear"
    assert "log scale" in figure("three strategies").axes[0].get_xlabel()


def test_more_lengths_than_have_room_are_named():
    drawn = figure("six lengths")
    assert len(drawn.axes) == 4 * curves.MOST_SERIES
    assert "not drawn: 2048 tokens, 4096 tokens" in note(drawn)
    assert [axes.get_title(loc="left") for axes in drawn.axes[::4]] == [
        f"peak memory · {length} tokens" for length in (128, 256, 512, 1024)
    ]


def test_a_length_at_which_nothing_fits_is_named():
    drawn = curves.curves_figure(measured_grid((1, 2), (512, 2**16)), "batch_size")
    assert len(drawn.axes) == 4
    assert "nothing to draw at 65536 tokens" in note(drawn)


def test_each_bar_is_labelled_with_its_batch():
    axes = figure("three strategies").axes[3]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["off", "per-layer", "every:2"]
    assert [text.get_text().strip().partition(" · ")[2] for text in axes.texts] == ["batch 4", "≥ batch 16", "batch 8"]


def test_a_failed_proof_is_in_no_panel_and_said():
    broken = outcome("per-layer", peaks(3000, 4000, 3000), steady(0.01), recomputed=3)
    drawn = curves.curves_figure(measured_grid(changed={("per-layer", 16): broken}), "batch_size")
    assert "not shown: per-layer at batch 16 (failed the proof)" in note(drawn)
    assert [len(points(axes)) for axes in drawn.axes[:3]] == [3 + 4 + 4] * 3
    assert "≥ batch 8" in drawn.axes[3].texts[1].get_text()
    assert drawn.axes[2].get_ylim()[1] < 10_000


def test_intervals_are_said_to_be_what_they_are(monkeypatch):
    assert "95 % interval" in note(figure("three strategies"))
    assert "too few rounds for an interval" in note(figure("too few rounds"))
    timed = with_times(predicted_grid(), monkeypatch, half_width=0.05)
    drawn = curves.curves_figure(timed, "batch_size")
    assert "band of the prediction" in note(drawn) and "95 %" not in note(drawn)
    assert len(drawn.axes) == 4


def test_a_cell_that_is_too_close_to_tell_is_hollow():
    """Off needs 15,000 MiB at batch 4, of a card on which 100 MiB more are left."""
    close = predicted_grid(plus_mib=CARD_MIB - 15_000 - 100)
    drawn = curves.curves_figure(close, "batch_size")
    hollow = [
        container.lines[0].get_xdata()[0]
        for container in drawn.axes[0].containers
        if container.lines[0].get_markerfacecolor() == "white"
    ]
    assert hollow == [4]
    assert "hollow: too close to tell" in legend(drawn)


def test_strategies_keep_their_colour_and_marker_in_every_panel():
    drawn = figure("three strategies")
    for axes in drawn.axes[:3]:
        styles = {(c.lines[0].get_color(), c.lines[0].get_marker()) for c in axes.containers}
        assert styles == {("#000000", "o"), ("#0072B2", "s"), ("#D55E00", "^")}


def test_plots_that_a_report_no_longer_has_are_removed_from_its_folder(tmp_path):
    """The trap: a resumed run whose last batch now fails leaves the curves of before beside the new table."""
    report = measured_grid((1, 2))
    with Store.create(tmp_path / "r") as store:
        publish(report, store)
        assert (store.folder / "plots" / "curves-batch.png").exists()
        (store.folder / "plots" / "mine.png").write_bytes(b"a user's own")
        publish(replace(report, outcomes=report.outcomes[:3]), store)
        left = {path.name for path in (store.folder / "plots").iterdir()}
    assert left == {"memory.png", "tradeoff.png", "mine.png"}


def test_report_draws_them_again(cli, tmp_path):
    report_file.save(measured_grid((1, 2)), tmp_path)
    cli("report", str(tmp_path), "--format", "png")
    assert (tmp_path / "plots" / "curves-batch.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_no_times_in_one_of_several_lengths_is_said():
    report = measured_grid((1, 2), (256, 512))
    outcomes = tuple(
        replace(each, rounds=tuple(replace(r, step_times_s=()) for r in each.rounds))
        if each.cell.workload.seq_len == 512
        else each
        for each in report.outcomes
    )
    drawn = curves.curves_figure(replace(report, outcomes=outcomes), "batch_size")
    assert [text.get_text() for axes in drawn.axes[5:7] for text in axes.texts] == ["no times"] * 2


def test_the_colour_of_the_limit_is_no_strategys():
    from gcbench.report.plots.figure import OKABE_ITO

    assert curve_panels.LIMIT_COLOUR not in OKABE_ITO
