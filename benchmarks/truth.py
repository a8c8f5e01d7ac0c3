"""Measures the grid that predictions are held to, on the device at hand or an emulated card, and keeps it.

    python benchmarks/truth.py                  the CPU's grid, or a card's where there is one
    python benchmarks/truth.py cpu              the CPU's, whatever there is
    python benchmarks/truth.py --emulate h100   that of a card which is emulated: memory alone, nothing is computed

Saved after every case into results/reference/truth-DEVICE.json, or truth-emulated-CARD-torch2.13.json, with machine and
versions; what is there is not measured again as long as the case and the versions of torch and transformers are the
same.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grid import Case, cases

from gcbench.core.files import write_text
from gcbench.core.json_codec import encode
from gcbench.core.records import Machine, Report
from gcbench.devices import cards
from gcbench.emulate.environment import environment
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


def stored_case(case: Case, report: Report) -> dict[str, Any]:
    """A measured case as it is kept."""
    return {
        "name": case.name,
        "settings": case.settings,
        "cells": [
            {
                "strategy": outcome.cell.strategy,
                "memory": encode(outcome.rounds[0].memory) if outcome.rounds else None,
                "failure": outcome.failure.message if outcome.failure else None,
                "kind": outcome.failure.kind if outcome.failure else None,
                "num_alloc_retries": outcome.rounds[0].num_alloc_retries if outcome.rounds else None,
            }
            for outcome in report.outcomes
        ],
    }


def as_text(document: dict[str, Any]) -> str:
    """The document with a line for each cell: thousands of lines of single numbers say nothing in a diff."""
    marked: list[str] = []

    def mark(cell: dict[str, Any]) -> str:
        marked.append(json.dumps(cell))
        return f"@{len(marked) - 1}@"

    cases = [{**case, "cells": [mark(cell) for cell in case["cells"]]} for case in document["cases"]]
    text = json.dumps({**document, "cases": cases}, indent=1)
    return re.sub(r'"@(\d+)@"', lambda found: marked[int(found[1])], text) + "\n"


def free_bytes(added: Mapping[str, str] | None) -> int:
    """The memory of the card that is free before the allocator takes any, asked for in a process of its own."""
    command = [sys.executable, "-c", "import torch; print(torch.cuda.mem_get_info()[0])"]
    done = subprocess.run(command, env={**os.environ, **(added or {})}, capture_output=True, text=True, check=True)
    return int(done.stdout)


def machine_of(children: ForkedChildren, device: str) -> Machine:
    """The machine and versions that a child finds; raises what its refusal says."""
    answer = children.run(DescribeTask(device=device), on_event=lambda event: None, timeout_s=600.0)
    raise_refusal(answer)
    assert answer.machine is not None
    return answer.machine


def torch_release(machine: Machine) -> str:
    """`2.13`, for a file name."""
    return ".".join((machine.versions.get("torch") or "").split(".")[:2])


def stored_cases(path: Path, machine: Machine) -> dict[str, dict[str, Any]]:
    """The stored cases by name; none where they are of other versions, which may allocate otherwise."""
    if not path.exists():
        return {}
    stored = json.loads(path.read_text(encoding="utf-8"))
    libraries = ("torch", "transformers", "peft")
    if any(stored["machine"]["versions"].get(name) != machine.versions.get(name) for name in libraries):
        return {}
    return {case["name"]: case for case in stored["cases"]}


def emulated_header(script: str, card: cards.Card, added: Mapping[str, str]) -> dict[str, Any]:
    """What a truth of an emulated card begins with."""
    command = f"python benchmarks/{script} --emulate {card.name}"
    return {"command": command, "source": "emulated", "free_bytes": free_bytes(added)}


def main() -> None:
    arguments = argparse.ArgumentParser(description="Measure the grid that predictions are held to.")
    arguments.add_argument("device", nargs="?", default="auto", help="A device of this machine (default: auto).")
    arguments.add_argument("--emulate", metavar="CARD", help="Emulate this card, of which only memory is measured.")
    asked = arguments.parse_args()
    card = cards.find(asked.emulate) if asked.emulate else None
    added = None if card is None else environment(card)
    begin = time.perf_counter()
    with ForkedChildren(environment=added) as children:
        device = asked.device if card is None else "cuda"
        machine = machine_of(children, device)
        if card is None or added is None:
            grid, named = cases(machine.device.partition(":")[0]), slug(machine)
            header: dict[str, Any] = {"command": "make truth"}
        else:
            grid, named = cases("emulated"), f"emulated-{card.name}-torch{torch_release(machine)}"
            header = emulated_header("truth.py", card, added)
        path = REFERENCE / f"truth-{named}.json"
        done = stored_cases(path, machine)
        for number, case in enumerate(grid, start=1):
            if case.name in done and done[case.name]["settings"] == case.settings:
                continue
            done[case.name] = stored_case(case, measure(case, machine.device, children))
            document = {
                **header,
                "machine": encode(machine),
                "cases": [done[c.name] for c in grid if c.name in done],
            }
            write_text(path, as_text(document))
            failed = [cell["failure"] for cell in done[case.name]["cells"] if cell["failure"]]
            print(f"{number:3}/{len(grid)} {case.name}{': ' + failed[0] if failed else ''}", flush=True)
    print(f"{path}: {len(done)} cases, {time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
