"""Reads a dry run from its folder."""

from __future__ import annotations

from pathlib import Path

from gcbench.core.errors import ResultsError
from gcbench.core.json_codec import decode
from gcbench.dry_run.records import DryRun
from gcbench.report.report_file import parsed
from gcbench.report.stored_kind import DRY_RUN_NAME

_OF_THE_DOCUMENT = ("schema", "rows", "process_bytes")
"""Keys that the document has beside the record's fields."""


def load_dry_run(place: Path) -> DryRun:
    """Read the dry run in a folder or file; raises ResultsError where there is none that can be read."""
    path = place if place.suffix == ".json" else place / DRY_RUN_NAME
    document = parsed(path, "gcbench dry-run --out")
    try:
        if not isinstance(document, dict):
            raise ValueError("it is no JSON object")
        fields = {key: value for key, value in document.items() if key not in _OF_THE_DOCUMENT}
        fields["invocation"], fields["command"] = fields.pop("command", None), fields.pop("script", None)
        return decode(DryRun, fields)
    except (ValueError, TypeError) as err:
        raise ResultsError(f"{path} is damaged ({err}); restore it, or run the script again") from None
