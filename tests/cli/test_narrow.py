"""Screens of any width: no broken words, whole commands, and a grid of cells at a glance."""

from __future__ import annotations

import re

import pytest
from fixtures_predicted import card_report, cpu_report
from fixtures_report import long_report, mixed_report, outcome, peaks, report, steady, workload

from gcbench.check import view
from gcbench.check.cases import Check, CheckResult, CheckSetting, Combination
from gcbench.core import text_table as screen
from gcbench.report import compare as comparing
from gcbench.report import overview
from gcbench.report import report_file as reports
from gcbench.report.formats import markdown, terminal

WIDTHS = (30, 40, 60, 80)
REPORTS = {"mixed": mixed_report, "long": long_report, "card": card_report, "cpu": cpu_report}


def grid():
    """Two batches by two lengths by three strategies, one of which fails twice."""
    cells = []
    for batch in (8, 16):
        for seq in (64, 128):
            work = workload(batch=batch, seq=seq)
            size = batch * seq
            cells += [
                outcome("off", peaks(size, size, 100), steady(0.5, spread=0.01), work=work),
                outcome("per-layer", peaks(size / 2, size / 2, 100), steady(0.65, spread=0.01), work=work),
                outcome("segment:4", peaks(size / 2, size / 2, 100), steady(0.6), work=work, recomputed=batch - 4),
            ]
    return report(*cells)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", REPORTS)
def test_no_line_is_too_wide_and_no_word_is_broken(name, width):
    """`strat⏎egy` and `identi⏎cal` at 40 columns: every word of the wide table is one of the narrow's."""
    stored = REPORTS[name]()
    text = terminal.render(stored, width=width)
    assert max(map(len, text.splitlines())) <= width
    wide = set(re.findall(r"\S+", terminal.render(stored, width=400)))
    words = set(re.findall(r"\S+", text))
    strange = {word for word in words - wide - {"layers", "tok/s"} if len(word) > 1 and word.strip("─")}
    parts = {part for word in wide for part in re.split(r"(?<=[:+/])", word)}
    assert strange - parts == set()


@pytest.mark.parametrize("width", WIDTHS)
def test_a_narrow_table_has_all_that_decides(width):
    text = terminal.render(long_report(), width=width)
    for strategy in ("off", "per-layer", "segment:4"):
        assert strategy in text
    for figure in ("32.43 GiB", "13.77 GiB", "58 %", "1.60 s", "+30 %", "identical", "within noise"):
        assert figure in text.replace("\n", " "), figure


def test_rows_are_stacked_where_columns_have_no_room():
    table = screen.Table(
        columns=(
            screen.Column(header="strategy", cells=("segment:4+offload", "off"), right=False),
            screen.Column(header="peak", cells=("2.00 GiB", "3.00 GiB")),
            screen.Column(header="layers recomputed", short_header="layers", cells=("4/4", "0/4"), shorten=1, drop=2),
            screen.Column(header="proof", cells=("identical", "–"), right=False),
        )
    )
    assert screen.plain([table], width=24) == (
        "segment:4+offload\n  peak 2.00 GiB\n  layers 4/4\n  proof identical\n"
        "off\n  peak 3.00 GiB\n  layers 0/4 · proof –\n"
    )
    assert screen.plain([table], width=40).splitlines()[0].split() == ["strategy", "peak", "proof"]


def test_a_long_name_is_broken_at_its_joints():
    table = screen.Table(
        columns=(
            screen.Column(header="strategy", cells=("segment:4+offload:boundaries",), right=False),
            screen.Column(header="peak", cells=("2.00 GiB",)),
        )
    )
    lines = [line.split()[0] for line in screen.plain([table], width=32).splitlines()[2:]]
    assert lines == ["segment:4+offload:", "boundaries"]


@pytest.mark.parametrize("command", ["models", "devices", "strategies", "compare run run", "report run"])
@pytest.mark.parametrize("width", WIDTHS)
def test_lists_stay_within_the_screen(cli, monkeypatch, tmp_path, command, width):
    reports.save(mixed_report(), tmp_path / "run")
    monkeypatch.setenv("COLUMNS", str(width))
    lines = cli(*command.split()).out.splitlines()
    assert max(map(len, lines)) <= width
    if command == "models" and width > 30:
        assert any(line.split()[:1] == ["deepseek-r1-distill-qwen-1.5b"] for line in lines)
    if command == "devices":
        assert any(line.split()[:2] == ["h200", "140"] for line in lines)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_comparison_stays_readable(width):
    text = screen.plain(comparing.render(comparing.compare(grid(), grid(), force=False)), width=width)
    assert max(map(len, text.splitlines())) <= width
    assert "no difference shown" in text.replace("\n", " ") or width == 30
    assert "per-layer" in text


# What is to be pasted


def test_a_line_to_paste_is_never_broken():
    """At 80 columns the shell ran the first of two lines alone."""
    command = (
        "gcbench run -m a/very/long/model -b 16 --seq-len 4096 --precision bf16 --strategies off,plan:some/plan.json"
    )
    assert screen.plain([screen.unbroken(f"  {command}")], width=40) == f"  {command}\n"


def test_a_link_is_never_broken():
    link = "https://github.com/huggingface/transformers/issues/23165#issuecomment-1536439098-and-more"
    setting = CheckSetting()
    found = Check(
        model="m",
        command="gcbench check -m m",
        device="cpu",
        versions={},
        scaled=None,
        num_params=10,
        num_layers=2,
        combinations=(Combination(strategy="per-layer", setting=setting),),
        results=(CheckResult(number=0, verdict="failed", message="seen", cause="why", remedy="how", link=link),),
        steps_s=1.0,
        wall_s=2.0,
    )
    assert any(line.endswith(f"see     {link}") for line in view.plain(found, width=40).splitlines())


# The overview of a grid


def test_a_grid_is_shown_at_a_glance_before_its_tables():
    text = terminal.render(grid(), width=100)
    head, _, rest = text.partition("\n\n")
    lines = head.splitlines()
    assert lines[0] == "Overview of 12 cells: peak allocated, and time against off"
    assert lines[1] == "gpt2 · fp32 · adamw_torch · sdpa · cpu"
    assert lines[2].split("  ")[0] == "batch × tokens"
    assert [" ".join(line.split()) for line in lines[4:]] == [
        "8 × 64 512 MiB 256 MiB, +30 % proof failed",
        "8 × 128 1.00 GiB 512 MiB, +30 % proof failed",
        "16 × 64 1.00 GiB 512 MiB, +30 % 512 MiB, +20 %",
        "16 × 128 2.00 GiB 1.00 GiB, +30 % 1.00 GiB, +20 %",
    ]
    assert rest.startswith("gpt2 · batch 8 × 64 tokens")
    stacked = terminal.render(grid(), width=40)
    assert "8 × 64\n  off 512 MiB · per-layer 256 MiB, +30 %\n  segment:4 proof failed\n" in stacked


def test_one_workload_is_its_own_overview():
    assert overview.overview(long_report()) is None
    assert "Overview" not in markdown.render(long_report())


def test_the_overview_of_a_prediction_marks_what_does_not_fit():
    works = [workload(batch=batch, device="a10") for batch in (1, 2)]
    both = report(*(o for work in works for o in card_report(work=work).outcomes))
    both = type(both)(**{**vars(both), "source": "predicted"})
    text = terminal.render(both, width=120)
    table = text.split("\n\n")[0]
    assert "(no) does not fit in" in table.splitlines()[0]
    assert " (no)" in "".join(table.splitlines()[4:])
    assert "## Overview" in markdown.render(both)


def test_what_differs_besides_the_size_is_in_the_label():
    works = [workload(attn="sdpa"), workload(attn="eager")]
    two = report(*(outcome("off", peaks(1, 2, 3), steady(0.5), work=work) for work in works))
    found = overview.overview(two)
    assert found is not None
    assert found.columns[0].cells == ("16 × 64 · sdpa", "16 × 64 · eager")
    assert found.subtitle == "gpt2 · fp32 · adamw_torch · cpu"
