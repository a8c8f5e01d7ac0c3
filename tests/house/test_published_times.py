"""The committed times of `make published` are those of the committed rows, and the bars look at them."""

from __future__ import annotations

import json
import sys
from collections import Counter
from typing import Any

import pytest
from conftest import ROOT

sys.path.append(str(ROOT / "benchmarks"))
import published_rows
import published_times
import published_times_rows
from published_times_rows import OWN, PUBLISHED, Step

STEP = Step(
    id="x",
    origin=PUBLISHED,
    source="x",
    url="x",
    model="gpt2",
    device="h100",
    batch=1,
    seq_len=8,
    precision="bf16",
    optim="sgd",
    strategy="off",
    seconds=1.0,
    completeness=5,
)


@pytest.fixture
def stored() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(published_times.STORED.read_text(encoding="utf-8"))
    return found


def test_every_row_is_compared_or_counted_with_its_reason(stored):
    steps, reasons = published_times.steps()
    assert len({step.id for step in steps}) == len(steps)
    known = Counter(stored["not_compared"])
    assert known - reasons == Counter({"gcbench predicts no time for it": len(steps) - len(stored["rows"])})
    published = {each["id"]: each["published_s"] for each in stored["rows"]}
    assert published.items() <= {step.id: round(step.seconds, 6) for step in steps}.items()


def test_every_step_names_its_source_and_what_stands_in(stored):
    for each in stored["rows"]:
        assert each["source"] and each["url"].startswith(("https://", "results/reference/"))
        assert each["completeness"] >= published_times_rows.COMPLETE or each["notes"]


def test_figures_and_bars_are_those_of_the_committed_rows(stored):
    for each in stored["rows"]:
        assert each["error"] == pytest.approx(each["predicted_s"] / each["published_s"] - 1, abs=1e-3)
        assert each["in_band"] == (each["low_s"] <= each["published_s"] <= each["high_s"])
    assert stored["figures"] == published_times.figures(stored["rows"], stored["pairs"])
    assert stored["missed"] == published_times.missed(stored["figures"]) == []


def test_own_and_published_rows_are_reported_apart(stored):
    """The trap: rows that shaped a constant among those that confirm it."""
    figures = stored["figures"]
    assert (figures[PUBLISHED]["steps"], figures[OWN]["steps"]) == (72, 13)
    assert {each["url"] for each in stored["rows"] if each["origin"] == OWN} == {
        f"results/reference/{name}" for name in published_times_rows.OWN_RUNS
    }


def test_what_cannot_be_expressed_does_not_count(stored):
    aside = {each["pair"] for each in stored["pairs"] if each["orientation"]}
    assert aside == {"torchtune-ladder", "titan-ao-triplet"}
    worse = [{**each, "error": 0.5} if each["orientation"] else each for each in stored["pairs"]]
    assert published_times.figures(stored["rows"], worse) == stored["figures"]


def test_a_bar_that_is_missed_is_named(stored):
    """The trap: a bar that looks at nothing."""
    far = [{**each, "error": 0.3, "in_band": False} for each in stored["rows"]]
    off = [{**each, "error": 0.13, "in_band": False} for each in stored["pairs"]]
    told = published_times.missed(published_times.figures(far, off))
    assert len(told) == 10 and all(each.startswith((PUBLISHED, OWN)) for each in told)


def row_of(**changes: Any) -> dict[str, Any]:
    full = next(row for row in published_rows.rows() if row["id"] == "fms-powerlm-3b-full-none-g1-b4")
    return {**full, **changes}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"speed": None}, "no time is published"),
        ({"num_gpus": 2}, "several GPUs"),
        ({"quantization": "bnb NF4"}, "a quantised base model"),
        ({"versions": "torch 2.5 torch.compile"}, "a compiled model"),
        ({"loss": "chunked CE"}, "a chunked or fused loss"),
        ({"seq_len": "variable"}, "the lengths of its batches vary or are not published"),
        ({"speed": "5.99 samples/s"}, "its speed is not that of a step"),
        ({"gpu": "B300"}, "gpu: B300"),
        ({"grad_accum": 8}, "gradient accumulation"),
    ],
)
def test_what_cannot_be_expressed_has_a_reason(changes, reason):
    assert published_times_rows.express(row_of(**changes)) == reason


@pytest.mark.parametrize(
    ("speed", "seconds"),
    [
        ("16384 tok/s per device", 1.0),
        ("16384 tok/s, 1.0001 s/step", 1.0),
        ("0.316 s per fwd+bwd", 0.316),
        ("1.62 min per 1k iterations", None),
        ("2900 tok/s (median of logged)", None),
    ],
)
def test_the_time_of_a_step_is_read_in_the_sources_own_words(speed, seconds):
    """A step of the row has 4 x 4096 tokens."""
    assert published_times_rows.seconds_of(row_of(speed=speed)) == seconds


def test_a_step_is_predicted_as_predict_does_and_its_passes_take_less():
    whole = published_times.predicted(STEP)
    passes = published_times.predicted(Step(**{**vars(STEP), "passes_only": True}))
    assert whole is not None and passes is not None
    assert 0 < passes.seconds < whole.seconds and "NVIDIA H100" in whole.source
