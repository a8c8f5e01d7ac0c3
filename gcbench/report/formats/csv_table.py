"""Renders comma-separated values: one line per cell, raw units, an empty field for what is unknown."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import astuple

from gcbench.core.records import Report
from gcbench.report.rows import columns, rows

NAME = "csv"
SUFFIX = ".csv"


def table(lines: Sequence[Mapping[str, object]]) -> str:
    """Render any rows, with a header line."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if lines:
        writer.writerow(lines[0])
    writer.writerows(row.values() for row in lines)
    return text.getvalue()


def render(report: Report) -> str:
    """Render the rows of a report with a header line, in bytes, seconds and fractions."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns())
    writer.writerows(astuple(row) for row in rows(report))
    return text.getvalue()
