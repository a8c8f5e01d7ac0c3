"""Saves a plan into a folder, and loads it again."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from gcbench.core.errors import GcbenchError, ResultsError
from gcbench.core.files import write_text
from gcbench.core.json_codec import decode, encode
from gcbench.core.model_changes import ChangedConfig
from gcbench.core.records import SCHEMA, Json, Machine, ModelFacts
from gcbench.core.version import __version__
from gcbench.devices.target import Target
from gcbench.job import settings as config
from gcbench.plan.decision import Decision
from gcbench.plan.planned import PlanResult
from gcbench.report.report_file import parsed
from gcbench.report.stored_kind import _DECISION_NAME, PLAN_NAME, PLANNED_NAME


@dataclass(frozen=True, kw_only=True)
class StoredPlan:
    """The fields of `PlanResult` as they are stored; `where` is the device's name in words."""

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


def save_plan(planned: PlanResult, folder: Path) -> None:
    """Write the plan into the folder; raises OSError."""
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


def load_plan(place: Path) -> PlanResult:
    """The plan in a folder or file; raises ResultsError where it is missing or damaged."""
    from gcbench.plan.planned import PlanResult

    is_itself = place.suffix == ".json" and place.name not in (_DECISION_NAME, PLAN_NAME)
    path = place if is_itself else _folder(place) / PLANNED_NAME
    if not path.exists() and (_folder(place) / _DECISION_NAME).exists():
        raise ResultsError(
            f"{_folder(place)} was planned by an older gcbench, which stored no {PLANNED_NAME}, so it cannot be "
            "loaded; read its plan.txt, or plan again"
        )
    document = parsed(path, "gcbench plan --out")
    try:
        stored = decode(StoredPlan, document)
        settings = config.settings(stored.settings)
    except (ValueError, GcbenchError) as err:
        raise ResultsError(f"{path} is damaged ({err}); restore it, or plan again into a new folder") from None
    plan_file = path.parent / PLAN_NAME
    return PlanResult(
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


def _folder(place: Path) -> Path:
    return place.parent if place.suffix == ".json" else place
