"""Uses the minutes that one has a card for, in the order of what is worth most, and ends within its limit.

    python benchmarks/gpu_hour.py OUT                      480 seconds at most
    python benchmarks/gpu_hour.py OUT --seconds 240        or so many
    python benchmarks/gpu_hour.py OUT --emulate h100       a rehearsal on a card that is not there: memory alone
    python benchmarks/gpu_hour.py OUT --stages tests rates these only, and again if they were done

The GPU tests; runs of gpt2, Llama-3.2-1B and Llama-3.1-8B; the grid that predictions are held to; rates of operators
for a model of step times; a plan's choice measured against its rivals; plain loops. Each stage has a limit of its own,
and those that save as they go get the time that is left. Called again with the same OUT, what was done is not done
again. OUT then holds at most eight files, each with its machine, versions and command: log.txt, stages.json, runs.json,
plan.json, rates.json, plain-loop.json, and truth-*.json twice, which `accuracy.py` reads once they lie in
results/reference. Files of a rehearsal are called emulated, and so are their contents.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a bare machine has no gcbench installed

from gpu_stages import ROOT, SPARE_S, Stage, run, shorten

from gcbench.core.errors import GcbenchError
from gcbench.core.files import write_text
from gcbench.devices import cards
from gcbench.emulate.environment import environment

LLAMA_8B = ("--model", "llama-3.1-8b", "--batch", "1", "--seq-len", "4096", "--precision", "bf16")
RUNS = {
    "gpt2": ("--model", "gpt2", "--batch", "16", "--seq-len", "1024"),
    "llama-3.2-1b": ("--model", "llama-3.2-1b", "--batch", "4", "--seq-len", "2048", "--precision", "bf16"),
    "llama-3.1-8b": (*LLAMA_8B, "--strategies", "off,per-layer,selective:attention"),
    "llama-3.1-8b-lora": (
        *(*LLAMA_8B, "--lora-r", "16"),
        *("--strategies", "off,per-layer,every:2,selective:matmul,selective:attention,offload"),
    ),
}
PLAN = (
    *("--model", "llama-3.2-1b", "--seq-len", "2048", "--batch", "4", "--precision", "bf16"),
    *("--device", "auto", "--device-memory", "28GiB"),
)
DESCRIBE = """
import json, torch
from gcbench.core.json_codec import encode
from gcbench.devices import backends
machine = backends.open_device(backends.choose("cuda")).describe()
print(json.dumps({"free_bytes": torch.cuda.mem_get_info()[0], "machine": encode(machine)}))
"""


class Hour:
    """What is done in one folder, on one card and with one set of versions."""

    def __init__(self, out: Path, *, emulate: str | None, budget_s: float) -> None:
        self.out, self.emulate = out, emulate
        self.end = time.monotonic() + budget_s - SPARE_S
        self.added = {} if emulate is None else environment(cards.find(emulate))
        self.log = self.path("log.txt")
        self.scratch = Path(tempfile.mkdtemp(prefix="gpu-hour-"))
        self.described = self._describe()
        self.header = {
            "command": " ".join(["python benchmarks/gpu_hour.py", "OUT", *(["--emulate", emulate] if emulate else [])]),
            "source": "measured" if emulate is None else "emulated",
            "machine": self.described["machine"],
        }
        stored = self.stored("stages.json")
        if stored and _identity(stored["machine"]) != _identity(self.header["machine"]):
            raise SystemExit(f"error: {out} holds results of another card or other versions; take another folder")
        self.stages: dict[str, Any] = stored.get("stages", {})

    def path(self, name: str) -> Path:
        """Return a file in OUT, which says in its name when it is emulated."""
        if self.emulate is None:
            return self.out / name
        if name.startswith("truth-"):
            return self.out / f"truth-emulated-{self.emulate}-{name.removeprefix('truth-')}"
        return self.out / f"emulated-{self.emulate}-{name}"

    def _describe(self) -> dict[str, Any]:
        try:
            done = subprocess.run(
                [sys.executable, "-c", DESCRIBE],
                env={**os.environ, "PYTHONPATH": str(ROOT), **self.added},
                capture_output=True,
                text=True,
                timeout=120,
            )
        except subprocess.TimeoutExpired:
            raise SystemExit("error: the card did not answer within 120 s; look at nvidia-smi") from None
        if done.returncode:
            why = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise SystemExit(f"error: no card can be used here ({why}); pass --emulate h100 for a rehearsal")
        described: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return described

    def stored(self, name: str) -> dict[str, Any]:
        """Return what a file of OUT holds; nothing where there is none."""
        path = self.path(name)
        stored: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return stored

    def save(self, name: str, content: dict[str, Any]) -> None:
        """Write a file of OUT, with command, source and machine."""
        write_text(self.path(name), json.dumps(self.header | content, indent=1) + "\n")

    @property
    def left_s(self) -> float:
        """The seconds that a stage may take, which leave enough to end one that hangs."""
        return self.end - time.monotonic() - SPARE_S

    def do(self, stage: Stage, *, limit_s: float) -> None:
        """Run a stage within the limit and what is left of the whole; keep how it ended, and its report."""
        if stage.needs_values and self.emulate:
            self._note(stage, "skipped: an emulated card computes nothing, so it has no values and no times", 0.0)
            return
        limit_s = min(limit_s, self.left_s)
        if limit_s < 5:
            self.stages.setdefault(stage.name, {"status": "no time was left", "command": " ".join(stage.command)})
            return
        begin = time.monotonic()
        with self.log.open("a", encoding="utf-8") as log:
            log.write(f"== {stage.name}, {limit_s:.0f} s at most: {' '.join(stage.command)}\n")
        status = run(stage.command, self.log, timeout_s=limit_s, added=self.added)
        self._note(stage, status, time.monotonic() - begin)
        self._keep_report(stage)

    def _note(self, stage: Stage, status: str, seconds: float) -> None:
        before = self.stages.get(stage.name, {}).get("seconds", 0.0) if stage.goes_on else 0.0
        self.stages[stage.name] = {
            "status": status,
            "seconds": round(before + seconds, 1),
            "command": " ".join(stage.command),
        }
        self.save("stages.json", {"stages": self.stages})
        line = f"== {stage.name}: {status}, {seconds:.0f} s"
        print(line, flush=True)
        with self.log.open("a", encoding="utf-8") as log:
            log.write(line + "\n")
        shorten(self.log)

    def _keep_report(self, stage: Stage) -> None:
        if stage.report is None or not stage.report.exists():
            return
        report = json.loads(stage.report.read_text(encoding="utf-8"))
        if stage.name == "plan":
            others = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in _siblings(stage.report)}
            self.save("plan.json", {"report": report, "files": others})
            return
        runs = self.stored("runs.json").get("runs", {})
        if stage.name in runs and _num_results(runs[stage.name]) > _num_results(report):
            return  # an earlier one came further before it was cut off
        self.save("runs.json", {"runs": {**runs, stage.name: report}})

    def waits(self, stage: Stage) -> bool:
        """Whether the stage is still to do: it was never begun, or it was cut off."""
        return self.stages.get(stage.name, {}).get("status") in (None, "cut off", "no time was left")


def _identity(machine: dict[str, Any]) -> tuple[Any, ...]:
    return machine["device_name"], *(machine["versions"].get(name) for name in ("torch", "transformers", "cuda"))


def _num_results(report: dict[str, Any]) -> int:
    """How much a run has measured: processes and their turns."""
    return sum(1 + len(result.get("turns", ())) for outcome in report["outcomes"] for result in outcome["rounds"])


def _siblings(report: Path) -> list[Path]:
    return [path for path in sorted(report.parent.glob("*.json")) if path != report]


def stages(hour: Hour) -> tuple[Stage, ...]:
    """Return all stages, those first that are worth most; their limits add up to less than eight minutes."""
    python = (sys.executable, "-u")
    emulate = () if hour.emulate is None else ("--emulate", hour.emulate)
    tests = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob("**/test_gpu*.py"))
    workers = ("-n", str(min(6, os.cpu_count() or 1))) if importlib.util.find_spec("xdist") else ()
    quiet = ("-m", "gpu", "-q", "--tb=short", "-p", "no:cacheprovider", *workers)

    def one_run(name: str, limit_s: float) -> Stage:
        out = hour.scratch / name
        # Time for publishing is left; three rounds are run in any case.
        device = emulate or ("--device", "cuda", "--target-interval", "1", "--max-time", str(0.7 * limit_s))
        command = (*python, "-m", "gcbench", "run", *RUNS[name], *device, "--quiet", "--out", str(out))
        return Stage(name=name, command=command, limit_s=limit_s, report=out / "report.json")

    plan_out = hour.scratch / "plan"
    plan = (*python, "-m", "gcbench", "plan", *PLAN, "--measure", "--out", str(plan_out))
    truth = ("benchmarks/gpu_truth.py", str(hour.out), *(emulate or ("cuda",)))
    loops = ("benchmarks/plain_loop.py", str(hour.path("plain-loop.json")))
    rates = ("benchmarks/gpu_rates.py", str(hour.path("rates.json")))
    return (
        Stage(name="tests", command=(*python, "-m", "pytest", *quiet, *tests), limit_s=120),
        one_run("gpt2", 30),
        one_run("llama-3.2-1b", 30),
        one_run("llama-3.1-8b", 50),
        one_run("llama-3.1-8b-lora", 40),
        Stage(name="truth", command=(*python, *truth), limit_s=80, goes_on=True),
        Stage(name="rates", command=(*python, *rates, "35"), limit_s=45, goes_on=True, needs_values=True),
        Stage(name="plan", command=plan, limit_s=50, needs_values=True, report=plan_out / "report.json"),
        Stage(name="loops", command=(*python, *loops), limit_s=30, goes_on=True),
    )


def keep_loops_as_truth(hour: Hour) -> None:
    """Write the plain loops that a `gcbench run` can express as a grid, for `accuracy.py` to compare."""
    loops = hour.stored("plain-loop.json").get("cases", {})
    cases = [
        {"name": f"plain loop: {name}", "settings": case["settings"], "cells": [case["cell"]]}
        for name, case in loops.items()
        if "cell" in case
    ]
    if cases:
        hour.save("truth-plain-loop.json", {"free_bytes": hour.described["free_bytes"], "cases": cases})


def main(arguments: Sequence[str] | None = None) -> None:
    """Do what waits, stage by stage, then use what time is left for those that go on."""
    parser = argparse.ArgumentParser(description="Use the minutes that one has a card for.")
    parser.add_argument("out", type=Path, help="Folder for the results; one that was begun is continued.")
    parser.add_argument("--seconds", type=float, default=480.0, help="Limit of the whole (default: 480).")
    parser.add_argument("--emulate", metavar="CARD", help="Rehearse on this card, emulated; only memory is measured.")
    parser.add_argument("--stages", nargs="+", metavar="STAGE", help="Do these stages only, done or not.")
    asked = parser.parse_args(arguments)
    out = asked.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    try:
        hour = Hour(out, emulate=asked.emulate, budget_s=asked.seconds)
    except GcbenchError as err:
        raise SystemExit(f"error: {err}") from None
    everything = stages(hour)
    unknown = sorted(set(asked.stages or ()) - {stage.name for stage in everything})
    if unknown:
        raise SystemExit(f"error: no stage {unknown[0]!r}; take {', '.join(stage.name for stage in everything)}")
    with hour.log.open("a", encoding="utf-8") as log:
        log.write(json.dumps(hour.header) + "\n")
    wanted = [each for each in everything if (each.name in asked.stages if asked.stages else hour.waits(each))]
    try:
        for stage in wanted:
            hour.do(stage, limit_s=stage.limit_s)
        going_on = [stage for stage in reversed(wanted) if stage.goes_on and hour.waits(stage)]
        for number, stage in enumerate(going_on):  # the grid last, as it can use all that the others leave
            if hour.left_s > 15:
                hour.do(stage, limit_s=hour.left_s / (len(going_on) - number))
    except KeyboardInterrupt:
        raise SystemExit(f"interrupted; what was done is in {out}, and the same command goes on from there") from None
    finally:
        keep_loops_as_truth(hour)
        shutil.rmtree(hour.scratch, ignore_errors=True)
    print(hour.log.read_text(encoding="utf-8", errors="replace")[-9000:])
    with suppress(OSError):
        for path in sorted(out.iterdir()):
            print(f"{path.stat().st_size:>12,} {path.name}")


if __name__ == "__main__":
    main()
