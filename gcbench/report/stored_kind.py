"""A plan or a check that a folder keeps, read again: what it was, so that it can be shown and handed over anew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from gcbench.report.report_file import REPORT_NAME

if TYPE_CHECKING:
    pass

PLANNED_NAME = "planned.json"
CHECK_NAME = "check.json"
PLAN_NAME = "plan.json"
_DECISION_NAME = "decision.json"

Kind = Literal["run", "plan", "check"]


def kind_of(place: Path) -> Kind:
    """What a folder or file holds; a run where nothing else is there.

    Raises ResultsError for a plan that was stored before plans could be shown again.
    """
    if place.suffix == ".json":
        if place.name in (PLANNED_NAME, _DECISION_NAME, PLAN_NAME):
            return "plan"
        return "check" if _has(place, {"combinations", "results"}) else "plan" if _has(place, {"decision"}) else "run"
    if (place / PLANNED_NAME).exists():
        return "plan"
    if (place / CHECK_NAME).exists():
        return "check"
    if (place / _DECISION_NAME).exists() and not (place / REPORT_NAME).exists():
        return "plan"
    return "run"


def _has(path: Path, keys: set[str]) -> bool:
    """Whether a file is a JSON object with these keys; of one that cannot be read, nobody knows."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(value, dict) and keys <= set(value)
