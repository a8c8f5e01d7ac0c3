"""A check on an emulated card: what it can tell, and that it never speaks of gradients that agree."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import tiny

from gcbench.check import view, worker
from gcbench.check.cases import FAILED, RUNS, UNSUPPORTED, WRONG, Check, CheckSetting, Combination, rows
from gcbench.check.evidence import Gradients
from gcbench.check.task import CheckTask
from gcbench.checkpointing import apply as checkpointing
from gcbench.models import sources

NEVER = ("identical", "within noise", "with the gradients of off", "equal to off")


@pytest.fixture
def checked(tmp_path, monkeypatch, one_thread):
    """`checked(strategy…)` checks a tiny model on what the worker takes for an emulated card; no gradient is read."""
    monkeypatch.setattr(worker, "card_behind", lambda device: "h100")
    monkeypatch.setattr(Gradients, "of", lambda model: pytest.fail("gradients were read"))

    def call(*strategies, family="llama"):
        source = sources.resolve(str(tiny.write_model(tmp_path / family, family, num_hidden_layers=3)))
        combinations = tuple(Combination(setting=CheckSetting(), strategy=strategy) for strategy in strategies)
        task = CheckTask(
            source=source,
            layers=None,
            overrides={},
            device="cpu",
            full_size=True,
            combinations=tuple(enumerate(combinations)),
            batch_size=1,
            seq_len=8,
            seed=0,
        )
        events = []
        answer = worker.check(task, events.append)
        assert answer.refusal is None, answer.refusal
        return Check(
            model="m",
            command="gcbench check",
            device="NVIDIA H100 80GB HBM3 (emulated)",
            versions={},
            scaled=None,
            num_params=10,
            num_layers=3,
            combinations=combinations,
            results=tuple(event for event in events if hasattr(event, "verdict")),
            is_emulated=True,
        )

    return call


def test_what_runs_and_recomputes_its_layers_is_told_without_a_word_on_equal_gradients(checked):
    """The trap: zeros that equal zeros, called identical gradients."""
    check = checked("per-layer", "every:2", "reentrant")
    assert [result.verdict for result in check.results] == [RUNS] * 3
    for result in check.results:
        assert result.layers_recomputed == result.layers_expected
        assert (result.grad_rel_diff, result.noise, result.worst_param) == (None, None, None)
    assert {row.source for row in rows(check)} == {"emulated"}
    for text in (view.plain(check, width=200), view.markdown(check), view.rendered(check, "csv")):
        assert not [word for word in NEVER if word in text]
    assert view.summary(check).startswith("3 of 3 combinations run on the emulated card, which computes nothing.")
    assert "Exactly the planned layers were recomputed." in view.summary(check)
    assert view.problems(check) == () and check.failures == () and not check.is_empty
    assert json.loads(view.rendered(check, "json"))["rows"][0]["verdict"] == "runs"


def test_layers_that_are_not_recomputed_are_wrong(checked, monkeypatch):
    monkeypatch.setattr(checkpointing, "apply", lambda model, plan: checkpointing.RecomputeCounter())
    (result,) = checked("per-layer").results
    assert (result.verdict, result.message) == (WRONG, "recomputed 0 of 3 layers")


def test_a_failure_that_may_be_the_cards_own_says_so(checked, monkeypatch):
    apply = checkpointing.apply

    def fail(model, plan):
        raise ValueError("all experts are empty")

    monkeypatch.setattr(checkpointing, "apply", lambda model, plan: apply(model, plan) if plan is None else fail(0, 0))
    (result,) = checked("per-layer").results
    assert result.verdict == FAILED and "nothing is computed on an emulated card" in result.message


def test_a_compiler_that_is_missing_is_no_fault_of_the_model(checked, monkeypatch):
    class TritonMissing(RuntimeError):
        pass

    def fail(model, plan):
        raise TritonMissing("Cannot find a working triton installation")

    monkeypatch.setattr(checkpointing, "apply", fail)
    (result,) = checked("per-layer").results
    assert result.verdict == UNSUPPORTED and "pip install triton" in result.message


def test_a_stored_check_of_before_is_measured():
    check = Check(
        model="m", command="", device="", versions={}, scaled=None, num_params=1, num_layers=1, combinations=()
    )
    assert not check.is_emulated and "emulated" not in view.summary(replace(check, results=()))
