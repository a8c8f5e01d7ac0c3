"""Scores what `regret.py` measured: the speed of each choice, and of the winner of a race, over the best that fits."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from gcbench.plan import racing
from gcbench.plan.decision import Candidate
from gcbench.strategies.plan_file import of_json

ROUNDS, TIMED = 4, 2
ONCE = 2
"""Steps of a process of `plan --measure` before its turns: one that warms up, and one that reads memory."""
CLOCKS: dict[str, Callable[[dict[str, Any]], float]] = {
    "user time": lambda turn: turn["user_s"],
    "user and system time": lambda turn: turn["user_s"] + turn["system_s"],
    "wall time": lambda turn: TIMED * min(turn["wall_s"]),
}
"""Seconds of a turn's steps; settings are compared by the first."""
USER = "user time"


def rates(cell: dict[str, Any], seq_len: int, clock: str = USER) -> list[float]:
    """Tokens of a setting per second of the clock, round by round."""
    if "rounds" in cell:  # stored before there were turns: seconds of wall time
        return [cell["batch_size"] * seq_len / min(times) for times in cell["rounds"]]
    return [cell["batch_size"] * seq_len * TIMED / CLOCKS[clock](turn) for turn in cell["turns"]]


def typical(speeds: Sequence[float]) -> float:
    """The median of the faster half.

    What disturbs a turn only makes it slower, even by processor time: another virtual machine on the same core, another
    process that takes the caches and the memory's bandwidth.
    """
    return statistics.median(sorted(speeds, reverse=True)[: (len(speeds) + 1) // 2])


@dataclass(frozen=True, kw_only=True)
class Score:
    """One budget: relative speeds are over the best measured setting that fits."""

    workload: str
    budget_bytes: int
    choice: str
    speed_frac: float
    fair_frac: float
    """The same with the best picked by one half of the rounds and judged by the other, so that luck does not win."""
    fits: bool
    best: str
    raced: str
    raced_frac: float
    raced_steps: int
    grid_steps: int


def scores(workload: dict[str, Any], clock: str = USER) -> list[Score]:
    """Every budget of one workload."""
    seq_len, cells = workload["seq_len"], workload["cells"]
    speed = {key: rates(cell, seq_len, clock) for key, cell in cells.items()}
    usual = {key: typical(each) for key, each in speed.items()}
    # Each setting warms up and has its memory read once; more rounds are for telling settings apart, not for choosing.
    num_steps = len(cells) * (ONCE + ROUNDS * TIMED)
    # A race goes by the clock of `plan --measure`, whatever its winner is judged by.
    race_speed = {key: rates(cell, seq_len) for key, cell in cells.items()}
    found = []
    for case in workload["cases"]:
        fitting = [key for key, cell in cells.items() if cell["peak_bytes"] <= case["budget_bytes"]]
        best = max(fitting, key=lambda key: usual[key])
        choice = case["choice"]
        winner, used = race(case, race_speed)
        found.append(
            Score(
                workload=workload["name"],
                budget_bytes=case["budget_bytes"],
                choice=_name(choice),
                speed_frac=usual[choice] / usual[best],
                fair_frac=_fair(choice, fitting, speed),
                fits=choice in fitting,
                best=_name(best),
                raced=_name(winner),
                raced_frac=usual[winner] / usual[best] if winner in fitting else 0.0,
                raced_steps=used,
                grid_steps=num_steps,
            )
        )
    return found


def _name(key: str) -> str:
    batch, strategy, _ = key.split(" ", 2)
    return f"{strategy} at {batch}"


def _fair(choice: str, fitting: list[str], speed: dict[str, list[float]]) -> float:
    ratios = []
    for parity in (0, 1):
        seen = {key: typical(speed[key][parity::2]) for key in fitting}
        judged = {key: typical(each[1 - parity :: 2]) for key, each in speed.items()}
        ratios.append(judged[choice] / judged[max(fitting, key=seen.__getitem__)])
    return statistics.fmean(ratios)


def race(case: dict[str, Any], speed: dict[str, list[float]]) -> tuple[str, int]:
    """Who wins `--measure`, run on the stored rounds, and the training steps that this takes."""
    plan = of_json({"num_layers": 1, "groups": []})
    keys: dict[Candidate, str] = {}
    for each in case["candidates"]:
        candidate = Candidate(
            strategy=each["strategy"], plan=plan, batch_size=each["batch_size"], peak_bytes=each["peak_bytes"],
            allocated_bytes=each["peak_bytes"], peak_phase=None, fits=True, step_time_s=1.0,
            tokens_per_s=each["tokens_per_s"],
        )  # fmt: skip
        if each["key"] in speed:
            keys[candidate] = each["key"]
    running = [keys[candidate] for candidate in racing.contenders(list(keys))]
    used, seen = 0, {key: [] for key in running}
    for number in range(min(racing.MOST_ROUNDS, ROUNDS)):
        for key in running:
            seen[key].append(speed[key][number])
            used += TIMED + (ONCE if number == 0 else 0)
        now = racing.state({key: seen[key] for key in running})
        running = list(now.still_in)
        if now.is_settled:
            break
    return running[0], used


def same_work(workload: dict[str, Any]) -> list[float]:
    """Measured speeds of settings that do the same work, the slower over the faster, pair by pair: 1 but for noise.

    As many layers recomputed plainly at one batch size: which ones they are makes no difference, as they are alike.
    """
    alike: dict[tuple[int, int], list[float]] = {}
    for cell in workload["cells"].values():
        plan = of_json(json.loads(cell["plan"]))
        if plan.groups and not plan.policies and all(len(group) == 1 for group in plan.groups):
            usual = typical(rates(cell, workload["seq_len"]))
            alike.setdefault((cell["batch_size"], len(plan.groups)), []).append(usual)
    return [min(pair) / max(pair) for each in alike.values() for pair in combinations(each, 2)]


def report(path: Path) -> None:
    stored = json.loads(path.read_text(encoding="utf-8"))
    table = [score for workload in stored["workloads"].values() for score in scores(workload)]
    for score in table:
        mark = "" if score.fits else "  DOES NOT FIT"
        print(
            f"{score.workload:28} {score.budget_bytes / 2**20:7.0f} MiB  {score.choice:26} {score.speed_frac:6.3f} "
            f"(fair {score.fair_frac:.3f})  best {score.best:26} raced {score.raced_frac:.3f}{mark}"
        )
    for clock in list(CLOCKS)[1:]:
        workloads = stored["workloads"].values()
        seen = sorted(score.speed_frac for workload in workloads for score in scores(workload, clock))
        print(f"by {clock}: median {statistics.median(seen):.3f}, worst {seen[0]:.3f}")
    fractions = sorted(score.speed_frac for score in table)
    fair = sorted(score.fair_frac for score in table)
    raced = [1 - score.raced_frac for score in table]
    steps = sum(score.raced_steps for score in table) / sum(score.grid_steps for score in table)
    most = max(score.raced_steps / score.grid_steps for score in table)
    lowest = fractions[len(fractions) // 20]
    held = sum(fraction >= 0.95 for fraction in fractions) / len(fractions)

    def verdict(good: bool) -> str:
        return "PASS" if good else "MISS"

    print(f"\n{len(table)} cases on {stored['machine']}")
    print(f"speed of the choice, over the best measured: median {statistics.median(fractions):.3f} (bar 0.98: "
          f"{verdict(statistics.median(fractions) >= 0.98)}), 5th percentile {lowest:.3f}, at least 0.95 in "
          f"{held:.0%} (bar 96 %: {verdict(held >= 0.96)}), worst {fractions[0]:.3f} (bar 0.95: "
          f"{verdict(fractions[0] >= 0.95)})")  # fmt: skip
    pairs = [ratio for workload in stored["workloads"].values() for ratio in same_work(workload)]
    print(f"noise: of two settings that do the same work the slower has at least 0.95 of the faster's speed in "
          f"{sum(ratio >= 0.95 for ratio in pairs) / len(pairs):.0%} of {len(pairs)} pairs")  # fmt: skip
    print(f"the choice with luck taken out: median {statistics.median(fair):.3f}, 5th percentile "
          f"{fair[len(fair) // 20]:.3f}")  # fmt: skip
    print(f"the choice fits in {sum(score.fits for score in table)} of {len(table)} "
          f"({verdict(all(score.fits for score in table))})")  # fmt: skip
    print(f"with --measure: median regret {statistics.median(raced):.2%} (bar 1 %: "
          f"{verdict(statistics.median(raced) <= 0.01)}) with {steps:.1%} of the grid's steps (bar 10 %: "
          f"{verdict(steps <= 0.10)}), {most:.1%} in the costliest case")  # fmt: skip
