"""Observes a training script from inside its own process: phases, peaks, out of memory, recomputation, reads.

It is loaded by `startup/sitecustomize.py` into the script's process, whose environment may lack gcbench: it imports
nothing but the standard library and, once the script does, torch. What it sees it writes into the private folder of the
dry run, one file per process (`records.Observed`).
"""

from __future__ import annotations

import json
import os

SETTINGS_VARIABLE = "GCBENCH_DRY_RUN"
"""Environment variable of the script's process: a JSON object with `folder`, `steps` and `snapshot`."""


def start() -> None:
    """Arm the observer for the moment at which the script imports torch."""
    text = os.environ.get(SETTINGS_VARIABLE)
    if text is None:
        return
    from .session import Session

    settings = json.loads(text)
    Session(folder=settings["folder"], max_steps=settings["steps"], snapshot=settings["snapshot"]).arm()
