"""Renders one JSON document with the CSV's columns: `{"schema": N, "rows": [...]}`, raw units, null for unknown."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict

from gcbench.core import streams
from gcbench.core.records import SCHEMA, Report
from gcbench.report.rows import rows

NAME = "json"
SUFFIX = ".json"


def render(report: Report) -> str:
    """Render the rows of a report, in bytes, seconds and fractions."""
    return document(asdict(row) for row in rows(report))


def document(table: Iterable[Mapping[str, object]]) -> str:
    """Render any rows as every command does for --json; NaN and infinity, which JSON lacks, become null."""
    finite = [{name: _finite(value) for name, value in row.items()} for row in table]
    return json.dumps({"schema": SCHEMA, "rows": finite}, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def print_rows(table: Iterable[Mapping[str, object]]) -> None:
    """Print any rows as a document."""
    streams.print_json(document(table))


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value
