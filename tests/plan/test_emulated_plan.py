"""`gcbench plan --emulate`: the choice is run on an emulated card, and the next one is chosen where it runs out."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fixtures_report import peaks, round_result
from scripted import FACTS, MACHINE, SOURCE

from gcbench.core.errors import UnavailableError, UsageError
from gcbench.core.records import EMULATED, Failure
from gcbench.core.units import MIB
from gcbench.devices import cards
from gcbench.devices.target import Target, TargetOptions, resolve_target
from gcbench.job.settings import Settings
from gcbench.measure.progress import QuietProgress
from gcbench.plan import emulated, view
from gcbench.plan.decision import Candidate, CandidateDetails, Decision
from gcbench.plan.planned import PlanResult
from gcbench.processes.messages import Answer
from gcbench.strategies import Plan

OUTSIDE = 500 * MIB
H100 = cards.find("h100")
PREDICTED_FOR = "Predicted for NVIDIA H100 80GB HBM3, 9.77 GiB; nothing was run there."


def candidate(strategy, peak_mib, tokens_per_s, *, fits=True):
    return Candidate(
        strategy=strategy,
        plan=Plan(num_layers=4),
        batch_size=2,
        peak_bytes=peak_mib * MIB,
        allocated_bytes=peak_mib * MIB,
        peak_phase="backward",
        fits=fits,
        step_time_s=1.0,
        tokens_per_s=tokens_per_s,
    )


BIG = candidate("off", 9_000, 100.0)
SAME = candidate("every:4", 9_000, 90.0)
SMALL = candidate("per-layer", 4_000, 70.0)
TOO_BIG = candidate("selective:matmul", 12_000, 200.0, fits=False)


def planned(*candidates, choice=BIG):
    target = Target(kind="cuda", name="h100", card=H100, memory_bytes=10_000 * MIB)
    return PlanResult(
        settings=Settings(model="m", batch_size=(2,)),
        seq_len=8,
        target=target,
        machine=MACHINE,
        facts=FACTS,
        decision=Decision(
            limit_bytes=10_000 * MIB,
            usable_bytes=9_500 * MIB,
            reserve_frac=0.05,
            choice=choice,
            smallest=None,
            candidates=candidates,
            largest=(),
            binding="why the first",
            details=(CandidateDetails(of=SMALL, peak_words="of the second", levers=()),),
            times_from="rates",
            notices=(PREDICTED_FOR, "another"),
            outside_bytes=OUTSIDE,
        ),
        command="gcbench plan",
        created="",
        hub_id=None,
        source=SOURCE,
    )


class Card:
    """Reserves what is scripted for a strategy, in MiB; a failure is a failure."""

    def __init__(self, **fates):
        self.fates, self.tasks = {name.replace("_", "-"): fate for name, fate in fates.items()}, []

    def run(self, task, *, on_event, timeout_s):
        self.tasks.append(task)
        fate = self.fates[task.cell.strategy]
        if isinstance(fate, Failure):
            return Answer(failure=fate)
        return Answer(result=round_result(0, memory=peaks(1, 2, 3, reserved=fate), diff=None))


def confirmed(card, *candidates, **changes):
    return emulated.confirm(planned(*candidates, **changes), children=card, progress=QuietProgress())


OUT = Failure(kind="oom", message="memory ran out in the backward phase; try a smaller --batch")


def test_the_choice_is_run_once_and_shown_with_both_figures():
    card = Card(off=8_500)
    found = confirmed(card, BIG, SMALL, TOO_BIG)
    (task,) = card.tasks
    assert (task.cell.strategy, task.cell.workload.device, task.steps, task.warmup) == ("off", "cuda:0", 0, 1)
    assert task.memory_limit_bytes == 10_000 * MIB - OUTSIDE
    assert found.decision.choice == replace(BIG, emulated_bytes=9_000 * MIB)
    assert found.decision.choice in found.decision.candidates
    assert found.decision.binding == "why the first"
    lines = dict(view.answer(found))
    assert lines["emulated"].startswith("8.79 GiB, predicted 8.79 GiB: PyTorch's own allocator reserved 8.30 GiB")
    assert found.decision.notices == (
        "Predicted for NVIDIA H100 80GB HBM3, 9.77 GiB; the choice was run on an emulated card, its memory alone.",
        "another",
    )
    assert [row["emulated_bytes"] for row in view.rows(found)] == [9_000 * MIB, None, None]


@pytest.mark.parametrize("fate", [OUT, 9_001])
def test_where_memory_runs_out_the_best_one_with_less_is_next(fate):
    """The traps: one that needs as much and fails as well, one that never fitted, and the details of the first."""
    card = Card(off=fate, per_layer=3_500)
    decision = confirmed(card, TOO_BIG, BIG, SAME, SMALL).decision
    assert [task.cell.strategy for task in card.tasks] == ["off", "per-layer"]
    assert decision.choice == replace(SMALL, emulated_bytes=4_000 * MIB)
    assert decision.peak_words == "of the second" and decision.binding != "why the first"
    lost = next(each for each in decision.candidates if each.strategy == "off")
    assert not lost.fits and lost.is_lower_bound == (fate is OUT)
    assert lost.peak_bytes == (10_000 if fate is OUT else 9_501) * MIB
    assert any("off at batch 2" in notice and "were predicted" in notice for notice in decision.notices)


def test_where_nothing_runs_nothing_fits():
    decision = confirmed(Card(off=OUT, per_layer=OUT), BIG, SMALL).decision
    assert decision.choice is None and not any(each.fits for each in decision.candidates)
    assert decision.smallest.strategy in ("off", "per-layer") and decision.notices[0] == PREDICTED_FOR


def test_a_failure_that_memory_does_not_explain_leaves_the_choice_and_says_so():
    """The trap: a package that is missing here taken for a plan that does not fit there."""
    fate = Failure(kind="unsupported", message="compiled layers need the package triton; run pip install triton")
    decision = confirmed(Card(off=fate), BIG, SMALL).decision
    assert decision.choice == BIG and decision.notices[0] == PREDICTED_FOR
    assert "could not be emulated (compiled layers need the package triton)" in decision.notices[-1]


@pytest.mark.parametrize(
    "target", [None, Target(kind="cpu", name="cpu"), Target(kind="cuda", name="cuda", memory_bytes=2**34)]
)
def test_without_a_card_by_name_there_is_nothing_to_emulate(target):
    with pytest.raises(UsageError, match=r"--emulate needs a card by its name.*--device h100"):
        emulated.card_of(target)


def test_the_card_has_the_memory_that_the_plan_is_for():
    target = Target(kind="cuda", name="h100", card=H100, memory_bytes=2**34, expandable_segments=True)
    assert emulated.card_of(target) == replace(H100, memory_bytes=2**34)
    assert emulated.variables(target) == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    assert emulated.variables(replace(target, expandable_segments=False)) == {}
    amd = cards.find("mi300x")
    with pytest.raises(UnavailableError, match="only NVIDIA's can be emulated"):
        emulated.card_of(replace(target, card=amd))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--measure",), "--emulate: --measure runs the candidates on this machine's own device"),
        (("--from", "x"), "--emulate: a stored run or plan is taken as it is"),
    ],
)
def test_what_contradicts_the_flag_is_a_mistake(cli, flags, message):
    cli("plan", "-m", "gpt2", "--device", "h100", "--emulate", *flags).refused(2, message)


def test_a_file_that_names_a_card_for_gcbench_run_switches_it_on(cli, tmp_path):
    """One file for all commands: elsewhere the key names the card, which here is that of --device."""
    (tmp_path / "gcbench.toml").write_text('model = "gpt2"\ndevice = "mi300x"\nemulate = "h100"\n')
    cli("plan", "--config", tmp_path / "gcbench.toml").refused(3, "only NVIDIA's can be emulated")


def test_an_emulated_device_of_this_process_is_a_card_to_predict_for():
    """The trap: operators timed on a card that runs none."""
    machine = replace(MACHINE, device="cuda:0", device_name="NVIDIA H100 80GB HBM3", settings={EMULATED: "h100"})
    assert resolve_target(TargetOptions(), machine) == resolve_target(TargetOptions(device="h100"), None)
