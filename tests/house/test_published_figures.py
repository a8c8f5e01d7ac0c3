"""Figures that stand in sentences of the pages are those of the committed results."""

from __future__ import annotations

import statistics
import sys

import pytest
from conftest import ROOT
from published_figures import REFERENCE, choices, families, stored

from gcbench.plan.named import COMPARED_WITH


def page(name: str) -> str:
    return " ".join((ROOT / "docs" / name).read_text(encoding="utf-8").split())


def test_predictions_on_an_h100():
    text, grid = page("accuracy.md"), stored("accuracy")["truths"]["truth-nvidia-h100-80gb-hbm3"]
    seen, errors = grid["figures"], grid["errors"]
    workloads = len({each["case"] for each in errors})
    assert f"{workloads} workloads with torch 2.11, {seen['cells']} cells, all predicted" in text
    assert seen["median"] < 1e-6 and "within 0.0001 % in the median" in text
    assert f"within {100 * seen['worst']:.3f} % in the worst cell" in text
    assert f"right in {100 * seen['phases']:.0f} %" in text
    reserved = max(abs(each["reserved_error"]) for each in errors if each["reserved_error"] is not None)
    assert f"{100 * seen['reserved, median']:.3f} % in the median and {100 * reserved:.1f} % in the worst" in text
    assert seen["without a prediction"] == 0


def test_what_plans_and_predictions_say_of_their_accuracy():
    seen = stored("accuracy")["truths"]["truth-nvidia-h100-80gb-hbm3"]["figures"]
    allocated, reserved = f"within {100 * seen['worst']:.2f} %", f"within {100 * seen['reserved, worst']:.0f} %"
    gaps = (ROOT / "tests" / "data" / "golden" / "explained.md").read_text(encoding="utf-8")
    for text in (COMPARED_WITH, gaps):
        assert f"{seen['cells']} cells" in text
        assert f"allocated peaks {allocated}" in text or f"allocated peaks agree {allocated}" in text
        assert f"reserved ones {reserved}" in text
    assert f"in the median {100 * seen['reserved, median']:.2f} %" in COMPARED_WITH


def test_predictions_on_emulated_cards():
    """The bars of `benchmarks/accuracy.py`, which are figures of the page as well."""
    stored_grids = stored("accuracy")["truths"]
    grids = {name: stored_grids[name] for name in stored_grids if "-emulated-" in name or "-loops-" in name}
    assert len(grids) == 10
    for grid in grids.values():
        figures, bars = grid["figures"], grid["bars"]
        assert figures["allocated equal"] >= bars.get("allocated equal", 0) and figures["worst"] <= bars["worst"]
        assert figures["reserved equal"] >= bars.get("reserved equal", 0)
        assert figures["reserved, worst"] <= bars["reserved, worst"]
        assert figures["fits"] == 1.0
    assert "predicted right in all" in page("accuracy.md")


def test_predictions_on_a_cpu():
    text = page("accuracy.md")
    grids = [grid["figures"] for name, grid in stored("accuracy")["truths"].items() if "-cpu-" in name]
    assert f"{sum(each['cells'] for each in grids)} cells on two processors" in text
    assert max(each["median"] for each in grids) < 1e-6
    assert f"the largest {100 * max(each['worst'] for each in grids):.4f} %" in text
    assert all(each["phases"] == 1 for each in grids)


def test_the_choice_of_a_plan():
    text, scores = page("accuracy.md"), choices()
    speeds = [score.speed_frac for score in scores]
    assert f"In {len(scores)} cases" in text and all(score.fits for score in scores)
    assert statistics.median(speeds) == 1.0
    good = sum(speed >= 0.95 for speed in speeds) / len(speeds)
    assert f"at least 95 % of it in {100 * good:.0f} % of them; the worst has {100 * min(speeds):.0f} %" in text
    steps = sum(score.raced_steps for score in scores) / sum(score.grid_steps for score in scores)
    most = max(score.raced_steps / score.grid_steps for score in scores)
    assert f"{100 * steps:.1f} % of the steps" in text and f"({100 * most:.0f} % in the costliest case)" in text


def test_the_noise_of_equal_settings(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT / "benchmarks")])
    import regret_scores

    workloads = stored("regret-cpu-intel-xeon")["workloads"].values()
    pairs = [ratio for workload in workloads for ratio in regret_scores.same_work(workload)]
    share = sum(ratio >= 0.95 for ratio in pairs) / len(pairs)
    assert f"95 % of the faster in {100 * share:.0f} % of the pairs" in page("accuracy.md")


def test_a_plan_that_was_measured_on_a_card():
    text = (REFERENCE / "plan-llama-3.2-1b-h100" / "plan.md").read_text(encoding="utf-8")
    assert "**checkpointing**: selective:attention" in text and "276 ms a step" in page("accuracy.md")


def test_types_of_models():
    trained, types = families()
    built = sum(each["built"] for each in stored("families")["types"])
    text = page("checking.md")
    assert f"Of the {types} types of causal LMs in transformers, {built} end with a verdict" in text
    assert f"{trained} train" in text
    predictable = [each for each in stored("coverage")["types"] if each["built"] and not each["refuses_checkpointing"]]
    predicted = [each for each in predictable if len(each["predicted"] or ()) == 3]
    assert f"{len(predicted)} of the {len(predictable)} types" in page("predicting.md")


def test_speed_of_predictions():
    text, speed = page("predicting.md"), stored("prediction-speed")
    assert f"takes {speed['large']['seconds']:.1f} s on two cores" in text
    assert f"about {10 * int(speed['tracker']['speedup'] / 10)} times as fast" in text
