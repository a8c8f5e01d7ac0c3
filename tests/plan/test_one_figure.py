"""One cell has one peak and one answer: in a plan's table, its rows and its sentences, in predict, and by exit code."""

from __future__ import annotations

import re
from dataclasses import replace

import planned
import pytest
from fixtures_predicted import CARD, cell, peaks, predicted_report, prediction
from fixtures_report import outcome, report

from gcbench.core.units import GIB, MIB
from gcbench.devices.target import Target
from gcbench.plan import named, view
from gcbench.plan.decision import Candidate, best_of_each, nearest_faster, why_not_faster
from gcbench.plan.search import planner as search
from gcbench.plan.search.planner import Planner
from gcbench.plan.task import PlanTask
from gcbench.predict.task import CellToPredict
from gcbench.predict.worker import Session
from gcbench.report import compare
from gcbench.simulate.costs import CardFigures
from gcbench.strategies import OFF, Plan, parse

pytestmark = pytest.mark.slow

SPECS = (OFF, "per-layer", "every:2")
WIDE = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 4096}


def candidate(strategy="off", batch=4, peak=10 * GIB, rate=100.0, **changes):
    given = {
        "strategy": strategy, "plan": Plan(num_layers=2), "batch_size": batch, "peak_bytes": peak,
        "allocated_bytes": peak, "peak_phase": None, "fits": True, "step_time_s": 1.0, "tokens_per_s": rate,
    }  # fmt: skip
    return Candidate(**(given | changes))


@pytest.mark.parametrize("batch_sizes", [(2, 4, 8, 16), None])
def test_what_a_plan_shows_is_what_predict_says(monkeypatch, one_thread, batch_sizes):
    """The trap: 27.66 GiB in the table, 30.33 in the sentence: tensors alone, and all that the process holds."""
    monkeypatch.setattr(search, "levers", lambda *args, **kwargs: ())
    monkeypatch.setattr(search, "_MOST_POLICIES", 1)
    task = PlanTask(
        source=planned.source_of("llama"), layers=None, overrides=WIDE, attn_implementation=None, lora=None,
        precision="fp32", optim="sgd", target=Target(kind="cuda", name="cuda", memory_bytes=700 * MIB), seq_len=128,
        named=tuple((spec, parse(spec).plan_for(4)) for spec in SPECS), batch_sizes=batch_sizes, reserve_frac=0.05,
        layers_in_order=None, can_checkpoint=True, device_here=None,
    )  # fmt: skip
    decision = Planner(task, CardFigures(None)).decide()
    session = Session(task.as_predictions())
    shown = best_of_each(decision.candidates, decision.choice)
    nearest = nearest_faster(decision.candidates, decision.choice)
    assert any(not each.fits for each in decision.candidates)
    for each in {*shown, *([nearest] if nearest else [])}:
        asked = CellToPredict(number=0, batch_size=each.batch_size, seq_len=128, plan=each.plan)
        assert session.predict(asked).memory.process_bytes == each.peak_bytes, (each.strategy, each.batch_size)
        assert not each.is_lower_bound
    if nearest is not None:
        assert f"need {nearest.peak_text}." in decision.binding
    if batch_sizes is not None:
        assert not any(each.is_lower_bound for each in decision.candidates)


def test_a_lower_bound_is_marked_wherever_it_is_shown():
    bound = candidate(batch=8, peak=41 * GIB, rate=200.0, fits=False, is_lower_bound=True)
    assert bound.peak_text == "≥ 41.00 GiB"
    assert why_not_faster([candidate(), bound], candidate()).endswith("and need ≥ 41.00 GiB.")


@pytest.mark.parametrize("command", ["run", "predict", "plan --emit trl"])
def test_nothing_fits_is_exit_1_in_every_command(cli, model, command):
    """The trap: 1 in plan, 2 with --emit, 0 in predict and run."""
    memory = "--memory-limit" if command == "run" else "--device-memory"
    name, *more = command.split()
    done = cli(
        *(name, "-m", model(), "-b", 8, "--seq-len", 64, memory, "1MiB", *more),
        *("--device", "rtx-4090" if name == "plan" else "cpu"),  # a card needs no timing of operators
        *("--strategies", "off,per-layer", *(("--rounds", 1, "--steps", 1) if name == "run" else ()), "--out", "o"),
    )
    assert done.code == 1, done.err
    assert done.err.splitlines()[-1].startswith("error: nothing fits into ")
    assert re.search(r"; (try|take|use) ", done.err.splitlines()[-1])
    assert ("off" in done.err) if "--emit" in command else ("per-layer" in done.out), "what was found is shown"


def test_a_measurement_elsewhere_names_the_flag_that_would_help(cli, model):
    """The trap: "leave out --device", which was not given."""
    cli("plan", "-m", model(), "--device-memory", "40MiB", "--measure").refused(2, "add --device cpu")
    cli("plan", "-m", model(), "--device", "h100", "--measure").refused(2, "leave out --device")


def test_what_has_been_compared_with_a_card_is_said():
    (said,) = named.unconfirmed(Target(kind="cuda", name="h200"), is_here=False)
    assert "H100" in said and "times are estimates" in said and "not been compared" not in said
    assert named.unconfirmed(Target(kind="cpu", name="cpu"), is_here=True) == ()
    assert view.best_of_each is best_of_each


# A prediction beside a run


def beside(measured, predicted, *, device_name="Example Card 24 GB", status=None):
    run = report(
        outcome("off", peaks(1, measured, 1), ((1.0,),), work=replace(CARD, device="cuda:0"), failure=status),
        machine=replace(predicted_report().machine, device="cuda:0", device_name=device_name),
        model=predicted_report().model,
    )
    said = predicted_report(cell("off", prediction(peaks(1, predicted, 1, reserved=9, process=2000), limit=1000)))
    return said, run


def test_a_prediction_is_compared_with_a_run_by_memory():
    """Also one that does not fit, where the run did; a card has another name in a run's cells."""
    said, run = beside(measured=1001, predicted=1000)
    (change,) = compare.compare(said, run, force=False).changes
    assert (change.memory_verdict, change.time_verdict) == ("above", "not measured")
    assert change.memory_change_frac == pytest.approx(0.001)
    (back,) = compare.compare(run, said, force=False).changes
    assert back.memory_verdict == "below"
    (same,) = compare.compare(*beside(measured=1000, predicted=1000), force=False).changes
    assert same.memory_verdict == "same"
    assert compare.broken(compare.compare(said, run, force=False), {"memory": 0.0005})


def test_a_prediction_for_another_card_is_not_compared():
    said, run = beside(measured=1000, predicted=1000, device_name="Another Card")
    with pytest.raises(compare.UsageError, match="different device"):
        compare.compare(said, run, force=False)
    assert compare.compare(said, run, force=True).changes[0].memory_verdict == "same"
