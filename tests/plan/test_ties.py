"""Candidates whose speeds are indistinguishable: the simplest is chosen, and the answer names the others."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
from fixtures_report import outcome, peaks, report, workload

from gcbench.core.records import RoundResult, Turn
from gcbench.core.units import GIB
from gcbench.devices.target import TargetOptions
from gcbench.plan import confirm, ties
from gcbench.plan.decision import Candidate
from gcbench.plan.from_run import decide
from gcbench.plan.planned import PlanOptions
from gcbench.strategies import parse


def candidate(strategy, rate, *, batch=4, fits=True):
    return Candidate(
        strategy=strategy, plan=parse(strategy).plan_for(4), batch_size=batch, peak_bytes=1, allocated_bytes=1,
        peak_phase=None, fits=fits, step_time_s=batch / rate, tokens_per_s=rate, source="measured",
    )  # fmt: skip


def rounds(each, rates):
    """A round for each rate, of three steps."""
    return [
        RoundResult(
            round=number, memory=None, step_times_s=(each.batch_size / rate,) * 3, layers_run=4, layers_planned=0,
            layers_recomputed=0, params_without_grad=0, grad_checksum="", grad_rel_diff=0.0, grad_worst_param=None,
            num_alloc_retries=None, num_steps=3, steps_s=1.0, wall_s=1.0,
        )
        for number, rate in enumerate(rates)
    ]  # fmt: skip


def measured(**rates):
    """`measured(off=[…], every_2=[…])`: candidates, and their rounds."""
    named = {name.replace("_", ":"): values for name, values in rates.items()}
    found = {candidate(name, sorted(values)[len(values) // 2]): values for name, values in named.items()}
    return list(found), {each: rounds(each, values) for each, values in found.items()}


def test_what_is_significantly_faster_is_chosen():
    candidates, ran = measured(off=[50.0, 51.0, 50.5, 50.2], every_2=[100.0, 101.0, 100.5, 100.4])
    choice, others, shown = ties.decided(candidates, ran)
    assert choice.strategy == "every:2" and others == []
    off = shown[0]
    assert 0.49 < off.frac_low < 0.51 < 1 and off.frac_high < 0.52


def test_noise_does_not_count_as_speed():
    """The trap: every:2 does all that off does and more, and two rounds had it 42 % faster."""
    candidates, ran = measured(off=[300.0, 100.0, 250.0], every_2=[200.0, 310.0, 150.0])
    choice, others, _ = ties.decided(candidates, ran)
    assert choice.strategy == "off"
    said = ties.sentence(choice, others)
    assert said.startswith("off at batch 4 is as fast within the noise as every:2 at batch 4 (")
    assert said.endswith(" %), and is the simpler one.")


@pytest.mark.parametrize("num_rounds", [1, 2])
def test_too_few_rounds_show_nothing(num_rounds):
    """The trap: an interval from two rounds, which no one can use."""
    candidates, ran = measured(off=[100.0] * num_rounds, every_2=[150.0] * num_rounds)
    ran = {each: [replace(one, step_times_s=one.step_times_s[:1]) for one in own] for each, own in ran.items()}
    choice, others, _ = ties.decided(candidates, ran)
    assert choice.strategy == "off"
    assert "(+50 %, no interval)" in ties.sentence(choice, others)


def test_of_equals_off_comes_first_then_what_every_trainer_has_then_fewer_layers():
    order = ["off", "per-layer", "every:4", "every:2", "first:2", "segment:2", "selective:matmul"]
    equals = [candidate(name, 100.0 + place) for place, name in enumerate(order)]
    assert sorted(equals, key=lambda each: (*each.rank[:2], -each.tokens_per_s)) == equals
    large = candidate("off", 101.0, batch=16)
    assert ties.simplest([candidate("off", 100.0, batch=1), large]) == large, "a smaller batch is not simpler"


def test_one_that_does_not_fit_is_not_chosen_and_without_any_there_is_no_choice():
    candidates, ran = measured(off=[100.0] * 3, every_2=[100.0] * 3)
    out = replace(candidates[0], fits=False)
    ran[out] = ran[candidates[0]]
    assert ties.decided([out, candidates[1]], ran)[0].strategy == "every:2"
    assert ties.decided([out], ran)[0] is None


def test_a_stored_run_decides_so():
    """A run as it is stored, end to end: the interval stands beside each, and the sentence in the answer."""
    cells = [
        outcome(
            name,
            peaks(1, 2, 1),
            work=workload(),
            times=((1.0, 1.0), (2.0, 2.0), (1.5, 1.4)) if name == "off" else faster,
        )
        for name, faster in (("off", ()), ("every:2", ((1.6, 1.5), (1.2, 1.3), (1.4, 1.4))))
    ]
    asked = PlanOptions(batch_sizes=None, reserve_frac=None, emit=None, measure=False)
    wanted = SimpleNamespace(seq_len=None, strategies=None)
    planned = decide(report(*cells), "run", wanted, TargetOptions(device_memory=100 * GIB), asked, command="")
    assert planned.decision.choice.strategy == "off"
    assert (
        "off at batch" in planned.decision.binding and "as fast within the noise as every:2" in planned.decision.binding
    )


# On a card without nvidia-smi


def test_without_process_memory_the_reserved_memory_is_used():
    """The trap: peak_process_bytes is None, and every measured candidate is discarded."""
    decision = SimpleNamespace(outside_bytes=700)
    row = SimpleNamespace(peak_process_bytes=None, peak_reserved_bytes=5000)
    assert confirm._process_bytes(row, decision) == 5700
    told = SimpleNamespace(peak_process_bytes=6000, peak_reserved_bytes=5000)
    assert confirm._process_bytes(told, decision) == 6000
    nothing = SimpleNamespace(peak_process_bytes=None, peak_reserved_bytes=None)
    assert confirm._process_bytes(nothing, decision) is None


# By processor time


def turned(each, seconds):
    """A process with a turn for each (wall, processor) seconds of a step."""
    (one,) = rounds(each, [1.0])
    turns = tuple(
        Turn(number=number, step_times_s=(wall, wall), user_s=2 * processor, system_s=0.0)
        for number, (wall, processor) in enumerate(seconds)
    )
    return [replace(one, step_times_s=tuple(step for turn in turns for step in turn.step_times_s), turns=turns)]


def test_on_a_busy_processor_the_choice_is_the_one_that_computes_least():
    """The trap: wall time, by which the slower one wins, since another process computed in the other's turns."""
    off, every = candidate("off", 2.0), candidate("every:2", 4.0)
    ran = {
        off: turned(off, [(2.0, 1.00), (2.1, 1.01), (2.0, 1.00), (1.9, 0.99)]),
        every: turned(every, [(1.0, 1.30), (1.2, 1.31), (1.1, 1.30), (1.0, 1.29)]),
    }
    choice, others, shown = ties.decided([off, every], ran)
    assert choice == off and others == []
    assert shown[0] == off, "its speed is wall time"
    assert shown[1].tokens_per_s == pytest.approx(2.0 / 1.3)
    assert shown[1].step_time_s == pytest.approx(4 * 1.3 / 2.0)
    assert shown[1].frac_low <= 1 / 1.3 <= shown[1].frac_high
    assert ties.basis(choice, [off, every], ran) == (ties.BY_PROCESSOR,)


def test_without_processor_times_the_choice_rests_on_wall_time():
    """As on a GPU."""
    candidates, ran = measured(off=[50.0, 51.0, 50.5, 50.2], every_2=[100.0, 101.0, 100.5, 100.4])
    choice, _, shown = ties.decided(candidates, ran)
    assert ties.basis(choice, candidates, ran) == ()
    assert [each.tokens_per_s for each in shown] == [each.tokens_per_s for each in candidates]


def test_of_one_strategy_the_batch_that_computes_least_for_a_token_is_simplest():
    small, large = candidate("off", 8.0, batch=4), candidate("off", 5.0, batch=8)
    ran = {small: turned(small, [(0.5, 1.0)] * 3), large: turned(large, [(1.6, 1.8)] * 3)}
    assert ties.simplest([small, large], ran) == ties.fastest([small, large], ran) == large
    assert ties.simplest([small, large]) == small


@pytest.mark.parametrize(
    ("processor", "expected"), [(True, {"off": 4.0, "every:2": 3.0}), (False, {"off": 2.0, "every:2": 4.0})]
)
def test_a_race_is_run_by_processor_time_where_every_turn_has_it(processor, expected):
    cells = [
        outcome(name, peaks(1, 2, 1), work=replace(workload(), batch_size=4), times=()) for name in ("off", "every:2")
    ]
    times = {"off": (2.0, 1.0), "every:2": (1.0, 4 / 3 if processor else 0.0)}
    ran = [replace(each, rounds=tuple(turned(candidate("off", 1.0), [times[each.cell.strategy]]))) for each in cells]
    rates = confirm._rates([*ran, replace(cells[0], rounds=())])
    assert {cell.strategy: own for cell, own in rates.items()} == {
        name: [pytest.approx(rate)] for name, rate in expected.items()
    }
