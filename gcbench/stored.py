"""A plan or a check that a folder keeps, read again: what it was, so that it can be shown and handed over anew."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from gcbench import __version__, config
from gcbench.changes import ChangedConfig
from gcbench.checks import Check
from gcbench.codec import decode, encode
from gcbench.decision import Decision
from gcbench.errors import GcbenchError, ResultsError
from gcbench.records import SCHEMA, Json, Machine, ModelFacts
from gcbench.report import REPORT_NAME, parsed, write_text
from gcbench.simulate.target import Target

if TYPE_CHECKING:
    from gcbench.plan_session import Planned

PLANNED_NAME = "planned.json"
CHECK_NAME = "check.json"
PLAN_NAME = "plan.json"
_DECISION_NAME = "decision.json"

Kind = Literal["run", "plan", "check"]


@dataclass(frozen=True, kw_only=True)
class StoredPlan:
    """All that a plan was made for and came to; `where` is the device's name in words."""

    schema: int
    gcbench_version: str
    command: str
    created: str
    settings: dict[str, Json]
    seq_len: int
    device: str
    device_kind: str
    device_memory_bytes: int | None
    where: str
    expandable_segments: bool
    machine: Machine
    model: ModelFacts
    decision: Decision
    hub_id: str | None
    changed: ChangedConfig | None = None


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


def save_plan(planned: Planned, folder: Path) -> None:
    """Keep all of a plan; raises OSError."""
    target = planned.target
    stored = StoredPlan(
        schema=SCHEMA,
        gcbench_version=__version__,
        command=planned.command,
        created=planned.created,
        settings=config.as_json(planned.settings),
        seq_len=planned.seq_len,
        device=target.name,
        device_kind=target.kind,
        device_memory_bytes=target.memory_bytes,
        where=planned.where,
        expandable_segments=target.expandable_segments,
        machine=planned.machine,
        model=planned.facts,
        decision=planned.decision,
        hub_id=planned.hub_id,
        changed=planned.changed,
    )
    write_text(folder / PLANNED_NAME, json.dumps(encode(stored), indent=1) + "\n")


def load_plan(place: Path) -> Planned:
    """The plan in a folder or file; raises ResultsError where there is none that can be read."""
    from gcbench.plan_session import Planned

    is_itself = place.suffix == ".json" and place.name not in (_DECISION_NAME, PLAN_NAME)
    path = place if is_itself else _folder(place) / PLANNED_NAME
    if not path.exists() and (_folder(place) / _DECISION_NAME).exists():
        raise ResultsError(
            f"{_folder(place)} was planned by a gcbench that kept no {PLANNED_NAME}, so that it cannot be shown again; "
            "read its plan.txt, or plan again"
        )
    document = parsed(path, "gcbench plan --out")
    try:
        stored = decode(StoredPlan, document)
        settings = config.settings(stored.settings)
    except (ValueError, GcbenchError) as err:
        raise ResultsError(f"{path} is damaged ({err}); restore it, or plan again into a new folder") from None
    plan_file = path.parent / PLAN_NAME
    return Planned(
        settings=settings,
        seq_len=stored.seq_len,
        target=Target(
            kind=stored.device_kind,
            name=stored.device,
            memory_bytes=stored.device_memory_bytes,
            expandable_segments=stored.expandable_segments,
        ),
        machine=stored.machine,
        facts=stored.model,
        decision=stored.decision,
        command=stored.command,
        created=stored.created,
        hub_id=stored.hub_id,
        plan_file=plan_file if plan_file.exists() else None,
        changed=stored.changed,
        stored_where=stored.where,
    )


def load_check(place: Path) -> Check:
    """The check in a folder or file; raises ResultsError where there is none that can be read."""
    path = place if place.suffix == ".json" else place / CHECK_NAME
    document = parsed(path, "gcbench check --out")
    try:
        check = decode(Check, document)
    except ValueError as err:
        raise ResultsError(f"{path} is damaged ({err}); restore it, or check again into a new folder") from None
    if any(not 0 <= result.number < len(check.combinations) for result in check.results):
        raise ResultsError(f"{path} is damaged (a result of no combination); check again into a new folder")
    return check


def _folder(place: Path) -> Path:
    return place.parent if place.suffix == ".json" else place
