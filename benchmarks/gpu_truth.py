"""Measures the grid of `truth.py` into a folder, the cases that no stored grid of this card has first.

    python benchmarks/gpu_truth.py OUT [ARGUMENTS OF truth.py]

A committed grid of the same card and versions is where it begins; the committed file itself is left as it is. A real
card gets the emulated cards' grid too, which has more settings, after its own.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import grid
import truth

from gcbench.core.files import write_text
from gcbench.emulate.environment import emulated_card

COMMITTED = truth.REFERENCE


def of_this_card(device_name: str) -> list[tuple[Path, dict[str, Any]]]:
    """Return the committed grids that were measured on a card of this name."""
    found = []
    for path in sorted(COMMITTED.glob("truth-*.json")):
        stored = json.loads(path.read_text(encoding="utf-8"))
        is_card = stored["machine"]["device"] != "cpu" and stored.get("source", "measured") == "measured"
        if is_card and stored["machine"]["device_name"] == device_name:
            found.append((path, stored))
    return found


def by_value(known: set[str]) -> tuple[grid.Case, ...]:
    """Return every case for a card: those that were never measured on it first."""
    wide = getattr(grid, "emulated_cases", grid.cuda_cases)
    cases = {case.name: case for case in (*grid.cuda_cases(), *wide())}
    return tuple(sorted(cases.values(), key=lambda case: json.dumps([case.name, case.settings]) in known))


def main() -> None:
    out, arguments = Path(sys.argv[1]).resolve(), sys.argv[2:]
    known: set[str] = set()
    if "--emulate" not in arguments and emulated_card() is None:
        import torch

        for path, stored in of_this_card(torch.cuda.get_device_name(0)):
            known |= {json.dumps([case["name"], case["settings"]]) for case in stored["cases"]}
            if not (out / path.name).exists():
                write_text(out / path.name, path.read_text(encoding="utf-8"))  # used where its versions are these
    truth.REFERENCE = out
    truth.cases = lambda kind: by_value(known)
    sys.argv = ["truth.py", *arguments]
    truth.main()


if __name__ == "__main__":
    main()
