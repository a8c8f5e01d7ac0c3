"""How long cells go on taking turns: until overheads are known, or the time is up. With times that a test chooses."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import SimpleNamespace

import pytest
from fixtures_report import round_result, workload
from scripted import SETTINGS, WARM, Clock, Room, ScriptedChildren, Ticker, go, numbers

from gcbench.core.records import Cell, Failure, Outcome, Turn
from gcbench.measure.goal import Goal
from gcbench.report import stats

OFF, A, B, C = (Cell(workload=workload(), strategy=name) for name in ("off", "per-layer", "every:2", "every:4"))
StepS = Callable[[Cell, int], float]


class Race:
    """Cells that take the turns that a goal has them take; each turn is one step of `step_s` seconds."""

    def __init__(self, step_s: StepS, cells: Sequence[Cell], **limits: object) -> None:
        self.clock, self.step_s = Clock(), step_s
        self.outcomes = {cell: Outcome(cell=cell, layers_checkpointed=0) for cell in cells}
        self.goal = Goal(
            recorder=SimpleNamespace(outcome=self.outcomes.__getitem__),
            num_cells=len(cells),
            clock=self.clock,
            **{"rounds": None, "target_frac": 0.05, "deadline_s": None, **limits},
        )
        self.rounds: list[tuple[Cell, ...]] = []
        self.next_number = 0
        self.last_s: dict[Cell, float] = {}
        self.expected_end_s: list[float] = []

    def run(self, cells: Sequence[Cell], *, at_most: int = 400) -> None:
        """Have these cells, which live side by side, take turns until they have to do no more."""
        took_s = self.last_s
        for _ in range(at_most):
            chosen = self.goal.choose(cells, took_s)
            if not chosen:
                return
            self.rounds.append(tuple(chosen))
            self.expected_end_s.append(self.clock.now + sum(took_s.get(cell, 0.0) for cell in chosen))
            for cell in chosen:
                took_s[cell] = self.take(cell, self.next_number)
            self.next_number += 1
        raise AssertionError("it has no end")

    def take(self, cell: Cell, number: int) -> float:
        seconds = self.step_s(cell, number)
        self.clock.now += seconds
        self.give(cell, Turn(number=number, step_times_s=(seconds,), user_s=seconds, system_s=0.0))
        return seconds

    def give(self, cell: Cell, turn: Turn) -> None:
        (result,) = self.outcomes[cell].rounds or (round_result(0),)
        self.outcomes[cell] = replace(
            self.outcomes[cell], rounds=(replace(result, turns=(*result.turns, turn), step_times_s=()),)
        )

    def num_turns(self, cell: Cell) -> int:
        return sum(cell in chosen for chosen in self.rounds)

    def half_width(self, cell: Cell) -> float:
        found = stats.overhead(self.outcomes[cell].rounds, self.outcomes[OFF].rounds)
        assert found.interval is not None
        return (found.interval[1] - found.interval[0]) / 2


def steady(cell: Cell, number: int) -> float:
    return 1.0


def noisy(seed: int, *, of: Sequence[Cell] = (OFF, A, B, C), spread: float = 0.2) -> StepS:
    draw = random.Random(seed)
    return lambda cell, number: 1.0 * draw.uniform(1 - spread, 1 + spread) if cell in of else 1.0


# The target


def test_cells_without_noise_take_four_turns():
    """The trap: three equal ones by chance, and an interval without width."""
    race = Race(steady, [OFF, A, B])
    race.run([OFF, A, B])
    assert race.rounds == [(OFF, A, B)] * 4


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("target", [0.03, 0.05, 0.2])
def test_it_ends_at_the_first_round_after_which_every_interval_is_narrow(seed, target):
    race = Race(noisy(seed, spread=0.1), [OFF, A, B], target_frac=target)
    race.run([OFF, A, B])
    assert race.half_width(A) <= target and race.half_width(B) <= target
    last = max(len(race.outcomes[cell].rounds[0].turns) for cell in (A, B))
    assert last == len(race.rounds) >= 4
    # One pair fewer was not enough: otherwise that last round was wasted.
    for cell in (A, B):
        pairs = race.outcomes[cell].rounds[0].turns
        if len(pairs) > 4:
            before = stats.overhead(
                (replace(race.outcomes[cell].rounds[0], turns=pairs[:-1]),), race.outcomes[OFF].rounds
            )
            assert (before.interval[1] - before.interval[0]) / 2 > target


def test_a_cell_that_is_known_drops_out_and_off_goes_on():
    """The trap: turns of the noisy cell without a turn of `off` beside them."""
    race = Race(noisy(1, of=(B,), spread=0.1), [OFF, A, B])
    race.run([OFF, A, B])
    assert race.num_turns(A) == 4 < race.num_turns(B)
    assert all(OFF in chosen for chosen in race.rounds)
    assert race.half_width(B) <= 0.05


def test_the_target_is_of_offs_time():
    """A cell that takes twice as long scatters by twice as much of the time of `off`, and needs more turns."""
    draw = [1 + 0.02 * (-1) ** number for number in range(400)]
    once = Race(lambda cell, number: 1.0 if cell == OFF else draw[number], [OFF, A], target_frac=0.03)
    thrice = Race(lambda cell, number: 1.0 if cell == OFF else 3 * draw[number], [OFF, A], target_frac=0.03)
    once.run([OFF, A])
    with pytest.raises(AssertionError, match="it has no end"):
        thrice.run([OFF, A], at_most=30)
    assert len(once.rounds) < 30


def test_without_off_the_step_time_itself_is_known_as_well():
    race = Race(noisy(0, spread=0.1), [A, B], target_frac=0.05)
    race.run([A, B])
    for cell in (A, B):
        step = stats.step_time(race.outcomes[cell].rounds)
        assert (step.high - step.low) / 2 / step.centre <= 0.05
    assert max(map(race.num_turns, (A, B))) > 3


def test_off_alone_is_known_by_its_step_time():
    race = Race(noisy(0, spread=0.1), [OFF], target_frac=0.05)
    race.run([OFF])
    step = stats.step_time(race.outcomes[OFF].rounds)
    assert (step.high - step.low) / 2 / step.centre <= 0.05


def test_where_off_has_failed_the_others_are_known_by_their_step_times():
    """The trap: turns without end for an overhead that has nothing to be a ratio of."""
    race = Race(steady, [OFF, A])
    race.take(OFF, 0)
    race.outcomes[OFF] = replace(race.outcomes[OFF], failure=Failure(kind="crash", message="it fell over"))
    race.run([A])
    assert 3 <= race.num_turns(A) < 10


def test_turns_that_cannot_be_used_are_taken_again():
    """The trap: a machine that was suspended in a turn, which counts as one of the pairs."""
    race = Race(steady, [OFF, A])
    spoilt = replace(Turn(number=0, step_times_s=(900.0,), user_s=1.0), conditions=suspended())
    race.give(A, spoilt)
    race.give(OFF, Turn(number=0, step_times_s=(1.0,), user_s=1.0))
    race.next_number = 1
    race.run([OFF, A])
    assert race.num_turns(A) == 4


def suspended():
    from gcbench.core.records import Conditions

    return Conditions(suspended_s=899.0)


# The time


@pytest.mark.parametrize("deadline", [0.0, 1.0, 5.9, 6.0, 7.9])
def test_every_cell_has_three_turns_whatever_the_time(deadline):
    """Fewer give no interval. Two cells, a second each: three rounds take six seconds, and four take eight."""
    race = Race(steady, [OFF, A], target_frac=None, deadline_s=deadline)
    race.run([OFF, A])
    assert len(race.rounds) == 3


@pytest.mark.parametrize(("deadline", "num_rounds"), [(8.0, 4), (9.9, 4), (10.0, 5), (21.0, 10)])
def test_a_round_begins_only_where_it_can_end_in_time(deadline, num_rounds):
    race = Race(steady, [OFF, A], target_frac=None, deadline_s=deadline)
    race.run([OFF, A])
    assert len(race.rounds) == num_rounds
    assert race.clock.now <= deadline


def test_the_next_round_is_expected_to_take_as_long_as_those_that_take_part():
    """The trap: the time of a slow cell that is known, and so takes no part."""
    race = Race(
        lambda cell, number: 10.0 if cell == B else 1.0 + 0.1 * (cell == A) * (number % 2), [OFF, A, B], deadline_s=60
    )
    race.run([OFF, A, B])
    assert race.num_turns(B) == 4
    assert race.num_turns(A) > 8
    assert race.clock.now <= 60


def test_groups_share_the_time():
    """The trap: the first group takes it all, and the others have three turns each."""
    race = Race(steady, [OFF, A, B, C], target_frac=None, deadline_s=300.0)
    for cell in (A, B, C):
        before = race.clock.now
        race.run([OFF, cell])
        assert race.clock.now - before == pytest.approx(100.0, abs=2.0)
    assert race.clock.now <= 300.0


def test_time_that_a_group_leaves_is_for_the_next():
    race = Race(steady, [OFF, A, B, C], deadline_s=300.0)
    race.run([OFF, A, B])  # four rounds without noise
    assert race.clock.now == 12.0
    race.goal.target_frac = None
    race.run([OFF, C])
    assert race.clock.now == 300.0


def test_a_group_that_loses_a_cell_keeps_its_time():
    race = Race(steady, [OFF, A, B, C], target_frac=None, deadline_s=300.0)
    for _ in range(3):
        assert race.goal.choose([OFF, A, B], {}) == [OFF, A, B]
        for cell in (OFF, A, B):
            race.take(cell, race.next_number)
        race.next_number += 1
    race.run([OFF, A])
    assert race.clock.now == pytest.approx(200.0, abs=2.0)


@pytest.mark.parametrize("deadline", [None, 0.0, 5.0])
@pytest.mark.parametrize("rounds", [1, 2, 7])
def test_a_number_of_rounds_ignores_time_and_intervals(rounds, deadline):
    race = Race(noisy(0), [OFF, A, B], rounds=rounds, deadline_s=deadline)
    race.run([OFF, A, B])
    assert race.rounds == [(OFF, A, B)] * rounds


def test_a_number_of_rounds_is_of_turns_beside_off():
    """The trap: a group after the first, or a resumed run, where `off` has its number of turns and takes no more."""
    race = Race(steady, [OFF, A, B], rounds=3)
    race.run([OFF, A])
    race.run([OFF, B])
    assert race.rounds == [(OFF, A)] * 3 + [(OFF, B)] * 3
    assert stats.overhead(race.outcomes[B].rounds, race.outcomes[OFF].rounds).num_units == 3


@pytest.mark.parametrize("seed", range(60))
def test_whatever_the_times_it_ends_for_a_reason(seed):
    """Random times, spreads, targets, deadlines and groups; the reason is the target, or time that would be over."""
    draw = random.Random(seed)
    cells = [OFF, A, B, C][: draw.randint(1, 4)] if draw.random() < 0.8 else [A, B, C]
    centre = {cell: draw.uniform(0.1, 5.0) for cell in cells}
    spread = draw.choice([0.0, 0.01, 0.1, 0.5])
    target, deadline = draw.choice([0.01, 0.05, 0.3]), draw.choice([0.0, 20.0, 100.0])
    race = Race(
        lambda cell, number: centre[cell] * draw.lognormvariate(0, spread),
        cells,
        target_frac=target,
        deadline_s=deadline,
    )
    others = [cell for cell in cells if cell != OFF]
    size = draw.randint(1, 3)
    groups = [others[start : start + size] for start in range(0, len(others), size)] or [[]]
    num_left = len(others) if OFF in cells else len(others) - 1  # one of the cells has no share of its own
    for group in groups:
        alive = [*([OFF] if OFF in cells else []), *group]
        share = min((len(group) or 1) / max(num_left, len(group) or 1), 1.0)
        due_s = race.clock.now + (deadline - race.clock.now) * share
        num_left -= len(group)
        begun = len(race.rounds)
        race.run(alive)
        taken = race.rounds[begun:]
        assert all(OFF in chosen for chosen in taken if OFF in alive)
        assert all(sum(cell in chosen for chosen in taken) >= 3 for cell in group)
        assert all(due <= due_s for due in race.expected_end_s[begun + 3 :])
        for cell in group:  # none drops out and comes back
            assert [key for key, _ in itertools.groupby(cell in chosen for chosen in taken)] in ([True], [True, False])
        wanted = race.goal.wanted(alive)
        if wanted:  # another round would have ended too late, or the last was one that every cell has
            next_s = sum(race.last_s[cell] for cell in alive if cell in wanted or cell == OFF)
            assert race.clock.now + next_s > due_s


# From the settings


ADAPTIVE = replace(SETTINGS, rounds=None, target_interval=5.0, max_time=100.0)


def test_a_run_stops_when_its_intervals_are_narrow(tmp_path):
    ticker = Ticker()
    children = ScriptedChildren()
    report = go(tmp_path, children, ADAPTIVE, progress=ticker)
    assert ticker.shown[0] == "begin None 100.0"
    assert set(map(len, numbers(report).values())) == {4}
    assert report.settings["target_interval"] == 5.0 and report.settings["max_time"] == 100.0
    again = ScriptedChildren()
    assert go(tmp_path, again, ADAPTIVE, previous=report) == report
    assert again.num_opened == 0


def uneven(call):
    """Steps of per-layer that alternate, by a tenth."""
    return 1.0 + 0.1 * (call[0] == "per-layer" and call[2] != WARM and call[2] % 2 == 0)


def test_a_run_stops_in_its_time_and_a_resumed_one_has_the_time_again(tmp_path):
    """What warms up counts: three cells of two seconds, then rounds of six seconds or so."""
    settings = replace(ADAPTIVE, target_interval=0.1, max_time=40.0)
    children = ScriptedChildren(step_s=uneven)
    report = go(tmp_path, children, settings)
    assert children.clock.now <= 40.0
    first = {name: len(each) for name, each in numbers(report).items()}
    assert first["every:2"] == 4 < first["per-layer"] == first["off"] < 16
    again = ScriptedChildren(step_s=uneven)
    more = go(tmp_path, again, settings, previous=report)
    assert [task.cell.strategy for task in again.tasks] == ["off", "per-layer"]
    assert again.clock.now <= 40.0
    assert len(numbers(more)["per-layer"]) > first["per-layer"]
    assert numbers(more)["every:2"] == numbers(report)["every:2"]


def test_every_workload_has_its_own_time(tmp_path):
    """The trap: the second batch size gets three turns, as the first has used up the time."""
    settings = replace(ADAPTIVE, batch_size=(1, 2), target_interval=0.1, max_time=40.0)
    children = ScriptedChildren(step_s=uneven)
    report = go(tmp_path, children, settings)
    counts = {
        outcome.cell.workload.batch_size: sum(len(each.turns) for each in outcome.rounds)
        for outcome in report.outcomes
        if outcome.cell.strategy == "per-layer"
    }
    assert counts[1] == counts[2] > 4


def test_in_rounds_the_time_holds_too(tmp_path):
    settings = replace(ADAPTIVE, target_interval=0.1, max_time=60.0)
    children = ScriptedChildren(step_s=uneven, room=Room(bytes=150))
    report = go(tmp_path, children, settings)
    assert children.most_running == 1 and children.clock.now <= 60.0
    assert len(numbers(report)["per-layer"]) > 4


def test_without_a_target_all_of_the_time_is_used(tmp_path):
    children = ScriptedChildren()
    report = go(tmp_path, children, replace(ADAPTIVE, target_interval=None, max_time=10.0))
    assert 9.0 < children.clock.now <= 10.0
    assert len(set(map(len, numbers(report).values()))) == 1


def test_without_a_limit_the_target_alone_ends_it(tmp_path):
    draw = random.Random(0)
    children = ScriptedChildren(step_s=lambda call: draw.uniform(0.9, 1.1))
    ticker = Ticker()
    report = go(tmp_path, children, replace(ADAPTIVE, max_time=None), progress=ticker)
    assert ticker.shown[0] == "begin None None"
    off = next(each for each in report.outcomes if each.cell.strategy == "off").rounds
    for outcome in report.outcomes:
        found = stats.overhead(outcome.rounds, off)
        assert outcome.cell.strategy == "off" or (found.high - found.low) / 2 <= 0.05
