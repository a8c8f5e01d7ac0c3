"""The scheduling of a run, with children that answer from a script: what is measured when, and what is stored."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fixtures_report import round_result
from scripted import FACTS, MACHINE, SETTINGS, Call, ScriptedChildren, Ticker, go, gradients

from gcbench.core.errors import UnavailableError, UsageError
from gcbench.core.records import Failure
from gcbench.processes.messages import Answer, Refusal
from gcbench.report import report_file as reports


def crash(kind: str = "crash") -> Answer:
    return Answer(failure=Failure(kind=kind, message="it fell over"))


def test_rounds_are_interleaved_with_off_first(tmp_path):
    """The traps: all rounds of a cell at once, which a drift of the machine turns into a difference; and a strategy
    measured before the gradients it is compared with."""
    children = ScriptedChildren()
    report = go(tmp_path, children)
    assert children.calls == [(s, 1, r) for r in range(3) for s in ("off", "per-layer", "every:2")]
    assert [outcome.cell.strategy for outcome in report.outcomes] == ["per-layer", "off", "every:2"]
    assert [[r.round for r in outcome.rounds] for outcome in report.outcomes] == [[0, 1, 2]] * 3


def test_every_workload_has_its_off_before_the_others(tmp_path):
    children = ScriptedChildren()
    go(tmp_path, children, replace(SETTINGS, batch_size=(2, 1), rounds=1))
    assert children.calls == [
        *(("off", 2, 0), ("off", 1, 0)),
        *(("per-layer", 2, 0), ("every:2", 2, 0), ("per-layer", 1, 0), ("every:2", 1, 0)),
    ]


def test_memory_is_probed_in_the_first_round_only(tmp_path):
    children = ScriptedChildren()
    go(tmp_path, children)
    assert [task.with_memory for task in children.tasks] == [task.round == 0 for task in children.tasks]


CARD = replace(MACHINE, device="cuda:0", device_name="A card")


def with_process_memory(nbytes: int | None) -> dict[Call, Answer]:
    """The answers of the rounds that probe memory."""
    memory = replace(peaks(1, 2, 3), process_bytes=nbytes)
    answer = Answer(result=round_result(0, [0.1, 0.2], memory=memory, diff=None), fingerprint=gradients(1.0))
    return {(strategy, 1, 0): answer for strategy in SETTINGS.strategies}


def test_unread_process_memory_on_a_card_is_noticed_once(tmp_path):
    """The trap: without nvidia-smi the column is empty without a word, and each continued run adds the word again."""
    first = go(tmp_path, ScriptedChildren(machine=CARD, fates=with_process_memory(None)))
    assert first.notices.count(runner.PROCESS_UNREAD) == 1
    assert reports.load(tmp_path).notices == first.notices
    again = go(tmp_path, ScriptedChildren(machine=CARD), replace(SETTINGS, rounds=4), previous=first)
    assert again.notices == first.notices


def test_process_memory_that_was_read_needs_no_notice(tmp_path):
    report = go(tmp_path, ScriptedChildren(machine=CARD, fates=with_process_memory(5000)))
    assert runner.PROCESS_UNREAD not in report.notices


def test_a_failed_cell_is_not_measured_again(tmp_path):
    """The trap: an hour of timeouts, three times over."""
    children = ScriptedChildren(fates={("per-layer", 1, 0): crash("timeout"), ("every:2", 1, 1): crash("oom")})
    ticker = Ticker()
    report = go(tmp_path, children, progress=ticker)
    assert [call for call in children.calls if call[0] == "per-layer"] == [("per-layer", 1, 0)]
    assert [call for call in children.calls if call[0] == "every:2"] == [("every:2", 1, 0), ("every:2", 1, 1)]
    by_strategy = {outcome.cell.strategy: outcome for outcome in report.outcomes}
    assert by_strategy["per-layer"].failure.kind == "timeout" and by_strategy["per-layer"].rounds == ()
    assert by_strategy["every:2"].failure.kind == "oom" and len(by_strategy["every:2"].rounds) == 1
    assert by_strategy["off"].failure is None and len(by_strategy["off"].rounds) == 3
    assert ticker.shown[0] == "begin 30 3"  # nine rounds of one warm-up and two timed steps, three with a memory step
    assert ticker.shown.count("skip 3") == 3
    assert len([line for line in ticker.shown if line.startswith("leave")]) == len(children.calls)


def test_the_report_is_saved_after_every_result(tmp_path):
    """The trap: a power cut in the last round, and nothing on disk."""
    seen: list[int] = []

    def look(call: Call) -> None:
        seen.append(sum(len(outcome.rounds) for outcome in reports.load(tmp_path).outcomes))

    go(tmp_path, ScriptedChildren(watch=look))
    assert seen == list(range(9))


def test_an_interruption_loses_only_the_round_it_falls_into(tmp_path):
    def interrupt(call: Call) -> None:
        if call == ("per-layer", 1, 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, ScriptedChildren(watch=interrupt))
    stored = reports.load(tmp_path)
    assert [len(outcome.rounds) for outcome in stored.outcomes] == [1, 2, 1]

    children = ScriptedChildren()
    report = go(tmp_path, children, previous=stored)
    assert children.calls == [
        ("per-layer", 1, 1),
        ("every:2", 1, 1),
        *((s, 1, 2) for s in ("off", "per-layer", "every:2")),
    ]
    assert [len(outcome.rounds) for outcome in report.outcomes] == [3, 3, 3]
    for old, new in zip(stored.outcomes, report.outcomes, strict=True):
        assert new.rounds[: len(old.rounds)] == old.rounds


def test_a_resumed_run_compares_with_the_gradients_it_has_stored(tmp_path):
    """The trap: `off` is not measured again, so its gradients must be in the folder."""
    stored = go(tmp_path, ScriptedChildren(), replace(SETTINGS, strategies=("off", "per-layer"), rounds=1))
    changed = Answer(result=round_result(1, [0.1], diff=None), fingerprint=gradients(1.5))
    more = replace(SETTINGS, strategies=("off", "per-layer"), rounds=2)
    report = go(tmp_path, ScriptedChildren(fates={("per-layer", 1, 1): changed}), more, previous=stored)
    assert [r.grad_rel_diff for r in report.outcomes[1].rounds] == [0.0, pytest.approx(0.5)]
    assert report.outcomes[1].rounds[1].grad_worst_param == "w"
    assert [r.grad_rel_diff for r in report.outcomes[0].rounds] == [0.0, 0.0]


def test_without_off_there_is_nothing_to_compare_with(tmp_path):
    report = go(tmp_path, ScriptedChildren(), replace(SETTINGS, strategies=("per-layer",), rounds=1))
    assert report.outcomes[0].rounds[0].grad_rel_diff is None


def test_a_failed_cell_stays_failed_on_resume(tmp_path):
    stored = go(tmp_path, ScriptedChildren(fates={("every:2", 1, 0): crash("killed")}), replace(SETTINGS, rounds=1))
    children = ScriptedChildren()
    report = go(tmp_path, children, replace(SETTINGS, rounds=2), previous=stored)
    assert children.calls == [("off", 1, 1), ("per-layer", 1, 1)]
    assert report.outcomes[2].failure.kind == "killed"


def test_resuming_what_is_finished_starts_no_child(tmp_path):
    stored = go(tmp_path, ScriptedChildren())
    children = ScriptedChildren()
    assert go(tmp_path, children, previous=stored) == stored
    assert children.calls == []


def test_more_rounds_add_to_what_is_there_and_fewer_change_nothing(tmp_path):
    stored = go(tmp_path, ScriptedChildren(), replace(SETTINGS, rounds=2))
    children = ScriptedChildren()
    longer = go(tmp_path, children, replace(SETTINGS, rounds=3), previous=stored)
    assert {round for _, _, round in children.calls} == {2}
    shorter = go(tmp_path, ScriptedChildren(), replace(SETTINGS, rounds=1), previous=longer)
    assert shorter.outcomes == longer.outcomes


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
    report = go(tmp_path, ScriptedChildren(fates={("off", 1, 0): Answer()}))
    assert report.outcomes[1].failure.kind == "crash"
    assert len(report.outcomes[0].rounds) == 3


def test_a_model_that_cannot_checkpoint_measures_off_alone(tmp_path):
    children = ScriptedChildren(facts=replace(FACTS, checkpointing_refusal="M does not support it"))
    report = go(tmp_path, children)
    assert {strategy for strategy, _, _ in children.calls} == {"off"}
    assert [outcome.failure and outcome.failure.kind for outcome in report.outcomes] == [
        *("unsupported", None, "unsupported")
    ]
    assert report.outcomes[0].failure.message.startswith("M does not support it")
