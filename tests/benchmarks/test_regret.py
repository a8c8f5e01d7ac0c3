"""How `benchmarks/regret.py` scores what was measured."""

from __future__ import annotations

import sys

import pytest
from conftest import ROOT


@pytest.fixture
def regret(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.delitem(sys.modules, "regret_scores", raising=False)
    import regret_scores

    return regret_scores


def cell(strategy, batch, seconds, *, peak=1, wall=1.0):
    """A setting with a turn for each processor time of its two steps, of which a tenth is the kernel's."""
    return {
        "strategy": strategy,
        "batch_size": batch,
        "plan": '{"num_layers":2,"groups":[]}',
        "peak_bytes": peak,
        "turns": [{"wall_s": [wall, wall], "user_s": 0.9 * each, "system_s": 0.1 * each} for each in seconds],
    }


def workload(*cells, choice=0, budget=10):
    keys = [f"{each['batch_size']} {each['strategy']} {each['plan']}" for each in cells]
    candidates = [
        {
            "key": key,
            "strategy": each["strategy"],
            "batch_size": each["batch_size"],
            "peak_bytes": 1,
            "tokens_per_s": 1.0,
        }
        for key, each in zip(keys, cells, strict=True)
    ]
    case = {"budget_bytes": budget, "choice": keys[choice], "candidates": candidates, "found": []}
    return {"name": "toy", "seq_len": 8, "cells": dict(zip(keys, cells, strict=True)), "cases": [case]}


def test_settings_are_compared_by_processor_time_and_not_by_wall_time(regret):
    """The trap: another process computed in the turns of the better one."""
    better, worse = cell("off", 1, [1.0] * 4, wall=9.0), cell("every:2", 1, [1.25] * 4, wall=1.0)
    (score,) = regret.scores(workload(better, worse, choice=1))
    assert (score.speed_frac, score.best) == (pytest.approx(0.8), "off at 1")
    (by_wall,) = regret.scores(workload(better, worse, choice=1), "wall time")
    assert by_wall.speed_frac == 1.0


def test_a_disturbed_turn_does_not_count(regret):
    """It can only be slower: of four turns the faster two say how fast a setting is."""
    steady, disturbed = cell("off", 1, [1.01] * 4), cell("every:2", 1, [1.0, 1.0, 1.9, 1.6])
    (score,) = regret.scores(workload(steady, disturbed))
    assert score.best == "every:2 at 1" and score.speed_frac == pytest.approx(1 / 1.01)
    assert regret.typical([3.0, 1.0, 2.0]) == 2.5


def test_a_larger_batch_has_more_tokens(regret):
    one, two = cell("off", 1, [1.0] * 4), cell("off", 2, [1.6] * 4)
    (score,) = regret.scores(workload(one, two))
    assert score.best == "off at 2" and score.speed_frac == pytest.approx(0.8)


def test_a_race_warms_up_and_reads_memory_once_for_each_setting(regret):
    """As in `plan --measure`, whose processes stay: a winner seen in one turn costs two steps more than that turn."""
    (score,) = regret.scores(workload(cell("off", 1, [1.0] * 4), cell("every:2", 1, [2.0] * 4)))
    assert (score.raced, score.raced_frac) == ("off at 1", 1.0)
    assert score.raced_steps == 2 * (2 + 2)
    assert score.grid_steps == 2 * (2 + 4 * 2)


def test_a_grid_from_before_there_were_turns_is_scored_by_wall_time(regret):
    old = [{**cell(name, 1, []), "rounds": [[took, 2.0]] * 4} for name, took in (("off", 1.0), ("every:2", 1.25))]
    (score,) = regret.scores(workload(*old, choice=1))
    assert score.speed_frac == pytest.approx(0.8)
