"""Plots of memory over a predicted step: their files, one scale for all strategies, and legible texts."""

from __future__ import annotations

import functools
import itertools
from dataclasses import replace

import pytest
from fixtures_predicted import card_report, cell, cpu_report, predicted_report, prediction
from fixtures_report import mixed_report, peaks, workload

from gcbench.core.units import format_bytes
from gcbench.report import predictions as predicted
from gcbench.report.explanation import kind_name
from gcbench.report.plots import memory_over_step, run_plots

GPU = ("off", "per-layer", *(f"every:{k}" for k in range(2, 7)), "segment:4+offload:boundaries+pinned")


def many(limit=80_000):
    """Eight strategies, one with a long name, on a card that is far too large or, with a smaller limit, too small."""
    return predicted_report(
        *(
            cell(
                name, prediction(peaks(9000, 12_000 - 500 * place, 4000, reserved=14_000, process=14_400), limit=limit)
            )
            for place, name in enumerate(GPU)
        )
    )


def brief_update():
    """The optimizer's phase is one point of sixty, the backward pass has three."""
    report = predicted_report(cell("off", prediction(peaks(900, 1000, 400), standing=300), work=workload()))
    (only,) = report.outcomes
    short = replace(only.prediction.curve, phases=(("forward", 0), ("backward", 56), ("optimizer", 59)))
    return replace(report, outcomes=(replace(only, prediction=replace(only.prediction, curve=short)),))


CASES = {
    "a card": card_report(),
    "a CPU": cpu_report(),
    "eight strategies": many(),
    "too small a card": many(limit=4000),
    "a brief update": brief_update(),
}


@functools.cache
def figure(case):
    """The picture of the last workload after layout; the tests only read it."""
    report = CASES[case]
    drawn = memory_over_step.step_figure(report, list(memory_over_step.files(report).values())[-1])
    drawn.draw_without_rendering()
    return drawn


def test_one_file_per_workload_named_by_batch_and_length(tmp_path):
    assert [path.name for path in run_plots.draw(card_report(), tmp_path / "one")] == [run_plots.MEMORY, "step.png"]
    written = run_plots.draw(cpu_report(), tmp_path / "two")
    assert [path.name for path in written] == [run_plots.MEMORY, "step-b1-s64.png", "step-b8-s256.png"]
    assert tuple(path.name for path in written) == run_plots.drawable(cpu_report())
    assert all(path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" for path in written)


def test_a_measurement_has_no_plot_of_the_step():
    assert memory_over_step.files(mixed_report()) == {}


def test_cells_without_a_curve_draw_nothing(tmp_path):
    nothing = predicted_report(cell("off", None, failure=("unsupported", "why")))
    assert run_plots.draw(nothing, tmp_path) == ()


@pytest.mark.parametrize("case", CASES)
def test_all_strategies_share_one_scale(case):
    """The trap: panels that each fill their own height, so that a saving of half looks like none."""
    axes = figure(case).axes
    assert len({panel.get_ylim() for panel in axes}) == 1
    assert axes[0].get_ylim()[0] == 0


def test_each_strategy_has_a_panel_or_is_listed_as_not_shown():
    drawn = figure("a card")
    assert [panel.get_title(loc="left") for panel in drawn.axes] == [
        "off (0/12 layers)\ndoes not fit, by 10.57 GiB",
        "per-layer (12/12 layers)\nheadroom 4.08 GiB",
        "every:4 (3/12 layers)\nheadroom 276 MiB, too close to tell",
    ]
    assert "not shown: every:2 (not supported)" in drawn.get_supxlabel()


@pytest.mark.parametrize("case", CASES)
def test_each_peak_is_labelled_with_its_size(case):
    report = CASES[case]
    cells = list(predicted.by_workload(report).values())[-1]
    sizes = [c.row.peak_allocated_bytes for c in cells if c.prediction]
    labels = [text for axes in figure(case).axes for text in axes.texts if text.get_gid() == memory_over_step.PEAK]
    assert [label.get_text() for label in labels] == [format_bytes(size) for size in sizes]
    # The curve adds sizes up, without the rounding of an allocator: the highest point may lie a little lower.
    for label, size in zip(labels, sizes, strict=True):
        unit = 2**30 if "GiB" in label.axes.get_ylabel() else 2**20
        assert label.xy[1] == pytest.approx(size / unit, rel=0.06)


def test_what_is_stacked_adds_up():
    """The trap: kinds drawn one over another instead of one on another."""
    (cell_, *_) = list(predicted.by_workload(CASES["a CPU"]).values())[-1]
    curve = cell_.prediction.curve
    axes = figure("a CPU").axes[0]
    tops = [max(path.vertices[:, 1].max() for path in band.get_paths()) for band in axes.collections]
    heights = [max(map(sum, zip(*curve.nbytes[: n + 1], strict=True))) / 2**30 for n in range(len(curve.kinds))]
    assert tops == pytest.approx(heights)
    assert [band.get_label() for band in axes.collections] == [kind_name(kind) for kind in curve.kinds]


def test_the_axis_is_labelled_as_not_time():
    for case in CASES:
        assert memory_over_step.ORDER_NOT_TIME in " ".join(figure(case).get_supxlabel().split())
        for axes in figure(case).axes:
            assert [label.get_text().strip() for label in axes.get_xticklabels()] == [
                "forward",
                "backward",
                "optimizer",
            ]


def lines(axes):
    return {
        line.get_label(): line.get_ydata()[0]
        for line in axes.lines
        if line.get_label().startswith(("device", "process"))
    }


def test_the_memory_of_the_device_and_of_the_process_are_lines():
    """What must fit is what the process takes, not what tensors hold."""
    assert lines(figure("a card").axes[0]) == pytest.approx(
        {"process memory": 35_400 / 1024, "device memory, 24.00 GiB": 24.0}
    )
    assert lines(figure("too small a card").axes[0])["device memory, 3.91 GiB"] == pytest.approx(4000 / 1024)
    assert lines(figure("a CPU").axes[0]) == {}


def test_a_device_far_larger_than_the_step_does_not_flatten_the_curves():
    drawn = figure("eight strategies")
    assert "device memory, 78.12 GiB, is above the scale" in " ".join(drawn.get_supxlabel().split())
    assert drawn.axes[0].get_ylim()[1] < 20
    assert list(lines(drawn.axes[0])) == ["process memory"]


@pytest.mark.parametrize("case", CASES)
def test_nothing_overlaps_or_exceeds_the_edge(case):
    drawn = figure(case)
    renderer = drawn.canvas.get_renderer()
    (legend,) = drawn.legends
    boxes = [axes.get_tightbbox(renderer) for axes in drawn.axes]
    boxes += [legend.get_window_extent(renderer), drawn._supxlabel.get_window_extent(renderer)]
    boxes += [drawn._suptitle.get_window_extent(renderer)]
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other)
    for box in boxes:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= drawn.bbox.x1 and box.y1 <= drawn.bbox.y1


@pytest.mark.parametrize("case", CASES)
def test_names_of_phases_do_not_lie_on_each_other_or_in_the_next_panel(case):
    drawn = figure(case)
    for axes in drawn.axes:
        last = axes.get_xticklabels()[-1].get_window_extent(drawn.canvas.get_renderer())
        assert last.x1 <= axes.get_window_extent().x1 + 1
        found = [label.get_window_extent(drawn.canvas.get_renderer()) for label in axes.get_xticklabels()]
        for label, one, other in zip(axes.get_xticklabels()[1:], found, found[1:], strict=False):
            assert label.get_text().startswith("\n") or not one.overlaps(other)


def test_every_kind_has_a_colour_of_its_own_and_stacks_in_the_simulators_order():
    from gcbench.simulate.compose.block_kinds import KIND_NAMES

    assert list(memory_over_step.COLOURS) == [kind_name(kind) for kind in KIND_NAMES.values()]
    assert len(set(memory_over_step.COLOURS.values())) == len(memory_over_step.COLOURS)


def test_the_bars_of_a_prediction_say_what_does_not_fit():
    """`memory.png`, whose words were those of a measurement."""
    drawn = run_plots.memory_figure(card_report())
    texts = [text.get_text().strip() for text in drawn.axes[0].texts]
    assert "32.03 GiB (does not fit)" in texts and "not supported" in texts
    assert "predicted for Example Card 24 GB, 24.00 GiB" in drawn.get_suptitle()
