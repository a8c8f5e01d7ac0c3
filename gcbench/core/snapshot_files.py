"""Names the files of memory snapshots: one per cell. No torch."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from gcbench.core.errors import UsageError
from gcbench.core.records import Cell

VIEWER = "https://pytorch.org/memory_viz"
PROTOCOL = 4
"""The newest pickle protocol that the viewer's own reader in JavaScript knows."""


def check(file: Path | None) -> Path | None:
    """Return the absolute path of `--snapshot`, whose folder is created; raises UsageError if it cannot be written."""
    if file is None:
        return None
    try:
        if file.is_dir():
            raise IsADirectoryError(0, "it is a folder")
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=file.parent):
            pass
    except OSError as err:
        raise unwritable(file, err) from None
    return file.absolute()


def unwritable(file: Path, err: OSError) -> UsageError:
    """Return the error for a snapshot that cannot be written."""
    return UsageError(f"--snapshot {file} cannot be written ({err.strerror}); choose another file")


def files(file: Path, cells: Sequence[Cell]) -> dict[Cell, Path]:
    """Return the file of each cell: `file` for a single one, else with the cell appended to its name.

    Cells of one workload differ in their strategy, as in `step-per-layer.pickle`; those of several are named in full,
    as in `step-b2-s1024-per-layer.pickle`.
    """
    if len(cells) == 1:
        return {cells[0]: file}
    several = len({cell.workload for cell in cells}) > 1
    names = {cell: cell.key if several else cell.key.split("-", 2)[2] for cell in cells}
    return {cell: file.with_name(f"{file.stem}-{name}{file.suffix}") for cell, name in names.items()}


def written(paths: Sequence[Path]) -> str | None:
    """Return where the snapshots are and what shows them, in a sentence; None if there is none."""
    found = [path for path in paths if path.exists()]
    if not found:
        return None
    names = ", ".join(str(path) for path in found)
    return f"{'Memory snapshot' if len(found) == 1 else 'Memory snapshots'} for {VIEWER}: {names}"
