"""The committed figures of `make published` are those of the committed rows, and what is explained is explained."""

from __future__ import annotations

import json
import sys
from collections import Counter
from statistics import median
from typing import Any

import pytest
from conftest import ROOT

sys.path.append(str(ROOT / "benchmarks"))
import published
import published_rows


@pytest.fixture
def stored() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(published.STORED.read_text(encoding="utf-8"))
    return found


def test_every_published_row_is_predicted_or_counted_with_its_reason(stored):
    rows = published_rows.rows()
    assert (
        len({row["id"] for row in rows}) == len(rows) == len(stored["rows"]) + sum(stored["not_expressible"].values())
    )
    expressed = {row["id"]: published_rows.express(row) for row in rows}
    reasons = Counter(reason for reason in expressed.values() if isinstance(reason, str))
    assert dict(reasons) == stored["not_expressible"]
    for each in stored["rows"]:
        row = expressed[each["id"]]
        assert not isinstance(row, str)
        assert [argument.removeprefix(f"{ROOT}/") for argument in row.arguments] == each["arguments"]
        assert row.figures[0].nbytes == each["compared"][0]["published_bytes"]


def test_every_row_names_its_source():
    for row in published_rows.rows():
        assert row["url"].startswith("https://") and row["source"] and row["versions"], row["id"]


def test_errors_and_bars_are_those_of_the_committed_bytes(stored):
    for each in stored["rows"]:
        for figure in each["compared"]:
            assert figure["error"] == round(figure["predicted_bytes"] / figure["published_bytes"] - 1, 6)
    assert stored["missed"] == published.missed(stored["rows"]) == []
    assert stored["by_source"] == published.by_source(stored["rows"])
    assert stored["figures"] == published.figures(stored["rows"])


def test_full_finetuning_on_an_a100_is_predicted_within_three_hundredths_of_a_percent(stored):
    errors = [
        each["compared"][0]["error"]
        for each in stored["rows"]
        if each["completeness"] == 5 and "-full-none-g1-" in each["id"]
    ]
    assert len(errors) == 4 and max(abs(error) for error in errors) <= 0.0003


def test_evidence_is_of_the_version_that_the_row_was_measured_with():
    evidence = json.loads((ROOT / "benchmarks" / "published-evidence.json").read_text(encoding="utf-8"))
    versions = {row["id"]: row["versions"] for row in published_rows.rows()}
    for name, seen in evidence.items():
        assert f"transformers {seen['transformers']}," in versions[name] and seen["source"] == "emulated"


def test_an_error_over_the_bar_without_evidence_is_a_miss(stored):
    """The trap: a bar that looks at nothing."""
    bare = [{**each, "explained": None} for each in stored["rows"]]
    assert len(published.missed(bare)) == 2 and all("nothing explains it" in each for each in published.missed(bare))
    far = [{**each, "explained": each["explained"] and {**each["explained"], "settled": False}} for each in bare]
    assert len(published.missed(far)) == 2
    high = [{**each, "compared": [{**each["compared"][0], "error": 0.01}]} for each in stored["rows"]]
    assert published.missed(high) == [f"the median error is {100 * median([0.01]):.3f} %, over 0.5 %"]


def test_a_run_that_ran_out_of_memory_must_not_be_predicted_to_fit(stored):
    wrong = [{**stored["rows"][0], "fits": {"published": False, "predicted": True}}]
    assert "is wrong about whether it fits" in published.missed(wrong)[0]


def row_of(**changes: Any) -> dict[str, Any]:
    full = next(row for row in published_rows.rows() if row["id"] == "fms-powerlm-3b-full-none-g1-b4")
    return {**full, **changes}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_gpus": 2}, "several GPUs"),
        ({"quantization": "bnb NF4"}, "a quantised base model"),
        ({"loss": "chunked CE"}, "a chunked or fused loss"),
        ({"seq_len": "variable"}, "the length of the longest batch is not published"),
        ({"unit": "GB(ambiguous)"}, "the unit of the figure is ambiguous"),
        ({"gpu": "B300"}, "gpu: B300"),
        ({"grad_accum": 8}, "gradient accumulation"),
    ],
)
def test_what_cannot_be_expressed_has_a_reason(changes, reason):
    assert published_rows.express(row_of(**changes)) == reason


def test_units_and_measures_are_read_as_the_source_means_them():
    expressed = published_rows.express(row_of(value=2.0, unit="GB(1e9)", measured="max reserved (torch)", also=None))
    assert not isinstance(expressed, str)
    assert expressed.figures == (published_rows.Figure(measure="reserved", nbytes=2 * 10**9),)
    out = row_of(value=None, unit="OOM")
    assert published_rows.runs_out(out) is True and published_rows.runs_out(row_of()) is False


def test_outputs_that_a_loop_holds_are_added_to_what_is_allocated():
    expressed = published_rows.Expressed(
        arguments=(),
        holds_outputs=True,
        figures=(
            published_rows.Figure(measure="allocated", nbytes=110),
            published_rows.Figure(measure="reserved", nbytes=200),
        ),
        notes=(),
    )
    row = {"peak_allocated_bytes": 100, "peak_reserved_bytes": 200, "kept_outputs_add_bytes": 10}
    (only,) = published.compare(expressed, row)
    assert (only.measure, only.error) == ("allocated", 0.0)


def test_the_page_cites_the_stored_figures_if_it_cites_any(stored):
    """The trap: a table that keeps the figures of an older run."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith("| published runs")]
    seen = stored["figures"]
    for line in lines:
        assert f"{seen['rows']} rows" in line and f"median {100 * seen['median']:.2f} %" in line
        assert f"worst {100 * seen['worst']:.1f} %" in line
