"""Every output format against stored text; GCBENCH_REWRITE_GOLDEN=1 writes it again, for review in the diff."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from fixtures_report import OUT_OF_MEMORY, long_report, mixed_report, outcome, peaks, report, steady, workload
from golden import check
from rich.console import Console

from gcbench.report import formats
from gcbench.report import rows as tables
from gcbench.report.formats import json_rows, markdown, terminal


def test_formats_are_found_without_a_list():
    assert set(formats.names()) == {"csv", "markdown", "json", "terminal"}
    assert {formats.get(name).suffix for name in formats.names()} == {".csv", ".md", ".json", ".txt"}
    with pytest.raises(KeyError):
        formats.get("xml")


@pytest.mark.parametrize("name", ["csv", "markdown", "json"])
def test_text_is_the_golden_one(name):
    found = formats.get(name)
    check(f"mixed{found.suffix}", found.render(mixed_report()))


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize(("name", "build"), [("mixed", mixed_report), ("long", long_report)])
def test_terminal_is_the_golden_one(name, build, width):
    check(f"{name}-{width}.txt", terminal.render(build(), width=width))


@pytest.mark.parametrize("name", ["csv", "markdown", "json", "terminal"])
def test_a_run_that_measured_nothing_still_renders(name):
    text = formats.get(name).render(report(outcome("off", failure=OUT_OF_MEMORY), outcome("per-layer")))
    assert "oom" in text or "out of memory" in text


@pytest.mark.parametrize("name", ["csv", "markdown", "json", "terminal"])
def test_a_run_without_cells_still_renders(name):
    formats.get(name).render(report())


def test_csv_has_raw_units_and_empty_fields_for_the_unknown():
    lines = list(csv.DictReader(io.StringIO(formats.get("csv").render(mixed_report()))))
    assert tuple(lines[0]) == tables.columns()
    assert lines[0]["peak_allocated_bytes"] == str(2480 * 2**20)
    assert float(lines[0]["step_time_s"]) == pytest.approx(0.512)
    assert (lines[0]["peak_reserved_bytes"], lines[3]["peak_allocated_bytes"]) == ("", "")


def test_json_is_one_strict_document_with_the_columns_of_the_csv():
    document = json.loads(formats.get("json").render(mixed_report()))
    assert document["schema"] == 1
    assert tuple(document["rows"][0]) == tables.columns()
    assert document["rows"][3]["peak_allocated_bytes"] is None


def test_json_has_no_nan():
    """Python writes NaN, which no other reader takes."""
    broken = report(outcome("off", peaks(1, 2, 1), steady(0.1), diffs=[0.0, math.nan, 0.0]))
    text = json_rows.render(broken)

    def refuse(constant):
        raise AssertionError(constant)

    assert json.loads(text, parse_constant=refuse)["rows"][0]["grad_rel_diff"] is None


@pytest.mark.parametrize("width", [60, 70, 80, 90, 100, 110, 120, 200])
@pytest.mark.parametrize("build", [mixed_report, long_report])
def test_no_line_is_wider_than_the_screen_and_no_figure_is_cut(build, width):
    """A table that rich has to squeeze cuts numbers in the middle, which reads as another number."""
    built = build()
    text = terminal.render(built, width=width)
    assert max(map(len, text.splitlines())) <= width
    for row in tables.rows(built):
        for column in terminal.fit(terminal.table_columns([row]), 10_000):
            if column.header in ("peak", "saved"):
                assert column.cells[0] in text
        verdict = terminal.proof(row)
        assert verdict in text or width < 80


def test_a_difference_whose_interval_includes_zero_is_not_shown_without_it():
    """Where there is no room for the interval, the centre alone would sell noise as a saving."""
    noisy = report(
        outcome("off", peaks(3, 4, 1), steady(0.5, spread=0.01)),
        outcome("per-layer", peaks(2, 3, 1), steady(0.47, spread=0.3)),
    )
    assert "none shown" in terminal.render(noisy, width=70)
    assert "−6.0 %" not in terminal.render(noisy, width=70)
    assert "−6.0 % (" in terminal.render(noisy, width=120)


def test_columns_go_in_their_order_as_the_screen_narrows():
    group = tables.rows(long_report())
    columns = terminal.table_columns(group)
    headers = [[column.header for column in terminal.fit(columns, width)] for width in (140, 115, 100, 70)]
    assert "tokens/s" in headers[0]
    for wider, narrower in itertools.pairwise(headers):
        assert len(narrower) <= len(wider)
    assert all({"strategy", "peak", "saved", "step time", "proof"} <= set(shown) for shown in headers)
    assert "tokens/s" not in headers[-1]


def test_text_from_outside_is_not_interpreted_as_markup():
    """Rich would swallow [12] and turn :2: into a picture; Markdown would end the cell at a bar."""
    strange = report(outcome("off", work=workload(model="a|b"), failure=("crash", "[bold]Errno 12[/] :cat: a|b *c*")))
    assert "[bold]Errno 12[/] :cat: a|b *c*" in terminal.render(strange)
    text = markdown.render(strange)
    assert "\\[bold]Errno 12\\[/] :cat: a\\|b \\*c\\*" in text
    assert "# gcbench: a\\|b" in text


def test_meaning_does_not_hang_on_styles():
    """The same text with and without a terminal that knows bold."""
    styled = io.StringIO()
    console = Console(file=styled, width=100, force_terminal=True, color_system="truecolor", legacy_windows=False)
    for part in terminal.tables(mixed_report()):
        console.print(part)
    assert "\x1b[1m" in styled.getvalue()
    assert "\x1b[3" not in styled.getvalue(), "a colour"


def test_markdown_names_plots_only_where_there_are_any():
    assert "plots/tradeoff.png" in markdown.render(mixed_report())
    only_off = markdown.render(report(outcome("off", peaks(3, 2, 1), steady(0.1))))
    assert "plots/memory.png" in only_off
    assert "tradeoff" not in only_off
    assert "## Plots" not in markdown.render(report(outcome("off", failure=OUT_OF_MEMORY)))


def test_markdown_lists_what_was_not_measured():
    gaps = markdown.not_measured(
        tables.rows(
            report(
                outcome("per-layer", peaks(3, 2, 1), [[0.1]]),
                outcome("every:2"),
                outcome("every:3", failure=OUT_OF_MEMORY),
            )
        )
    )
    text = "\n".join(gaps)
    assert "the interval of the step time of per-layer" in text
    assert "every:2 at batch 16 × 64 tokens · fp32 · adamw_torch · sdpa · cpu: the run ended before this cell" in text
    assert "every:3 at" in text
    assert "savings and overheads at" in text
    assert "reserved memory" in text
    assert "the memory of the process" in text


def test_tables_cost_no_heavy_import():
    """A wrong flag must answer at once: neither torch nor pandas nor matplotlib before they are needed."""
    code = (
        "import sys; from gcbench.report import compare, formats, rows, sentences, stats; "
        "from gcbench.report.plots import run_plots; "
        "formats.names();"
        "heavy = {'torch', 'transformers', 'pandas', 'matplotlib', 'numpy'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
