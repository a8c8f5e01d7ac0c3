"""The scheduling of a run, with children that answer from a script: what is measured when, and what is stored."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fixtures_report import round_result
from scripted import (
    FACTS,
    MACHINE,
    SETTINGS,
    WARM,
    Call,
    ScriptedChildren,
    Ticker,
    crash,
    go,
    gradients,
    numbers,
    turns,
)

from gcbench.core.errors import UnavailableError, UsageError
from gcbench.measure import runner
from gcbench.processes.messages import Answer, Refusal
from gcbench.report import report_file as reports

ORDER = ("off", "per-layer", "every:2")
THERE, BACK = ORDER, ORDER[::-1]


def test_rounds_are_interleaved_with_off_first(tmp_path):
    """The traps: all rounds of a cell at once, or always in one order, which a drift of the machine turns into a
    difference; and a strategy measured before the gradients it is compared with."""
    children = ScriptedChildren()
    report = go(tmp_path, children)
    assert children.calls == [
        *((strategy, 1, WARM) for strategy in ORDER),
        *((strategy, 1, turn) for turn, order in enumerate((THERE, BACK, THERE)) for strategy in order),
    ]
    assert [outcome.cell.strategy for outcome in report.outcomes] == ["per-layer", "off", "every:2"]
    assert turns(report) == {strategy: [[0, 1, 2]] for strategy in ORDER}
    assert children.most_running == 3 and children.running == []


def test_every_workload_has_its_off_before_the_others(tmp_path):
    """A batch size is measured to its end before the next one takes its memory."""
    children = ScriptedChildren()
    go(tmp_path, children, replace(SETTINGS, batch_size=(2, 1), rounds=1))
    assert children.calls == [(strategy, batch, doing) for batch in (2, 1) for doing in (WARM, 0) for strategy in ORDER]
    assert children.most_running == 3 and children.running == []


def test_memory_is_probed_in_the_first_process_only(tmp_path):
    """The trap: a second memory measurement of a cell on resume, which makes two peaks of one."""
    first = ScriptedChildren()
    stored = go(tmp_path, first, replace(SETTINGS, rounds=1))
    assert [task.with_memory for task in first.tasks] == [True] * 3
    again = ScriptedChildren()
    report = go(tmp_path, again, previous=stored)
    assert [(task.round, task.with_memory) for task in again.tasks] == [(1, False)] * 3
    # As many steps before the first timed one: the one that measures memory warms up too.
    assert {task.warmup + task.with_memory for task in (*first.tasks, *again.tasks)} == {2}
    assert [[result.memory is None for result in each.rounds] for each in report.outcomes] == [[False, True]] * 3


CARD = replace(MACHINE, device="cuda:0", device_name="A card")


def test_unread_process_memory_on_a_card_is_noticed_once(tmp_path):
    """The trap: without nvidia-smi the column is empty without a word, and each continued run adds the word again."""
    unread = {"machine": CARD, "process_bytes": None}
    first = go(tmp_path, ScriptedChildren(**unread))
    assert first.notices.count(runner.PROCESS_UNREAD) == 1
    assert reports.load(tmp_path).notices == first.notices
    again = go(tmp_path, ScriptedChildren(**unread), replace(SETTINGS, rounds=4), previous=first)
    assert again.notices == first.notices


def test_process_memory_that_was_read_needs_no_notice(tmp_path):
    report = go(tmp_path, ScriptedChildren(machine=CARD, process_bytes=5000))
    assert runner.PROCESS_UNREAD not in report.notices
    assert {outcome.rounds[0].memory.process_bytes for outcome in report.outcomes} == {5000}


def test_a_failed_cell_is_not_measured_again(tmp_path):
    """The trap: an hour of timeouts, three times over."""
    children = ScriptedChildren(fates={("per-layer", 1, WARM): crash("timeout"), ("every:2", 1, 1): crash("killed")})
    ticker = Ticker()
    report = go(tmp_path, children, progress=ticker)
    assert [call for call in children.calls if call[0] == "per-layer"] == [("per-layer", 1, WARM)]
    assert [call[2] for call in children.calls if call[0] == "every:2"] == [WARM, 0, 1]
    by_strategy = {outcome.cell.strategy: outcome for outcome in report.outcomes}
    assert by_strategy["per-layer"].failure.kind == "timeout" and by_strategy["per-layer"].rounds == ()
    assert by_strategy["every:2"].failure.kind == "killed"
    assert by_strategy["off"].failure is None
    assert turns(report) == {"per-layer": [], "every:2": [[0]], "off": [[0, 1, 2]]}
    assert ticker.shown == [
        "begin 3 None",
        *("enter off warming up", "leave off", "enter per-layer warming up", "leave per-layer"),
        *("enter every:2 warming up", "leave every:2"),
        *("enter off round 1", "enter every:2 round 1", "end off every:2"),
        *("enter every:2 round 2", "leave every:2", "enter off round 2", "end off"),
        *("enter off round 3", "end off"),
    ]


def test_the_report_is_saved_after_every_result(tmp_path):
    """The trap: a power cut in the last round, and nothing on disk."""
    seen: list[tuple[int, int]] = []

    def look(call: Call) -> None:
        rounds = [result for outcome in reports.load(tmp_path).outcomes for result in outcome.rounds]
        seen.append((len(rounds), sum(len(result.turns) for result in rounds)))

    go(tmp_path, ScriptedChildren(watch=look))
    assert seen == [*((warm, 0) for warm in range(3)), *((3, taken) for taken in range(9))]


def test_an_interruption_loses_only_the_turn_it_falls_into(tmp_path):
    def interrupt(call: Call) -> None:
        if call == ("per-layer", 1, 1):
            raise KeyboardInterrupt

    interrupted = ScriptedChildren(watch=interrupt)
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, interrupted)
    assert interrupted.running == [] and interrupted.num_closed == 3
    stored = reports.load(tmp_path)
    assert turns(stored) == {"per-layer": [[0]], "off": [[0]], "every:2": [[0, 1]]}

    children = ScriptedChildren()
    report = go(tmp_path, children, previous=stored)
    assert [task.round for task in children.tasks] == [1, 1, 1]
    for old, new in zip(stored.outcomes, report.outcomes, strict=True):
        assert new.rounds[: len(old.rounds)] == old.rounds
    found = {name: set(each) for name, each in numbers(report).items()}
    # Turn 1 of every:2 has no partner, so it takes a third beside one of `off`.
    assert len(found["per-layer"] & found["off"]) == 3 and len(found["every:2"] & found["off"]) == 3, found


def test_a_resumed_run_compares_with_the_gradients_it_has_stored(tmp_path):
    """The trap: `off` is not measured again, so its gradients must be in the folder."""
    stored = go(tmp_path, ScriptedChildren(), replace(SETTINGS, strategies=("off", "per-layer"), rounds=1))
    changed = Answer(result=round_result(1, [0.1], diff=None), fingerprint=gradients(1.5))
    more = replace(SETTINGS, strategies=("off", "per-layer"), rounds=2)
    report = go(tmp_path, ScriptedChildren(fates={("per-layer", 1, WARM): changed}), more, previous=stored)
    assert [r.grad_rel_diff for r in report.outcomes[1].rounds] == [0.0, pytest.approx(0.5)]
    assert report.outcomes[1].rounds[1].grad_worst_param == "w"
    assert [r.grad_rel_diff for r in report.outcomes[0].rounds] == [0.0, 0.0]


def test_without_off_there_is_nothing_to_compare_with(tmp_path):
    report = go(tmp_path, ScriptedChildren(), replace(SETTINGS, strategies=("per-layer",), rounds=1))
    assert report.outcomes[0].rounds[0].grad_rel_diff is None


def test_a_failed_cell_stays_failed_on_resume(tmp_path):
    stored = go(tmp_path, ScriptedChildren(fates={("every:2", 1, WARM): crash("killed")}), replace(SETTINGS, rounds=1))
    children = ScriptedChildren()
    report = go(tmp_path, children, replace(SETTINGS, rounds=2), previous=stored)
    assert children.calls == [
        *(("off", 1, WARM), ("per-layer", 1, WARM)),
        *(("per-layer", 1, 1), ("off", 1, 1)),  # the second turn, so in the opposite order
    ]
    assert report.outcomes[2].failure.kind == "killed"


def test_resuming_what_is_finished_starts_no_child(tmp_path):
    stored = go(tmp_path, ScriptedChildren())
    children = ScriptedChildren()
    assert go(tmp_path, children, previous=stored) == stored
    assert children.calls == [] and children.num_opened == 0


def test_more_rounds_add_to_what_is_there_and_fewer_change_nothing(tmp_path):
    stored = go(tmp_path, ScriptedChildren(), replace(SETTINGS, rounds=2))
    children = ScriptedChildren()
    longer = go(tmp_path, children, replace(SETTINGS, rounds=3), previous=stored)
    assert {turn for _, _, turn in children.calls} == {WARM, 2}
    assert turns(longer) == {strategy: [[0, 1], [2]] for strategy in ORDER}
    fewer = ScriptedChildren()
    shorter = go(tmp_path, fewer, replace(SETTINGS, rounds=1), previous=longer)
    assert shorter.outcomes == longer.outcomes and fewer.num_opened == 0


@pytest.mark.parametrize(
    ("machine", "shown"),
    [
        (replace(MACHINE, device_name="Another CPU"), "A CPU and this is Another CPU"),
        (replace(MACHINE, versions={"torch": "3"}), "the torch of the stored run: that was 2 and this is 3"),
    ],
)
def test_a_run_is_not_continued_on_another_machine(tmp_path, machine, shown):
    stored = go(tmp_path, ScriptedChildren())
    with pytest.raises(UsageError, match=shown):
        go(tmp_path, ScriptedChildren(machine=machine), previous=stored)


def test_a_run_is_not_continued_with_another_model(tmp_path):
    stored = go(tmp_path, ScriptedChildren())
    with pytest.raises(UsageError, match="--resume needs the model of the stored run"):
        go(tmp_path, ScriptedChildren(facts=replace(FACTS, num_params=11)), previous=stored)


def test_a_run_from_before_trainable_parameters_were_counted_is_continued(tmp_path):
    stored = go(tmp_path, ScriptedChildren())
    assert stored.model.num_trainable_params is None
    children = ScriptedChildren(facts=replace(FACTS, num_trainable_params=10))
    assert go(tmp_path, children, previous=stored).outcomes == stored.outcomes


def test_a_run_with_adapters_is_not_continued_with_another_peft(tmp_path):
    before, now = (replace(MACHINE, versions={"torch": "2", "peft": peft}) for peft in ("0.21", "0.22"))
    adapters = replace(SETTINGS, lora_r=8)
    stored = go(tmp_path, ScriptedChildren(machine=before), adapters)
    with pytest.raises(UsageError, match=r"the peft of the stored run: that was 0\.21 and this is 0\.22"):
        go(tmp_path, ScriptedChildren(machine=now), adapters, previous=stored)
    full = go(tmp_path, ScriptedChildren(machine=before))
    assert go(tmp_path, ScriptedChildren(machine=now), previous=full).outcomes == full.outcomes


def test_a_run_is_not_continued_with_other_settings(tmp_path):
    stored = go(tmp_path, ScriptedChildren())
    with pytest.raises(UsageError, match="seed 0 is now 1, steps 2 is now 3"):
        go(tmp_path, ScriptedChildren(), replace(SETTINGS, seed=1, steps=3), previous=stored)


def test_what_a_child_refuses_is_raised_as_if_it_were_here(tmp_path):
    class Refusing(ScriptedChildren):
        def run(self, task, **kwargs):
            return Answer(refusal=Refusal(error="UnavailableError", message="no such device"))

    with pytest.raises(UnavailableError, match="no such device"):
        go(tmp_path, Refusing())
    assert not (tmp_path / "report.json").exists()


def test_a_child_without_any_answer_is_a_crash(tmp_path):
    report = go(tmp_path, ScriptedChildren(fates={("off", 1, WARM): Answer()}))
    assert report.outcomes[1].failure.kind == "crash"
    assert turns(report) == {"per-layer": [[0, 1, 2]], "off": [], "every:2": [[0, 1, 2]]}


def test_a_model_that_cannot_checkpoint_measures_off_alone(tmp_path):
    children = ScriptedChildren(facts=replace(FACTS, checkpointing_refusal="M does not support it"))
    report = go(tmp_path, children)
    assert {strategy for strategy, _, _ in children.calls} == {"off"}
    assert [outcome.failure and outcome.failure.kind for outcome in report.outcomes] == [
        *("unsupported", None, "unsupported")
    ]
    assert report.outcomes[0].failure.message.startswith("M does not support it")
