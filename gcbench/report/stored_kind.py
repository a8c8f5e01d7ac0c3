"""Tells whether a folder or JSON file holds a run, a plan, a check or a dry run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from gcbench.report.report_file import REPORT_NAME

PLANNED_NAME = "planned.json"
CHECK_NAME = "check.json"
PLAN_NAME = "plan.json"
DRY_RUN_NAME = "dry-run.json"
_DECISION_NAME = "decision.json"

Kind = Literal["run", "plan", "check", "dry-run"]


def kind_of(place: Path) -> Kind:
    """Return what a folder or file holds; "run" also for predictions, and where it holds none of these."""
    if place.suffix == ".json":
        if place.name in (PLANNED_NAME, _DECISION_NAME, PLAN_NAME):
            return "plan"
        if _has(place, {"verdict", "observed"}):
            return "dry-run"
        return "check" if _has(place, {"combinations", "results"}) else "plan" if _has(place, {"decision"}) else "run"
    if (place / PLANNED_NAME).exists():
        return "plan"
    if (place / CHECK_NAME).exists():
        return "check"
    if (place / DRY_RUN_NAME).exists():
        return "dry-run"
    if (place / _DECISION_NAME).exists() and not (place / REPORT_NAME).exists():
        return "plan"
    return "run"


def _has(path: Path, keys: set[str]) -> bool:
    """Return whether a file is a JSON object with these keys; False for one that cannot be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(value, dict) and keys <= set(value)
