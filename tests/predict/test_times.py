"""Predicted times, from a session on fake tensors and through the real command line."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny

from gcbench import strategies
from gcbench.calibration import figures
from gcbench.calibration.op_times import Calibration, Point
from gcbench.devices import cards
from gcbench.devices import target as targets
from gcbench.devices.target import TargetOptions
from gcbench.models import sources
from gcbench.predict.task import CellToPredict, PredictTask
from gcbench.predict.worker import Session

LAYERS = 4


def task(tmp_path, family="llama", **options):
    target = targets.resolve_target(TargetOptions(**(options or {"device": "h100"})), None)
    assert target is not None
    return PredictTask(
        source=sources.resolve(str(tiny.write_model(tmp_path / family, family))),
        layers=LAYERS,
        overrides={},
        attn_implementation=None,
        lora=None,
        precision="bf16",
        optim="adamw_torch",
        target=target,
        cells=(),
        explain=False,
        exact=False,
    )


def predicted(session, spec="off", batch_size=4):
    plan = strategies.parse(spec).plan_for(LAYERS)
    return session.predict(CellToPredict(number=0, batch_size=batch_size, seq_len=64, plan=plan))


def test_a_card_of_the_catalogue_has_times_and_their_source(tmp_path):
    session = Session(task(tmp_path))
    off, again = predicted(session), predicted(session, "per-layer")
    assert off.time is not None and again.time is not None and off.why_no_time is None
    assert 0 < off.time.seconds < again.time.seconds
    assert off.time.source == "the published rates of NVIDIA H100 80GB HBM3"
    assert off.time.waiting_frac > 0.5, "so small a model is launched more slowly than it runs"


def test_a_session_and_gcbench_plan_have_one_time_for_a_step(tmp_path):
    """The trap: two models of time that drift apart."""
    asked = task(tmp_path)
    session = Session(asked)
    plan = strategies.parse("per-layer").plan_for(LAYERS)
    step = session.predictor.step(plan, batch_size=4, seq_len=64)
    assert predicted(session, "per-layer").time.seconds == step.seconds(figures.figures_of_card(asked.target.card))


def test_times_change_no_byte(tmp_path, monkeypatch):
    with_times = predicted(Session(task(tmp_path)))
    monkeypatch.setattr(Session, "time", lambda self, step, plan: (None, None))
    assert predicted(Session(task(tmp_path))) == replace(with_times, time=None)


@pytest.mark.parametrize(
    ("options", "spec", "words"),
    [
        ({"device_memory": 2**34}, "off", "name a card with --device"),
        ({"device": "cpu"}, "off", "gcbench plan with the same settings"),
        ({"device": "h100"}, "offload", "gcbench run measures them"),
    ],
)
def test_where_no_time_is_known_a_sentence_says_how_to_get_one(tmp_path, options, spec, words):
    found = predicted(Session(task(tmp_path, **options)), spec)
    assert found.time is None and words in found.why_no_time


def test_recurrent_layers_without_their_kernels_have_no_time(tmp_path):
    """The trap: the time of PyTorch code that no card would run."""
    session = Session(task(tmp_path, "mamba"))
    found = predicted(session, batch_size=1)
    assert found.time is None and "in place of fused kernels" in found.why_no_time


def test_the_policy_of_selective_checkpointing_costs_time_in_python(tmp_path):
    """Its kernels are those of off and a few more; deciding on every operator is what takes time."""
    session = Session(task(tmp_path))
    off, decided = predicted(session), predicted(session, "selective:matmul")
    assert decided.time.seconds > 2 * off.time.seconds


def test_a_measured_operator_table_of_the_card_is_used_and_named(tmp_path, monkeypatch):
    """A synthetic table in which every kernel takes a millisecond."""
    known = Session(task(tmp_path))
    plan = strategies.parse("off").plan_for(LAYERS)
    works = {work for work in known.predictor.step(plan, batch_size=4, seq_len=64).calls if work.kind != "view"}
    names = ("op", "kind", "dtype", "nbytes", "flops", "dims", "is_causal", "call", "cold")
    points = tuple(Point(**{name: getattr(work, name) for name in names}, seconds=1e-3) for work in works)
    table = Calibration(machine="cuda, NVIDIA H100 80GB HBM3", created="2026-12-01T00:00:00+00:00", points=points)
    monkeypatch.setattr(figures.card_tables, "load", lambda card, folder: table)
    found = predicted(Session(task(tmp_path)))
    assert found.time.source == "the measured operator table of NVIDIA H100 80GB HBM3, 2026-12-01"
    assert found.time.seconds > 0.1 > predicted(known).time.seconds


def test_the_command_shows_times_with_their_bands(cli, model):
    arguments = ("-m", model(), "--batch", 2, "--seq-len", 16, "--device", "a100-80gb", "--strategies", "off,per-layer")
    rows = cli("predict", *arguments, "--json").rows
    for row in rows.values():
        assert row["step_time_low_s"] < row["step_time_s"] < row["step_time_high_s"]
        assert row["tokens_per_s"] == pytest.approx(2 * 16 / row["step_time_s"])
        assert row["time_source"] == f"the published rates of {cards.find('a100-80gb').title}"
    assert rows["off"]["time_overhead_frac"] == 0.0 < rows["per-layer"]["time_overhead_frac"]
    text = cli("predict", *arguments).out
    assert "step time" in text and "Times are estimates from the published rates" in text


def test_a_stored_prediction_keeps_its_times(cli, model, tmp_path):
    folder = tmp_path / "run"
    arguments = ("-m", model(), "--batch", 2, "--seq-len", 16, "--device", "t4", "--strategies", "off,per-layer")
    made = cli("predict", *arguments, "--out", folder)
    assert made.code == 0, made.err
    assert (folder / "plots" / "tradeoff.png").exists()
    assert "| step time | overhead | tokens/s |" in (folder / "report.md").read_text()
    assert cli("report", folder).out.split() == made.out.split()
