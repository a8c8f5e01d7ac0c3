"""Saves and loads `report.json`; a file that cannot be read gives a ResultsError that says why."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from gcbench.core import model_changes
from gcbench.core.errors import ResultsError, UsageError
from gcbench.core.files import write_text
from gcbench.core.json_codec import decode, encode
from gcbench.core.records import SCHEMA, Report

REPORT_NAME = "report.json"


def report_path(place: Path) -> Path:
    """Return the report file of a run folder, or the file itself."""
    return place if place.suffix == ".json" else place / REPORT_NAME


def save(report: Report, folder: Path) -> None:
    """Write `report.json` atomically; raises OSError."""
    write_text(folder / REPORT_NAME, json.dumps(encode(report), indent=1) + "\n")


def load(place: Path) -> Report:
    """Load the report in a run folder or file.

    Raises ResultsError when there is none, when it is damaged, or when a newer gcbench wrote it.
    """
    path = report_path(place)
    document = parsed(path, "gcbench run --out")
    try:
        return _with_changes(decode(Report, document))
    except ValueError as err:
        raise ResultsError(f"{path} is damaged ({err}); restore it, or measure again into a new folder") from None


def parsed(path: Path, writer: str) -> object:
    """Load the JSON document in a file that the command `writer` wrote.

    Raises ResultsError when there is none, when it is not JSON, or when a newer gcbench wrote it.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ResultsError(f"there is no {path}; pass a folder that {writer} wrote") from None
    except (OSError, UnicodeDecodeError) as err:
        raise ResultsError(f"{path} cannot be read ({err}); check the path and its permissions") from None
    except json.JSONDecodeError as err:
        raise ResultsError(
            f"{path} is damaged (line {err.lineno}: {err.msg}); restore it, or measure again into a new folder"
        ) from None
    except RecursionError:
        raise ResultsError(f"{path} is nested too deep; restore it, or measure again into a new folder") from None
    schema = document.get("schema") if isinstance(document, dict) else None
    if isinstance(schema, int) and schema > SCHEMA:
        raise ResultsError(
            f"{path} has schema {schema} and this gcbench reads up to {SCHEMA}; upgrade gcbench to read it"
        )
    return document


def _with_changes(report: Report) -> Report:
    """Return the report with the changes to the model in every cell; older reports have them in the settings alone."""
    changes = model_changes.describe(report.settings.get("layers"), report.settings.get("set"))
    if changes is None:
        return report
    return replace(
        report,
        outcomes=tuple(
            replace(o, cell=replace(o.cell, workload=replace(o.cell.workload, model_changes=changes)))
            for o in report.outcomes
        ),
    )


def reopen(folder: Path) -> Report:
    """Load a stored run to continue; raises UsageError when there is none, ResultsError when it is damaged."""
    if not (folder / REPORT_NAME).exists():
        raise UsageError(f"--resume: {folder} holds no run; pass the --out of an interrupted one")
    return load(folder)
