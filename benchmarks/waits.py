"""How long a user waits for what should take a moment: solvers, an unknown model without a network, a check's overhead.

    PYTHONPATH=tests/plan:tests/support python benchmarks/waits.py       (make bench)

The bars: the choice among 15 options for each of 128 layers and the best policies of a layer of 120 calls in 1 s; an
unknown model without a network in 3 s; a check in 1.5 times the time of its training steps.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import tiny
from test_mix import large_problem
from test_policies import layer

from gcbench.check import cases, worker
from gcbench.check.task import CheckTask, ReferenceRun
from gcbench.models import sources
from gcbench.plan.layer_mix.problem import lowest_peak, peak, solve
from gcbench.plan.policies.min_cut import frontier


def seconds(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def choices() -> Iterator[float]:
    """Seconds for problems of identical and of different layers, at two budgets each."""
    for identical in (True, False):
        for seed in range(2):
            problem = large_problem(seed, alike=identical)
            low, high = lowest_peak(problem), peak(problem, [14] * 128)
            for share in (0.1, 0.5):
                budget = replace(problem, budget_bytes=int(low + share * (high - low)))
                yield seconds(lambda budget=budget: solve(budget))


def unknown_model() -> float:
    """The quickest of three, with a Hub that refuses connections."""
    with socket.socket() as listener, tempfile.TemporaryDirectory() as folder:
        listener.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        env = os.environ | {"HF_ENDPOINT": url, "HF_HOME": folder, "HF_HUB_OFFLINE": "0", "no_proxy": "*"}
        command = [sys.executable, "-m", "gcbench", "run", "--model", "gtp2", "--batch", "1"]
        return min(seconds(lambda: subprocess.run(command, env=env, capture_output=True)) for _ in range(3))


def check_overhead() -> float:
    """Wall time of a check over the time of its training steps: the best of three."""
    with tempfile.TemporaryDirectory() as folder:
        source = sources.resolve(str(tiny.write_model(Path(folder) / "llama", "llama")))
        combinations = tuple(enumerate(cases.combinations(compiled=False)[:21]))
        task = CheckTask(
            source=source,
            layers=None,
            overrides={},
            device="cpu",
            full_size=False,
            combinations=combinations,
            batch_size=2,
            seq_len=None,
            seed=0,
        )
        worker.check(replace(task, combinations=combinations[:1]), lambda event: None)
        ratios = []
        for _ in range(3):
            events: list[object] = []
            took = seconds(lambda events=events: worker.check(task, events.append))
            ratios.append(took / sum(e.steps_s for e in events if isinstance(e, (ReferenceRun, cases.CheckResult))))
        return min(ratios)


def main() -> None:
    print(f"15 options for each of 128 layers   {max(choices()):.2f} s at most (bar 1 s)")
    print(f"policies of a layer of 120 calls    {seconds(lambda: frontier(layer(120, 0))):.2f} s (bar 1 s)")
    print(f"an unknown model, no network        {unknown_model():.2f} s (bar 3 s)")
    print(f"a check over its training steps     {check_overhead():.2f} (bar 1.5)")


if __name__ == "__main__":
    main()
