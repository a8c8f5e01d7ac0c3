"""Measures the grid that predictions are held to, on the device at hand, and keeps it.

    python benchmarks/truth.py            the CPU's grid, or a card's where there is one
    python benchmarks/truth.py cpu        the CPU's, whatever there is

Saved after every case into results/reference/truth-DEVICE.json, with machine and versions; what is there is not
measured again as long as the case and the versions of torch and transformers are the same.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import time
from pathlib import Path

from grid import Case, cases

from gcbench.core.files import write_text
from gcbench.core.json_codec import encode
from gcbench.core.records import Machine, Report
from gcbench.job import settings as config
from gcbench.job.describe import DescribeTask
from gcbench.measure import runner
from gcbench.measure.progress import QuietProgress
from gcbench.models import sources
from gcbench.processes.children import ForkedChildren
from gcbench.processes.messages import raise_refusal
from gcbench.report.run_folder import Store

REFERENCE = Path(__file__).parent.parent / "results" / "reference"


def slug(machine: Machine) -> str:
    """`cpu-intel-xeon` or `nvidia-h200`, for a file name."""
    name = re.sub(r"\(.*?\)|@.*|\bCPU\b|\bprocessor\b", " ", machine.device_name, flags=re.IGNORECASE)
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return f"cpu-{plain}" if machine.device == "cpu" else plain


def measure(case: Case, device: str, children: ForkedChildren) -> Report:
    """The case's cells, each measured once: peaks do not differ between rounds."""
    wanted = config.settings({**case.settings, "device": device, "rounds": 1, "warmup": 1, "steps": 1})
    source = sources.resolve(wanted.model, pretrained=False, trust_remote_code=False)
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder))
        return runner.run(
            wanted, source=source, children=children, store=store, progress=QuietProgress(), command="truth"
        )


def main() -> None:
    wanted = sys.argv[1] if len(sys.argv) > 1 else "auto"
    begin = time.perf_counter()
    with ForkedChildren() as children:
        answer = children.run(DescribeTask(device=wanted), on_event=lambda event: None, timeout_s=600.0)
        raise_refusal(answer)
        machine = answer.machine
        assert machine is not None
        path = REFERENCE / f"truth-{slug(machine)}.json"
        stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        libraries = {name: machine.versions.get(name) for name in ("torch", "transformers", "peft")}
        if stored and any(stored["machine"]["versions"].get(name) != there for name, there in libraries.items()):
            stored = {}  # another version may allocate otherwise
        done = {case["name"]: case for case in stored.get("cases", [])}
        grid = cases(machine.device.partition(":")[0])
        for number, case in enumerate(grid, start=1):
            if case.name in done and done[case.name]["settings"] == case.settings:
                continue
            report = measure(case, machine.device, children)
            done[case.name] = {
                "name": case.name,
                "settings": case.settings,
                "cells": [
                    {
                        "strategy": outcome.cell.strategy,
                        "memory": encode(outcome.rounds[0].memory) if outcome.rounds else None,
                        "failure": outcome.failure.message if outcome.failure else None,
                        "num_alloc_retries": outcome.rounds[0].num_alloc_retries if outcome.rounds else None,
                    }
                    for outcome in report.outcomes
                ],
            }
            document = {
                "command": "make truth",
                "machine": encode(machine),
                "cases": [done[c.name] for c in grid if c.name in done],
            }
            write_text(path, json.dumps(document, indent=1) + "\n")
            failed = [cell["failure"] for cell in done[case.name]["cells"] if cell["failure"]]
            print(f"{number:3}/{len(grid)} {case.name}{': ' + failed[0] if failed else ''}", flush=True)
    print(f"{path}: {len(done)} cases, {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
