"""Reads a check from its folder."""

from __future__ import annotations

from pathlib import Path

from gcbench.check.cases import Check
from gcbench.core.errors import ResultsError
from gcbench.core.json_codec import decode
from gcbench.report.report_file import parsed
from gcbench.report.stored_kind import CHECK_NAME


def load_check(place: Path) -> Check:
    """Read the check in a folder or file; raises ResultsError where there is none that can be read."""
    path = place if place.suffix == ".json" else place / CHECK_NAME
    document = parsed(path, "gcbench check --out")
    try:
        check = decode(Check, document)
    except ValueError as err:
        raise ResultsError(f"{path} is damaged ({err}); restore it, or check again into a new folder") from None
    if any(not 0 <= result.number < len(check.combinations) for result in check.results):
        raise ResultsError(f"{path} is damaged (a result belongs to no combination); check again into a new folder")
    return check
