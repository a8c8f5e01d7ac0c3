"""Races between candidates: which enter, which are eliminated, and how seldom that is the best of them."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from statistics import fmean

import pytest

from gcbench.plan import racing
from gcbench.plan.confirm import settled
from gcbench.plan.decision import Candidate, CandidateDetails, Decision, MemoryLever
from gcbench.plan.racing import MARGIN_FRAC, MOST, MOST_ROUNDS, contenders, state
from gcbench.strategies import Plan


def candidate(tokens_per_s, strategy="per-layer", batch_size=1, *, fits=True):
    return Candidate(
        strategy=strategy,
        plan=Plan(num_layers=4),
        batch_size=batch_size,
        peak_bytes=1,
        allocated_bytes=1,
        peak_phase="backward",
        fits=fits,
        step_time_s=1.0,
        tokens_per_s=tokens_per_s,
    )


# Who enters


def test_the_most_promising_come_first_and_the_hopeless_do_not_enter():
    """The edge: an estimate that is behind by just the margin may still win."""
    edge = 100.0 * (1 - MARGIN_FRAC)
    entered = [candidate(edge, "c"), candidate(100.0, "a"), candidate(99.0, "b"), candidate(edge - 0.01, "d")]
    assert [each.strategy for each in contenders(entered)] == ["a", "b", "c"]
    assert [each.strategy for each in contenders(entered, margin=0.5)] == ["a", "b", "c", "d"]
    assert [each.strategy for each in contenders(entered, margin=0.0)] == ["a"]


def test_what_does_not_fit_neither_enters_nor_sets_the_bar():
    """The trap: the fastest does not fit, and with it as the bar nobody would enter."""
    entered = [candidate(1000.0, "off", fits=False), candidate(100.0, "a"), candidate(95.0, "b")]
    assert [each.strategy for each in contenders(entered)] == ["a", "b"]
    assert contenders([candidate(1000.0, fits=False)]) == contenders([]) == []


def test_of_a_strategy_at_most_two_batches_enter():
    """The trap: five batch sizes of one strategy fill the race, and no other strategy is ever run."""
    entered = [candidate(100.0 - number, "a", number + 1) for number in range(5)] + [candidate(93.0, "b")]
    assert [(each.strategy, each.batch_size) for each in contenders(entered)] == [("a", 1), ("a", 2), ("b", 1)]


def test_no_more_enter_than_there_is_time_for():
    entered = [candidate(100.0 - number / 10, str(number)) for number in range(9)]
    assert [each.strategy for each in contenders(entered)] == [str(number) for number in range(MOST)]
    assert [each.strategy for each in contenders(entered, most=2)] == ["0", "1"]


# Who drops out


def test_a_clear_winner_needs_one_round():
    now = state({"slow": [50.0], "fast": [100.0], "slower": [40.0]})
    assert now.still_in == ("fast",)
    assert now.is_settled


def test_what_is_within_the_noise_stays_in_and_the_leader_comes_first():
    now = state({"a": [97.0], "b": [100.0], "c": [95.0], "d": [80.0]})
    assert now.still_in == ("b", "a", "c")
    assert not now.is_settled


def test_equals_end_as_no_difference_after_the_last_round():
    """The traps: a race without an end, and a winner named by the noise."""
    rates = {"a": [100.0], "b": [100.2]}
    for number in range(1, MOST_ROUNDS + 1):
        now = state(rates)
        assert set(now.still_in) == {"a", "b"}
        assert now.is_settled == (number == MOST_ROUNDS)
        rates = {"a": [*rates["a"], 100.2 - number % 2 * 0.1], "b": [*rates["b"], 100.1]}


def test_many_rounds_eliminate_what_one_round_cannot():
    rates = {"a": [100.0, 100.5, 99.5, 100.0], "b": [96.0, 96.5, 95.5, 96.0]}
    assert state({key: own[:1] for key, own in rates.items()}).still_in == ("a", "b")
    assert state(rates).still_in == ("a",)


@pytest.mark.parametrize("slow_round", range(3))
def test_a_slow_round_common_to_all_changes_nothing(slow_round):
    """The trap: rates over all rounds, in which one round of a busy machine drowns every difference."""
    rates = {"a": [100.0, 101.0, 99.0], "b": [99.0, 100.5, 98.0], "c": [90.0, 91.0, 89.0]}
    slowed = {
        key: [rate / 5 if number == slow_round else rate for number, rate in enumerate(own)]
        for key, own in rates.items()
    }
    assert state(slowed) == state(rates)
    assert state(rates).still_in == ("a", "b")


def test_rounds_of_those_that_dropped_out_earlier_are_compared_with_the_same_rounds():
    """The trap: its one round, a slow one for all, compared with the leader's later and better ones."""
    now = state({"a": [50.0, 100.0, 100.0], "b": [49.0]})
    assert now.still_in == ("a", "b")


def test_one_alone_has_won():
    now = state({"a": [1.0]})
    assert now.still_in == ("a",) and now.is_settled


# Simulated races

RACES = 500


def raced(rng, speeds, *, noise, common=0.5):
    """(who is left, for each look whether the first of `speeds`, the fastest, was lost there).

    Each round all are slowed down together; `noise` is that of the logarithm of one rate.
    """
    rates = {key: [] for key in range(len(speeds))}
    running, lost = list(rates), []
    for _ in range(MOST_ROUNDS):
        together = math.exp(-abs(rng.gauss(0, common)))
        for key in running:
            rates[key].append(speeds[key] * together * math.exp(rng.gauss(0, noise)))
        now = state({key: rates[key] for key in running})
        running = list(now.still_in)
        lost.append(0 not in running)
        if lost[-1] or now.is_settled:
            break
    return running, lost


@pytest.mark.parametrize("noise", [0.005, 0.02, 0.04])
def test_of_twenty_winners_one_is_lost_at_a_look(noise):
    """As `_BOUND` says, of all looks together, for two that can be told apart at all; up to the noise that the first
    rounds are taken to have, 0.06 of a ratio, which is 0.04 of each of two rates.

    The third look, the first whose spread comes from the rounds, may be worse: three tell little of a spread.
    """
    rng = random.Random(0)
    looks = [raced(rng, [102.0, 100.0], noise=noise)[1] for _ in range(RACES)]
    assert sum(map(sum, looks)) <= 0.05 * sum(map(len, looks))
    for number in range(MOST_ROUNDS):
        there = [lost[number] for lost in looks if len(lost) > number]
        assert sum(there) <= 0.08 * len(there), f"look {number + 1}: {sum(there)} of {len(there)}"


@pytest.mark.parametrize(("noise", "dearest"), [(0.005, 0.002), (0.02, 0.006), (0.04, 0.01)])
def test_what_is_lost_with_a_winner_is_little(noise, dearest):
    """Among five close ones the best is lost more often, but to one that is nearly as fast."""
    rng = random.Random(0)
    speeds = [100.0, 99.0, 98.0, 96.0, 92.0]
    regrets = [1 - speeds[raced(rng, speeds, noise=noise)[0][0]] / speeds[0] for _ in range(RACES)]
    assert fmean(regrets) < dearest
    assert sum(regret > 0.05 for regret in regrets) <= 0.01 * RACES


def test_most_races_end_early_where_one_is_clearly_better():
    """What a race is for: a fifth faster is seen at once."""
    rng = random.Random(0)
    looks = [len(raced(rng, [120.0, 100.0, 100.0, 100.0, 100.0], noise=0.02)[1]) for _ in range(RACES)]
    assert fmean(looks) < 1.2


@pytest.mark.parametrize("bound", [0.3, 20.0])
def test_a_wrong_bound_is_noticed(monkeypatch, bound):
    """This file's own alarm: a race that drops too soon loses winners, one that never drops has no end."""
    monkeypatch.setattr(racing, "_BOUND", bound)
    with pytest.raises(AssertionError):
        test_of_twenty_winners_one_is_lost_at_a_look(0.04)
        test_most_races_end_early_where_one_is_clearly_better()


# What is said once it is measured


def decided(*candidates, details=()):
    return Decision(
        limit_bytes=None, usable_bytes=None, reserve_frac=0.0, choice=candidates[0], smallest=None,
        candidates=candidates, largest=(), peak_words="of the first", binding="of the first", details=details,
        levers=(MemoryLever(name="less for the first", flag=None, peak_bytes=1, fits=True),), times_from="estimates",
    )  # fmt: skip


def test_the_details_are_those_of_the_winner():
    """The trap: the details of the candidate that was expected to win."""
    first, second, slow = candidate(1000.0, "first"), candidate(990.0, "second"), candidate(800.0, "off")
    lever = MemoryLever(name="less for the second", flag=None, peak_bytes=1, fits=True)
    told = CandidateDetails(of=second, peak_words="of the second", levers=(lever,))
    decision = decided(first, second, slow, details=(told,))
    ran = {
        each: replace(each, source="measured", tokens_per_s=rate) for each, rate in ((first, 480.0), (second, 500.0))
    }
    found = settled(decision, ran)
    assert found.choice == ran[second]
    assert (found.peak_words, found.levers) == ("of the second", (lever,))
    # What was not run took half of its estimate too, as far as one can say.
    assert [each.tokens_per_s for each in found.candidates] == pytest.approx(
        [500.0, 480.0, 800 * (0.48 + 500 / 990) / 2]
    )
    assert found.binding.startswith("Memory does not limit the speed")
    ran[first] = replace(ran[first], tokens_per_s=510.0)
    kept = settled(decision, ran)
    assert (kept.choice, kept.peak_words, kept.levers) == (ran[first], "of the first", decision.levers)


def test_one_that_failed_changes_no_estimate():
    first, second, third = candidate(1000.0, "first"), candidate(990.0, "second"), candidate(800.0, "off")
    ran = {first: replace(first, fits=False), second: replace(second, source="measured", tokens_per_s=495.0)}
    found = settled(decided(first, second, third), ran)
    assert found.choice == ran[second]
    assert found.candidates[-1].tokens_per_s == pytest.approx(400.0)


def test_where_nothing_that_ran_fits_an_estimate_that_does_is_the_choice():
    """The trap: `nothing fits`, above a table of settings that fit."""
    first, second, small = candidate(1000.0, "first"), candidate(990.0, "second"), candidate(800.0, "per-layer")
    small = replace(small, peak_bytes=first.peak_bytes - 1)
    ran = {each: replace(each, source="measured", fits=False) for each in (first, second)}
    found = settled(decided(first, second, small), ran)
    assert (found.choice, found.smallest, found.levers) == (small, None, ())
    assert "no measured candidate fits" in found.binding
    found = settled(decided(first, second, replace(small, fits=False)), ran)
    assert found.choice is None and found.smallest in ran.values()
