"""Plots: which files are written, and that every label is legible."""

from __future__ import annotations

import functools
import itertools
import struct

import pytest
from fixtures_report import OUT_OF_MEMORY, mixed_report, outcome, peaks, report, steady, workload

from gcbench.core.units import format_bytes
from gcbench.report import rows as tables
from gcbench.report.plots import label_placement, run_plots
from gcbench.report.plots.figure import MARKERS

NAMES = ("off", "per-layer", *(f"every:{k}" for k in range(2, 7)), *(f"segment:{k}" for k in range(2, 7)))
LONG = ("off", *(f"segment:{k}+offload:boundaries+pinned" for k in range(1, 12)))


def grid(num_strategies, num_workloads, *, names=NAMES, crowded=False, rounds=3):
    """Strategies in a row from cheap to lean, or `crowded` into one point, for each of some workloads."""
    sizes = [(batch, seq) for batch in (1, 4, 16) for seq in (64, 512)][:num_workloads]
    outcomes = []
    for batch, seq in sizes:
        work = workload(batch=batch, seq=seq)
        for place, name in enumerate(names[:num_strategies]):
            step = 0 if crowded and place else place
            backward, seconds = (4000, 0.5) if place == 0 else (2000 + 90 * step, 0.66 - 0.01 * step)
            memory, times = peaks(0.8 * backward, backward, 1500), steady(seconds, rounds, spread=0.01 * (place % 4))
            outcomes.append(outcome(name, memory, times, work=work, checkpointed=0 if place == 0 else 6))
    return report(*outcomes)


CASES = {
    "one strategy": grid(1, 1),
    "two strategies": grid(2, 1),
    "twelve strategies": grid(12, 1),
    "twelve in one point": grid(12, 1, crowded=True),
    "six panels": grid(12, 6),
    "five panels, long names": grid(12, 5, names=LONG),
    "long names in one point": grid(12, 1, names=LONG, crowded=True),
    "one sample, no intervals": grid(4, 2, rounds=1),
    "a failure and a broken proof": mixed_report(),
}


@pytest.mark.parametrize("case", ["one strategy", "two strategies", "six panels", "a failure and a broken proof"])
def test_files_are_written_and_named_beforehand(case, tmp_path):
    """report.md links to what `drawable` names, so both must agree."""
    written = run_plots.draw(CASES[case], tmp_path / "plots")
    assert [path.name for path in written] == list(run_plots.drawable(CASES[case]))
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {path.name for path in written}
    for path in written:
        content = path.read_bytes()
        assert content[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = struct.unpack(">II", content[16:24])
        assert 600 <= width <= 2600
        assert 300 <= height <= 3000


def test_only_off_has_no_tradeoff(tmp_path):
    assert [path.name for path in run_plots.draw(grid(1, 1), tmp_path)] == [run_plots.MEMORY]


def test_a_run_where_all_failed_draws_nothing(tmp_path):
    nothing = report(outcome("off", failure=OUT_OF_MEMORY), outcome("per-layer", failure=("crash", "x")))
    assert run_plots.draw(nothing, tmp_path / "plots") == ()
    assert run_plots.draw(report(), tmp_path / "plots") == ()


def test_times_without_memory_draw_nothing(tmp_path):
    assert run_plots.draw(report(outcome("off", None, steady(0.5))), tmp_path) == ()


@functools.cache
def tradeoff(case):
    """The figure after layout; the tests only read it."""
    figure = run_plots.tradeoff_figure(CASES[case])
    figure.draw_without_rendering()
    return figure


def boxes(axes):
    """The pixels of every strategy label as the real renderer sets it, and of every point."""
    renderer = axes.figure.canvas.get_renderer()
    texts = [text.get_window_extent(renderer) for text in axes.texts if text.get_gid() == run_plots.LABEL]
    points = [
        axes.transData.transform((line.get_xdata()[0], line.get_ydata()[0]))
        for line in axes.lines
        if line.get_marker() in MARKERS and len(line.get_xdata()) == 1 and line.get_linestyle() != "-"
    ]
    return texts, points


@pytest.mark.parametrize("case", [name for name in CASES if name != "one strategy"])
def test_every_point_is_named_and_no_label_lies_on_another_or_outside(case):
    for axes in tradeoff(case).axes:
        texts, _ = boxes(axes)
        shown = [container for container in axes.containers if container.get_label() is not None]
        assert len(texts) == len(shown) >= 2
        for one, other in itertools.combinations(texts, 2):
            assert not one.overlaps(other)
        frame = axes.get_window_extent()
        assert all(
            frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1 for box in texts
        )


@pytest.mark.parametrize("case", ["two strategies", "twelve strategies", "six panels", "long names in one point"])
def test_no_label_lies_on_a_point(case):
    for axes in tradeoff(case).axes:
        texts, points = boxes(axes)
        assert len(points) == len(texts)
        for box, (x, y) in itertools.product(texts, points):
            assert not (box.x0 - 4 <= x <= box.x1 + 4 and box.y0 - 4 <= y <= box.y1 + 4)


def test_the_panels_do_not_overlap():
    figure = run_plots.memory_figure(CASES["five panels, long names"])
    figure.draw_without_rendering()
    extents = [axes.get_tightbbox() for axes in figure.axes]
    assert len(extents) == 5
    for one, other in itertools.combinations(extents, 2):
        assert not one.overlaps(other)
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0 for box in extents)


def test_the_peak_of_every_bar_group_is_written_and_a_failure_is_a_labelled_gap():
    figure = run_plots.memory_figure(mixed_report())
    texts = [[text.get_text().strip() for text in axes.texts] for axes in figure.axes]
    assert texts[0] == [format_bytes(2480 * 2**20), *[format_bytes(2290 * 2**20)] * 2]
    assert set(texts[1]) == {"out of memory", "7.55 GiB", "10.48 GiB (failed the proof)"}


@pytest.mark.parametrize("case", ["a failure and a broken proof", "five panels, long names", "one strategy"])
def test_what_is_written_after_a_bar_stays_inside_the_panel(case):
    figure = run_plots.memory_figure(CASES[case])
    figure.draw_without_rendering()
    for axes in figure.axes:
        for text in axes.texts:
            assert text.get_window_extent().x1 <= axes.get_window_extent().x1 + 1


def test_titles_and_axes_say_model_device_precision_and_units():
    for figure in (
        run_plots.memory_figure(CASES["two strategies"]),
        run_plots.tradeoff_figure(CASES["two strategies"]),
    ):
        title = figure.get_suptitle()
        assert all(part in title for part in ("gpt2", "Example CPU", "cpu", "fp32"))
        assert "batch 1 × 64 tokens" in figure.axes[0].get_title(loc="left")
    assert "GiB" in run_plots.memory_figure(CASES["two strategies"]).axes[0].get_xlabel()
    axes = run_plots.tradeoff_figure(CASES["two strategies"]).axes[0]
    assert "%" in axes.get_xlabel()
    assert "%" in axes.get_ylabel()


def test_a_strategy_without_a_point_is_named_with_the_reason():
    failing = report(
        outcome("off", peaks(4, 5, 3), steady(0.5)),
        outcome("per-layer", peaks(2, 3, 3), steady(0.6)),
        outcome("every:2", failure=OUT_OF_MEMORY),
        outcome("every:3", peaks(1, 1, 1), steady(0.6), recomputed=0),
    )
    label = run_plots.tradeoff_figure(failing).axes[0].get_xlabel()
    assert "every:2 (out of memory)" in label
    assert "every:3 (failed the proof)" in label


def test_an_interval_many_times_wider_than_the_points_does_not_hide_them():
    """Three rounds can give an interval of hundreds of percent; the points must not shrink into one column."""
    wild = report(
        outcome("off", peaks(4, 5, 3), [[0.5], [0.5], [0.5]]),
        outcome("per-layer", peaks(2, 3, 3), [[0.55], [0.6], [2.75]]),
        outcome("every:2", peaks(3, 4, 3), [[0.55], [0.56], [0.555]]),
    )
    axes = run_plots.tradeoff_figure(wild).axes[0]
    left, right = axes.get_xlim()
    assert left < 0 < right
    centre = next(row.time_overhead_frac for row in tables.rows(wild) if row.strategy == "per-layer")
    assert 100 * centre / (right - left) > 0.05
    arrows = [line.get_marker() for line in axes.lines if line.get_marker() in "<>" and not line.get_clip_on()]
    assert arrows == [">"], "only the interval of per-layer goes on beyond an edge, and only beyond the right one"


def test_too_few_rounds_have_no_bars_and_say_so():
    few = report(
        *(outcome(name, peaks(4, high, 3), [[0.5], [high / 10]]) for name, high in (("off", 6), ("per-layer", 5)))
    )
    axes = run_plots.tradeoff_figure(few).axes[0]
    assert "too few rounds for an interval" in axes.get_xlabel() and "bars" not in axes.get_xlabel()
    assert all(container.lines[2] == () for container in axes.containers)


def test_a_failed_write_leaves_the_old_picture(tmp_path, monkeypatch):
    run_plots.draw(grid(2, 1), tmp_path)
    before = (tmp_path / run_plots.MEMORY).read_bytes()

    def full(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(tmp_path), "replace", full)
    with pytest.raises(OSError, match="No space"):
        run_plots.draw(grid(3, 1), tmp_path)
    assert (tmp_path / run_plots.MEMORY).read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == [run_plots.MEMORY, run_plots.TRADEOFF]


def test_a_label_that_another_point_is_as_near_to_has_a_line():
    """The only free place for the first label lies beside the second point: without a line it would name that one."""
    size, frame = label_placement.Box(0, 0, 40, 10), label_placement.Box(0, 0, 200, 40)
    points = [(100.0, 20.0), (170.0, 20.0)]
    symbols = [label_placement.Box(0, 0, 112, 40), label_placement.Box(160, 10, 180, 30)]
    placed = label_placement.place(size, 0, points, frame, symbols, [])
    assert placed.leader
    alone = label_placement.place(size, 0, points[:1], frame, [label_placement.Box(91, 11, 109, 29)], [])
    assert not alone.leader
