"""Whether the default job finds the same twice: ten runs alike, their intervals, peaks and durations, and what serves.

    python benchmarks/repeatability.py            ten runs as the machine is, ten with another process busy on one core
    python benchmarks/repeatability.py --runs 3   fewer of each
    python benchmarks/repeatability.py --score    score what is stored, in seconds

Runs are `gcbench run --model gpt2 --batch 16`, one at a time. Kept in results/reference/repeatability-DEVICE.json after
each, with the times of every turn, from which `STATISTICS` are compared: ratios of wall time, of processor time and of
user time, over all turns and over the lower half of them.

Bars: a run ends within three minutes where nothing else is started; the half-width of the interval of per-layer's
overhead is at most 5 points in nine of ten runs, 10 beside a busy process; nine of ten intervals contain the median of
all runs; per-layer costs time in every run; peaks are equal to the byte; of nine in ten pairs of runs each contains the
other's overhead. Exits with 1 when a bar is missed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

from truth import REFERENCE, slug

from gcbench.core.files import write_text
from gcbench.report import stats

JOB = ("--model", "gpt2", "--batch", "16")
RUNS = 10
MOST_S = 180.0
MOST_POINTS = {"as it is": 5.0, "one core busy": 10.0}
ENOUGH = 0.9
STRATEGY = "per-layer"
BUSY = "while True: pass"
NUM_TURNS = (3, 4, 5, 6, 8)
"""Turns over which statistics are compared."""


@contextmanager
def busy_core() -> Iterator[None]:
    """Keep one core busy with a process of its own."""
    other = subprocess.Popen([sys.executable, "-c", BUSY])
    try:
        yield
    finally:
        other.kill()
        other.wait()


def run() -> dict[str, Any]:
    """Run the job once, and return what is kept of it."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, "-m", "gcbench", "run", *JOB, "--out", str(out), "--json", "--quiet"]
        start = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wall_s = time.monotonic() - start
        if done.returncode:
            raise SystemExit(f"gcbench run {' '.join(JOB)}: {done.stderr.strip()}")
        report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    rows = {row["strategy"]: row for row in json.loads(done.stdout)["rows"]}
    return {
        "wall_s": round(wall_s, 1),
        "machine": report["machine"],
        "rows": {
            strategy: {
                name: row[name]
                for name in (
                    "peak_allocated_bytes",
                    "step_time_s",
                    "time_overhead_frac",
                    "time_overhead_low_frac",
                    "time_overhead_high_frac",
                    "time_overhead_basis",
                    "num_turns",
                    "num_turns_disturbed",
                )
            }
            for strategy, row in rows.items()
        },
        "turns": {
            outcome["cell"]["strategy"]: [turn for result in outcome["rounds"] for turn in result["turns"]]
            for outcome in report["outcomes"]
        },
    }


# What the runs say


@dataclass(frozen=True, kw_only=True)
class Interval:
    """The overhead of per-layer in one run, in percentage points."""

    centre: float
    low: float
    high: float

    @property
    def half(self) -> float:
        return (self.high - self.low) / 2

    def contains(self, value: float) -> bool:
        return self.low <= value <= self.high


def interval(found: dict[str, Any]) -> Interval:
    row = found["rows"][STRATEGY]
    low, high = row["time_overhead_low_frac"], row["time_overhead_high_frac"]
    centre = 100 * row["time_overhead_frac"]
    return Interval(
        centre=centre,
        low=float("-inf") if low is None else 100 * low,
        high=float("inf") if high is None else 100 * high,
    )


def score(name: str, runs: Sequence[dict[str, Any]]) -> bool:
    """Print what the runs of one kind say, and return whether every bar is cleared."""
    intervals = [interval(found) for found in runs]
    centre = median(each.centre for each in intervals)
    durations = [found["wall_s"] for found in runs]
    print(f"\n{name}: {len(runs)} runs of gcbench run {' '.join(JOB)}")
    for each, found in zip(intervals, runs, strict=True):
        row = found["rows"][STRATEGY]
        print(
            f"  {STRATEGY} {each.centre:+5.1f} % ({each.low:.1f} to {each.high:.1f}), ±{each.half:.1f} points, "
            f"{row['num_turns']} turns ({row['num_turns_disturbed']} disturbed), {found['wall_s']:.0f} s"
        )
    pairs = list(combinations(intervals, 2))
    peaks = {tuple(sorted((s, r["peak_allocated_bytes"]) for s, r in found["rows"].items())) for found in runs}
    narrow = MOST_POINTS[name]
    bars = [
        (f"half-width at most {narrow:g} points", _share(intervals, lambda each: each.half <= narrow), ENOUGH),
        (
            f"interval contains the median, {centre:.1f} %",
            _share(intervals, lambda each: each.contains(centre)),
            ENOUGH,
        ),
        ("interval above zero", _share(intervals, lambda each: each.low > 0), 1.0),
        ("two runs within each other's intervals", _share(pairs, _agree), ENOUGH),
        ("peaks equal to the byte", float(len(peaks) == 1), 1.0),
    ]
    if name == "as it is":
        bars.append((f"at most {MOST_S:.0f} s", _share([each <= MOST_S for each in durations]), 1.0))
    for what, share, least in bars:
        print(f"  {what}: {share:.0%} (bar {least:.0%}: {'PASS' if share >= least else 'MISS'})")
    return all(share >= least for _, share, least in bars)


def _agree(one: Interval, other: Interval) -> bool:
    return one.contains(other.centre) and other.contains(one.centre)


def _share(holds: Sequence[bool]) -> float:
    return sum(holds) / len(holds) if holds else 0.0


# Which statistic serves

Turn = dict[str, Any]
STATISTICS: dict[str, Callable[[Turn], float]] = {
    "wall time": lambda turn: median(turn["step_times_s"]),
    "processor time (user + system)": lambda turn: (turn["user_s"] + turn["system_s"]) / len(turn["step_times_s"]),
    "processor time (user)": lambda turn: turn["user_s"] / len(turn["step_times_s"]),
}


def ratios(found: dict[str, Any], statistic: Callable[[Turn], float]) -> list[float]:
    """Ratios of per-layer's steps to those of `off`, turn by turn, less 1."""
    mine, off = ({turn["number"]: turn for turn in found["turns"][name]} for name in (STRATEGY, "off"))
    return [statistic(mine[number]) / statistic(off[number]) - 1 for number in sorted(mine.keys() & off.keys())]


def compare(name: str, runs: Sequence[dict[str, Any]]) -> None:
    """Print how wide each statistic's intervals are, and how often they contain the median of all pairs of turns."""
    print(f"\n{name}: intervals from so many consecutive turns: half-width in points (of nine in ten), coverage")
    print(f"  {'ratio of':32} {'median':>8} {'spread':>8}" + "".join(f"{n:>18}" for n in NUM_TURNS))
    for what, statistic in STATISTICS.items():
        by_run = [ratios(found, statistic) for found in runs]
        every = [ratio for each in by_run for ratio in each]
        centre = median(every)
        spread = median(abs(ratio - centre) for ratio in every)
        cells = []
        for count in NUM_TURNS:
            found = [
                stats.estimate([1 + ratio for ratio in each[first : first + count]])
                for each in by_run
                for first in range(len(each) - count + 1)
            ]
            known = [one.minus(1).interval for one in found if one is not None]
            limits = [each for each in known if each is not None]
            halves = sorted((high - low) / 2 for low, high in limits)
            inside = _share([low <= centre <= high for low, high in limits])
            cells.append(f"{100 * halves[int(0.9 * (len(halves) - 1))]:7.1f}, {inside:4.0%}" if halves else "–")
        print(f"  {what:32} {100 * centre:6.1f} % {100 * spread:6.1f} %" + "".join(f"{cell:>18}" for cell in cells))


def main() -> None:
    """Run what is not stored yet, and score."""
    from gcbench.devices.backends import open_device

    path = REFERENCE / f"repeatability-{slug(open_device('cpu').describe())}.json"
    if "--score" in sys.argv:
        path = next(iter(sorted(REFERENCE.glob("repeatability-*.json"))), path)
    stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    num_runs = int(sys.argv[sys.argv.index("--runs") + 1]) if "--runs" in sys.argv else RUNS
    if "--score" not in sys.argv:
        stored |= {"command": "python benchmarks/repeatability.py", "job": list(JOB)}
        for name in MOST_POINTS:
            runs = stored.setdefault("runs", {}).setdefault(name, [])
            while len(runs) < num_runs:
                if name == "one core busy":
                    with busy_core():
                        runs.append(run())
                else:
                    runs.append(run())
                write_text(path, json.dumps(stored, indent=1) + "\n")
    passed = [score(name, runs) for name, runs in stored["runs"].items() if runs]
    for name, runs in stored["runs"].items():
        if runs:
            compare(name, runs)
    sys.exit(0 if all(passed) else 1)


if __name__ == "__main__":
    main()
