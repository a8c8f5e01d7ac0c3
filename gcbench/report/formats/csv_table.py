"""Comma-separated values: one line per cell, raw units, an empty field for what is unknown."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import astuple

from gcbench.core.records import Report
from gcbench.report.rows import columns, rows

NAME = "csv"
SUFFIX = ".csv"


def table(found: Sequence[Mapping[str, object]]) -> str:
    """Any rows, with a header line."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if found:
        writer.writerow(found[0])
    writer.writerows(row.values() for row in found)
    return text.getvalue()


def render(report: Report) -> str:
    """The table with a header line; bytes, seconds and fractions."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns())
    writer.writerows(astuple(row) for row in rows(report))
    return text.getvalue()
