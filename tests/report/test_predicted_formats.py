"""Rendered predictions: tables without the columns of a measurement, sentences that follow from the figures."""

from __future__ import annotations

import csv
import io
from dataclasses import replace

import pytest
from fixtures_predicted import (
    CARD,
    LOSS,
    UNTRACEABLE,
    card_report,
    cell,
    cpu_report,
    predicted_report,
    prediction,
)
from fixtures_report import mixed_report, peaks, workload
from golden import check

from gcbench.report import explanation as explained
from gcbench.report import formats, gaps, sentences
from gcbench.report import predictions as predicted
from gcbench.report import report_file as reports
from gcbench.report import rows as tables
from gcbench.report.formats import markdown, terminal

LIMIT = 24 * 1024
CPU = workload(model="gpt2")


def cells(report):
    """Those of the report's only workload."""
    (found,) = predicted.by_workload(report).values()
    return found


def summary_of(*outcomes, **changes):
    return predicted.summary(cells(predicted_report(*outcomes, **changes)))


def fitting(strategy, spare, *, backward=10_000, limit=LIMIT, **changes):
    """A cell of the card that leaves `spare` MiB."""
    memory = peaks(backward - 100, backward, 4000, reserved=limit - spare - 400, process=limit - spare)
    return cell(strategy, prediction(memory, limit=limit, **changes))


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize(("name", "build"), [("card", card_report), ("cpu", cpu_report)])
def test_the_table_is_the_golden_one(name, build, width):
    check(f"predicted-{name}-{width}.txt", terminal.render(build(), width=width))


@pytest.mark.parametrize("width", [80, 120])
def test_the_explained_table_is_the_golden_one(width):
    check(f"explained-{width}.txt", terminal.render(card_report(explain=True), width=width))


def test_the_markdown_is_the_golden_one():
    check("explained.md", markdown.render(card_report(explain=True)))


@pytest.mark.parametrize("name", ["csv", "json"])
def test_the_columns_of_files_are_those_of_every_table(name):
    """The trap: a reader of many CSVs, to whom a prediction is one more row."""
    text = formats.get(name).render(card_report())
    if name == "csv":
        lines = list(csv.DictReader(io.StringIO(text)))
        assert tuple(lines[0]) == tables.columns()
        assert (lines[0]["status"], lines[0]["source"], lines[0]["step_time_s"]) == ("oom", "predicted", "")
    else:
        assert all(f'"{column}"' in text for column in tables.columns())


@pytest.mark.parametrize("build", [card_report, cpu_report])
def test_columns_of_measurements_are_absent(build):
    """The trap: four empty columns for time and proof, which a prediction does not have."""
    text = terminal.render(build(), width=200)
    for header in ("step time", "overhead", "tokens/s", "proof", "recomputed"):
        assert header not in text.splitlines()[2]


def test_columns_that_are_empty_in_all_rows_are_left_out():
    """A CPU has no reserved memory and no limit; a card has both."""
    on_cpu, on_card = (
        [column.header for column in predicted.table_columns(tables.rows(build()))]
        for build in (cpu_report, card_report)
    )
    assert on_cpu == ["strategy", "layers checkpointed", "peak allocated", "peak in", "saved"]
    assert on_card == [*on_cpu, "reserved", "process", "headroom", "fits"]


def test_a_memory_limit_on_the_cpu_adds_the_column_of_headroom():
    bounded = predicted_report(cell("off", prediction(peaks(900, 1000, 400), limit=1500), work=CPU))
    headers = [column.header for column in predicted.table_columns(tables.rows(bounded))]
    assert headers[-2:] == ["headroom", "fits"]
    assert "reserved" not in headers
    assert predicted.target(bounded) == "the CPU, 1.46 GiB"


def test_a_cell_that_does_not_fit_has_its_figures_and_its_deficit():
    text = terminal.render(card_report(), width=120)
    (line,) = [line for line in text.splitlines() if line.startswith("off  ")]
    assert line.split()[-3:] == ["−10.57", "GiB", "no"]
    assert "32.03 GiB" in line and "34.57 GiB" in line
    assert "off does not fit, by 10.57 GiB." in " ".join(text.split())


@pytest.mark.parametrize("name", ["terminal", "markdown"])
def test_no_prediction_claims_to_have_run_out_of_memory(name):
    """The trap: the words of a measurement, for a step that never ran."""
    nothing = predicted_report(fitting("off", -500), fitting("per-layer", -100))
    for report in (card_report(explain=True), nothing):
        text = formats.get(name).render(report)
        assert "out of memory" not in text
        assert "Measured" not in text


@pytest.mark.parametrize("build", [card_report, cpu_report])
@pytest.mark.parametrize("name", ["terminal", "markdown"])
def test_a_prediction_is_labelled_as_one_once(build, name):
    """Also with several workloads, whose tables follow one another."""
    text = " ".join(formats.get(name).render(build(explain=True)).split())
    assert text.count(predicted.NOT_MEASURED) == 1


@pytest.mark.parametrize("width", [60, 70, 80, 90, 100, 110, 120, 200])
@pytest.mark.parametrize("build", [card_report, cpu_report])
def test_no_line_is_wider_than_the_screen_and_no_figure_is_cut(build, width):
    built = build(explain=True)
    text = terminal.render(built, width=width)
    assert max(map(len, text.splitlines())) <= width
    for row in tables.rows(built):
        for column in predicted.table_columns([row]):
            if column.header in ("peak allocated", "headroom", "fits"):
                assert column.cells[0] in text or column.shortened().cells[0] in text


def test_what_fits_is_the_last_that_a_narrow_screen_shows():
    columns = predicted.table_columns(tables.rows(card_report()))
    shown = {width: [column.header for column in terminal.fit(columns, width)] for width in (120, 80, 60, 45)}
    assert "reserved" in shown[120] and "reserved" not in shown[80]
    assert shown[80] == ["strategy", "layers", "peak", "peak in", "saved", "process", "headroom", "fits"]
    assert "process" not in shown[60]
    assert shown[45][-2:] == ["headroom", "fits"]


def test_text_from_outside_is_not_interpreted_as_markup():
    """Rich would swallow [12]; a device's or model's name may hold anything."""
    strange = cell("off", None, work=replace(CARD, model="a[12]b"), failure=("crash", "[bold]Errno[/]"))
    text = terminal.render(predicted_report(strange))
    assert "a[12]b" in text and "[bold]Errno[/]" in text


@pytest.mark.parametrize("name", ["terminal", "markdown", "csv", "json"])
def test_a_prediction_without_cells_or_figures_still_renders(name):
    formats.get(name).render(predicted_report())
    assert "not supported" in formats.get("terminal").render(predicted_report(cell("off", None, failure=UNTRACEABLE)))


def test_the_device_is_named_with_its_memory_once():
    """The trap: a card known by its memory alone, `a CUDA device of 8.00 GiB, 8.00 GiB`."""
    report = predicted_report(fitting("off", 10, limit=8192))
    unnamed = replace(report, machine=replace(report.machine, device_name="a CUDA device of 8.00 GiB"))
    assert predicted.target(report) == "Example Card 24 GB, 8.00 GiB"
    assert predicted.target(unnamed) == "a CUDA device of 8.00 GiB"


def test_off_that_fits_needs_no_strategy():
    text = summary_of(fitting("off", 3000), fitting("per-layer", 9000, backward=6000))
    assert text == (
        "off fits in 24.00 GiB with 2.93 GiB of headroom: nothing has to be recomputed. per-layer leaves the most "
        "headroom, 8.79 GiB. The peak of off is in the loss and logits (backward pass)."
    )


def test_of_those_that_fit_the_fewest_layers_are_named():
    """The trap: the leanest strategy recommended although one that recomputes less fits, too."""
    text = summary_of(
        fitting("off", -2000, attention={"flash": 3}),
        fitting("per-layer", 9000),
        fitting("every:2", 4000),
        fitting("every:3", 2000),
    )
    assert text == (
        "per-layer, every:2 and every:3 fit in 24.00 GiB; every:3 checkpoints the fewest layers (4 of 12) and leaves "
        "1.95 GiB of headroom. per-layer leaves the most headroom, 8.79 GiB. off does not fit, by 1.95 GiB. The peak "
        "of every:3 is in the loss and logits (backward pass), where checkpointing more saves nothing. On this device "
        "attention uses the flash kernel."
    )


def test_little_headroom_is_called_tight():
    large = 5 * LIMIT
    assert "with 3.42 GiB of headroom, which is tight." in summary_of(
        fitting("off", -10, limit=large), fitting("per-layer", 3500, limit=large)
    )
    assert "tight" not in summary_of(fitting("off", -10), fitting("per-layer", 900))
    assert "tight" in summary_of(fitting("off", -10), fitting("per-layer", 900, retries=2))


def test_many_strategies_are_counted_and_not_listed():
    failing = [
        fitting(name, -100 * place) for place, name in enumerate(("off", *(f"every:{k}" for k in range(3, 8))), 1)
    ]
    text = summary_of(*failing, fitting("per-layer", 900))
    assert "6 strategies do not fit; off comes nearest, 100 MiB too large." in text


def test_where_nothing_fits_the_nearest_is_named():
    text = summary_of(fitting("off", -900), fitting("per-layer", -500))
    assert text.startswith(
        "Nothing fits in 24.00 GiB: per-layer comes nearest and needs 500 MiB more than there is. Try a smaller batch, "
        "a shorter sequence or a leaner optimizer."
    )
    alone = summary_of(cell("off", prediction(peaks(1, 2000, 1), limit=1000), work=replace(CARD, batch_size=1)))
    assert "off does not fit in 1000 MiB: it needs 1000 MiB more" in alone
    assert "smaller batch" not in alone, "there is none below 1"


def test_parameters_that_do_not_fit_by_themselves_are_reported():
    """The trap: advice to checkpoint more or to shrink the batch, where neither can help."""
    text = summary_of(fitting("off", -9000, standing=30_000), fitting("per-layer", -8000, standing=30_000))
    assert "Parameters, gradients and optimizer state alone take 29.30 GiB, so no strategy and no batch fits" in text
    assert "LoRA (--lora-r)" in text
    assert "smaller batch" not in text
    tuned = replace(CARD, lora_r=8)
    lora = cell("off", prediction(peaks(1, 40_000, 1), limit=LIMIT, standing=30_000), work=tuned)
    assert "LoRA" not in summary_of(lora)


def test_without_a_limit_the_largest_saving_and_the_cheapest_similar_one_are_reported():
    small, large = predicted.by_workload(cpu_report()).values()
    assert predicted.summary(small) == (
        "No strategy saves memory. The peak of off is in the optimizer step, where checkpointing more saves nothing."
    )
    assert predicted.summary(large) == (
        "per-layer saves 52 % of the peak of off, with 12 of 12 layers checkpointed. every:2 comes within 1 % of the "
        "same peak with 6 of 12. The peak of every:2 is in the loss and logits (backward pass), where checkpointing "
        "more saves nothing."
    )


def test_a_negligible_saving_is_not_reported_twice():
    """The trap: `per-layer saves 0.7 % of the peak of off. off comes within 1 % of the same peak.`"""
    text = summary_of(
        cell("off", prediction(peaks(1, 1000, 1)), work=CPU), cell("per-layer", prediction(peaks(1, 993, 1)), work=CPU)
    )
    assert "per-layer saves 0.7 % of the peak of off" in text
    assert "comes within" not in text


def test_no_layer_left_to_checkpoint_is_not_called_no_saving():
    text = summary_of(
        cell("off", prediction(peaks(1, 9, 1)), work=CPU), cell("per-layer", prediction(peaks(1, 5, 1)), work=CPU)
    )
    assert text.endswith(
        "The peak of per-layer is in the loss and logits (backward pass), and no layer is left to checkpoint."
    )


def test_the_consequence_of_the_math_kernel_is_explained():
    text = summary_of(fitting("off", 2000, attention={"math": 12}))
    assert "attention uses the math kernel, which saves whole score matrices" in text
    assert "flash and math kernels." in summary_of(fitting("off", 2000, attention={"flash": 1, "math": 1}))


@pytest.mark.parametrize(
    ("part", "text"),
    [
        (LOSS, "in the loss and logits (backward pass)"),
        ("norm, logits and loss, forward", "in the norm, logits and loss (forward pass)"),
        ("layer 3, backward", "in layer 3 (backward pass)"),
        ("before the layers, backward", "before the first layer (backward pass)"),
        ("optimizer step", "in the optimizer step"),
        ("backward pass", "in the backward pass"),
    ],
)
def test_the_place_of_the_peak_is_described(part, text):
    (only,) = cells(predicted_report(cell("off", prediction(peaks(1, 2, 1), part=part))))
    assert predicted.where(only) == text


def test_a_stored_prediction_is_shown_as_it_was(tmp_path):
    """The trap: pairs such as (phase, point), which a list of equal things cannot be read back from."""
    for explain in (False, True):
        report = card_report(explain=explain)
        reports.save(report, tmp_path)
        loaded = reports.load(tmp_path)
        assert loaded == report
        assert terminal.render(loaded) == terminal.render(report)
        assert (explained.OUTSIDE_TRACE in terminal.render(loaded)) is explain


def test_explanations_are_shown_on_request(capsys):
    terminal.show(card_report(), explain=True)
    explained_text = capsys.readouterr().out
    terminal.show(card_report())
    assert "would reduce it" in explained_text and "would reduce it" not in capsys.readouterr().out
    terminal.show(mixed_report(), explain=True)
    assert capsys.readouterr().out.startswith("Overview of 6 cells"), "a measurement has no explanation"


def test_what_a_prediction_does_not_cover():
    found = gaps.not_covered(card_report())
    assert found[0] == "time: how long a step takes is not predicted"
    title = sentences.title(CARD, model=False, device=False)
    assert f"every:2 at {title}: not supported" in found
    assert any("another driver" in gap for gap in found)
    assert not any("off at" in gap for gap in found), "a cell that does not fit is covered"
    on_cpu = "\n".join(gaps.not_covered(cpu_report()))
    assert "the memory of the process" in on_cpu and "driver" not in on_cpu
    assert "savings at" in "\n".join(gaps.not_covered(predicted_report(fitting("per-layer", 10))))


def test_markdown_links_the_plots_of_a_prediction():
    assert "(plots/step.png)" in markdown.render(card_report())
    both = markdown.render(cpu_report())
    assert "(plots/step-b1-s64.png)" in both and "(plots/step-b8-s256.png)" in both
    assert "tradeoff" not in both
