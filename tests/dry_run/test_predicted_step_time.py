"""A dry run computes nothing; the time of its step is what `gcbench predict` says of the same training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from dry_runs import dry_run, observed, step

from gcbench.cli import app as command_line
from gcbench.dry_run import step_time, view, would_fit
from gcbench.dry_run.records import PredictedTime, Verdict

DEVICE = ["--device", "rtx-4090"]
ROW = {
    "step_time_s": 0.25,
    "step_time_low_s": 0.2,
    "step_time_high_s": 0.3125,
    "tokens_per_s": 24_576.0,
    "time_source": "the published rates of NVIDIA GeForce RTX 4090",
}
FITS = Verdict(ending="fits", sentence="it fits", exit_code=0)


def seen(tmp_path: Path, **changes: object):
    config = tmp_path / "config.json"
    config.write_text("{}", encoding="utf-8")
    found = observed(**changes)
    return replace(found, workload=replace(found.workload, config=str(config)))


def predicted(monkeypatch, found, document, num_cards=1):
    called = []

    def run(arguments, environment):
        called.append(arguments)
        return document

    monkeypatch.setattr(would_fit, "importable", lambda emulated: {})
    monkeypatch.setattr(would_fit, "run_gcbench", run)
    return step_time.predict(found, DEVICE, {}, num_cards=num_cards), called


def test_it_is_the_prediction_for_the_scripts_own_batch_and_checkpointing(monkeypatch, tmp_path):
    found, (called,) = predicted(monkeypatch, seen(tmp_path), {"rows": [ROW]})
    assert (found.seconds, found.low_s, found.high_s, found.strategy) == (0.25, 0.2, 0.3125, "off")
    assert called[:1] == ["predict"] and called[-4:] == ["--strategies", "off", *DEVICE]
    assert called[called.index("--batch") + 1] == "12"
    assert {word for word in called if word.startswith("--")} <= command_line._options()["predict"]


@pytest.mark.parametrize(("reentrant", "strategy"), [(False, "per-layer"), (True, "per-layer+reentrant")])
def test_all_layers_checkpointed_is_per_layer(tmp_path, reentrant, strategy):
    counted = {"checkpointed": 4, "recomputed": 4, "layers_checkpointed": 4, "layers_recomputed": 4}
    assert (
        step_time.strategy_of(seen(tmp_path, later=step(2, 2**31, **counted), checkpoint_reentrant=reentrant))
        == strategy
    )


def test_what_has_no_counterpart_has_a_reason_instead_of_a_time(monkeypatch, tmp_path):
    some = {"checkpointed": 2, "recomputed": 2, "layers_checkpointed": 2, "layers_recomputed": 2}
    part = seen(tmp_path, later=step(2, 2**31, **some))
    cases = [
        (part, 1, "only some of its layers"),
        (seen(tmp_path), 2, "several cards"),
        (observed(workload=replace(observed().workload, causal_lm=False)), 1, "not a"),
    ]
    for found, num_cards, words in cases:
        answer, called = predicted(monkeypatch, found, {"rows": [ROW]}, num_cards)
        assert answer.seconds is None and words in answer.why_not and not called


@pytest.mark.parametrize(
    ("document", "words"), [("there is no device 'x'", "no device"), ({"rows": []}, "no time"), ({}, "no time")]
)
def test_a_prediction_that_fails_is_told(monkeypatch, tmp_path, document, words):
    found, _ = predicted(monkeypatch, seen(tmp_path), document)
    assert found.seconds is None and words in found.why_not


def test_a_script_that_trains_nothing_has_no_step(monkeypatch, tmp_path):
    assert predicted(monkeypatch, seen(tmp_path, num_steps=0), {"rows": [ROW]}) == (None, [])


def test_the_report_says_that_the_time_is_predicted():
    time = PredictedTime(
        strategy="off", seconds=0.25, low_s=0.2, high_s=0.3125, tokens_per_s=24_576.0, source="the published rates of X"
    )
    shown = view.text(replace(dry_run(observed(), FITS), time=time), width=200)
    assert (
        "A step would take about 250 ms (200 ms to 312 ms), 25,000 tokens/s: predicted, not measured, from the "
        "published rates of X."
    ) in shown
    assert '"seconds": 0.25' in view.document(replace(dry_run(observed(), FITS), time=time))
    without = replace(dry_run(observed(), FITS), time=PredictedTime(why_not="its weights are quantised"))
    assert "The time of a step is not predicted: its weights are quantised." in view.text(without, width=200)
