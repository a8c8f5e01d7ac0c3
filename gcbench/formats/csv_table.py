"""Comma-separated values: one line per cell, raw units, an empty field for what is unknown."""

from __future__ import annotations

import csv
import io
from dataclasses import astuple

from gcbench.records import Report
from gcbench.tables import columns, rows

NAME = "csv"
SUFFIX = ".csv"


def render(report: Report) -> str:
    """The table with a header line; bytes, seconds and fractions."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns())
    writer.writerows(astuple(row) for row in rows(report))
    return text.getvalue()
