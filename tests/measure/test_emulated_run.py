"""A run on an emulated card: which steps it takes, what it stores, and what contradicts it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
from fixtures_report import peaks, round_result
from scripted import FACTS, MACHINE, SETTINGS, WARM, ScriptedChildren, Ticker, go

from gcbench.core.errors import UnavailableError, UsageError
from gcbench.core.gradient_fingerprint import Fingerprint
from gcbench.core.records import EMULATED, Cell, Failure, Workload
from gcbench.job import settings as configs
from gcbench.measure import take_fingerprint, worker
from gcbench.measure.task import MeasureTask
from gcbench.models import sources
from gcbench.processes.messages import Answer
from gcbench.report import report_file as reports
from gcbench.strategies import parse

CARD = replace(
    MACHINE,
    device="cuda:0",
    device_name="NVIDIA H100 80GB HBM3",
    device_memory_bytes=2**36,
    settings={EMULATED: "h100"},
)
ON_CARD = replace(SETTINGS, device="cuda:0", emulate="h100", warmup=None, steps=5)
RAW = {"model": "gpt2", "batch_size": "1"}


class EmulatedChildren(ScriptedChildren):
    """Answers as children on an emulated card do: memory and counts, and no gradients."""

    def __init__(self, **fates):
        super().__init__(machine=CARD, facts=FACTS, **fates)

    def run(self, task, *, on_event, timeout_s):
        answer = super().run(task, on_event=on_event, timeout_s=timeout_s)
        if answer.result is None:
            return answer
        assert task.turn == 0, "nothing is timed, so there are no turns to wait for"
        return replace(answer, result=round_result(0, memory=peaks(1, 2, 3), diff=None), fingerprint=None)


def test_a_cell_takes_one_round_of_two_steps_and_none_is_timed(tmp_path):
    """The traps: three rounds of the same memory, and timed steps that take no time."""
    children, ticker = EmulatedChildren(), Ticker()
    report = go(tmp_path, children, ON_CARD, progress=ticker)
    assert children.calls == [(strategy, 1, 0) for strategy in ("off", "per-layer", "every:2")]
    assert {(task.warmup, task.steps, task.least_timed_s, task.with_memory) for task in children.tasks} == {
        (1, 0, 0.0, True)
    }
    assert ticker.shown[0] == "begin 1 None"
    assert report.source == "emulated"
    assert (report.settings["emulate"], report.settings["rounds"], report.settings["steps"]) == ("h100", 1, None)
    assert reports.load(tmp_path) == report
    assert not (tmp_path / "gradients").exists()


def test_a_process_on_an_emulated_card_measures_nothing_though_nobody_passed_the_flag(tmp_path):
    """The trap: gcbench called by a script that itself runs on an emulated card, and its figures called measured."""
    report = go(tmp_path, EmulatedChildren(), replace(ON_CARD, emulate=None, device="auto"))
    assert report.source == "emulated"
    assert "This process runs on that card" in report.notices[0]


def test_a_lost_fingerprint_on_a_real_device_stays_a_crash(tmp_path):
    children = ScriptedChildren(fates={("off", 1, WARM): Answer(result=round_result(0, [0.1]))})
    report = go(tmp_path, children)
    assert next(o for o in report.outcomes if o.cell.strategy == "off").failure.kind == "crash"


def test_resuming_keeps_the_emulated_card(tmp_path):
    children = EmulatedChildren(
        fates={("per-layer", 1, 0): Answer(failure=Failure(kind="crash", message="it fell over"))}
    )
    first = go(tmp_path, children, ON_CARD)
    again = EmulatedChildren()
    resumed = go(tmp_path, again, configs.settings(first.settings), previous=first)
    assert again.calls == [] and resumed.outcomes == first.outcomes
    with pytest.raises(UsageError, match="emulate 'h100' is now 'a100-80gb'"):
        go(tmp_path, again, replace(ON_CARD, emulate="a100-80gb"), previous=first)
    with pytest.raises(UsageError, match="is emulated, and this one would be measured"):
        go(
            tmp_path,
            ScriptedChildren(machine=replace(CARD, settings={})),
            configs.settings(first.settings),
            previous=first,
        )


# The settings


@pytest.mark.parametrize("device", [None, "auto", "cuda", "cuda:0"])
def test_the_emulated_card_is_the_first_cuda_device(device):
    found = configs.settings({**RAW, "emulate": "H100", "device": device})
    assert (found.emulate, found.device) == ("h100", "cuda:0")
    assert configs.settings(configs.as_json(found)) == found


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"device": "cpu"}, "--device cpu: the device is the emulated h100"),
        ({"device": "cuda:1"}, "--device cuda:1: the device is the emulated h100"),
        ({"pretrained": True}, "--pretrained: nothing is computed"),
    ],
)
def test_what_contradicts_the_emulated_card_is_a_mistake(values, message):
    with pytest.raises(UsageError, match=message):
        configs.settings({**RAW, "emulate": "h100", **values})


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("h1000", "there is no device 'h1000' in the catalogue; near names: h100"),
        ("a100", "'a100' comes in several sizes; near names: a100-40gb"),
        ("mi300x", "only NVIDIA's can be emulated"),
        ("m2-max", "only NVIDIA cards can be emulated"),
    ],
)
def test_a_card_that_cannot_be_emulated_is_unavailable(name, words):
    with pytest.raises(UnavailableError, match=words) as raised:
        configs.settings({**RAW, "emulate": name})
    assert "--device-memory" not in str(raised.value)  # gcbench run has no such option
    with pytest.raises(UsageError, match="--seed"):  # mistakes come first
        configs.settings({**RAW, "emulate": name, "seed": "x"})


@pytest.mark.parametrize("flag", ["--steps", "--rounds"])
def test_timed_steps_and_an_emulated_card_contradict_each_other(cli, flag):
    cli("run", "-m", "gpt2", "-b", 1, "--emulate", "h100", flag, 3).refused(2, flag, "no times", "leave it out")


def test_where_no_card_can_be_emulated_nothing_is_made(cli, tmp_path, monkeypatch):
    def refuse(card):
        raise UnavailableError("no compiler; install gcc")

    monkeypatch.setattr("gcbench.emulate.environment.environment", refuse)
    cli("run", "-m", "gpt2", "-b", 1, "--emulate", "h100", "--out", tmp_path / "run").refused(3, "install gcc")
    cli("check", "-m", "gpt2", "--emulate", "h100", "--out", tmp_path / "check").refused(3, "install gcc")
    cli("plan", "-m", "gpt2", "--device", "h100", "--emulate", "--out", tmp_path / "plan").refused(3, "install gcc")
    assert list(tmp_path.iterdir()) == []


# The child


class Card:
    """The CPU under the name of a card, whose clock must not be read."""

    name = "cuda:0"

    def __init__(self, cpu):
        self.cpu = cpu

    def __getattr__(self, name):
        assert name not in ("time", "start_timing", "process_bytes"), name
        return getattr(self.cpu, name)


@pytest.fixture
def measured(tmp_path, monkeypatch, one_thread):
    """`measured(strategy)` measures a tiny model on what its worker takes for an emulated card."""
    from gcbench.devices.backends.cpu import CpuDevice

    monkeypatch.setattr(worker, "card_behind", lambda device: "h100")
    monkeypatch.setattr(worker.backends, "open_device", lambda name: Card(CpuDevice()))
    monkeypatch.setattr(take_fingerprint, "take", lambda *args, **kwargs: pytest.fail("gradients were read"))
    monkeypatch.setattr(CpuDevice, "limit_memory", lambda self, limit: None)
    source = sources.resolve(str(tiny.write_model(tmp_path / "m", "llama", num_hidden_layers=3)))

    def call(strategy, **changes):
        events = []
        workload = Workload(
            model="m", device="cpu", batch_size=1, seq_len=8, precision="fp32", optim="adamw_torch", lora_r=None
        )
        task = MeasureTask(
            cell=Cell(workload=workload, strategy=strategy),
            round=0,
            source=source,
            layers=None,
            overrides={},
            attn_implementation=None,
            plan=parse(strategy).plan_for(3),
            seed=0,
            warmup=1,
            steps=4,
            least_timed_s=1.0,
            with_memory=True,
            turn=0,
            memory_limit_bytes=None,
        )
        return worker.measure(replace(task, **changes), events.append), events

    return call


def test_the_worker_counts_and_times_nothing(measured):
    """Even where the task asks for timed steps: an emulated card has no times to give."""
    answer, events = measured("per-layer")
    assert answer.failure is None, answer.failure
    result = answer.result
    assert (result.step_times_s, result.grad_checksum, result.grad_rel_diff) == ((), "", None)
    assert (result.layers_recomputed, result.layers_planned, result.params_without_grad) == (3, 3, 0)
    assert result.memory.process_bytes is None and result.memory.allocated_bytes > 0
    assert result.num_steps == 2 and answer.fingerprint is None
    assert [(event.kind, event.seconds) for event in events] == [("warm-up", None), ("memory", None)]


def test_a_failure_that_may_be_the_cards_own_says_so(measured, monkeypatch):
    """The trap: code that divides by a mean of zeros, and a user who looks for the mistake in the model."""

    def fail(*args, **kwargs):
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(worker, "random_batch", fail)
    answer, _ = measured("off")
    assert answer.failure.kind == "crash" and "nothing is computed on an emulated card" in answer.failure.message


def test_missing_gradients_are_named_without_reading_any():
    import torch

    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[0](torch.ones(1, 2)).sum().backward()
    assert take_fingerprint.names(model, step=0, seed=0) == Fingerprint(
        step=0, parameters=(), missing=("1.weight", "1.bias")
    )
