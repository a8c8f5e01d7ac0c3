"""Loads a stored run or prediction as a pandas data frame: `gcbench.load(folder).to_frame()`."""

from __future__ import annotations

import typing
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from gcbench.core.errors import ResultsError
from gcbench.core.records import Report, Row
from gcbench.report import report_file, stored_kind
from gcbench.report.rows import columns, rows

if TYPE_CHECKING:
    import pandas  # type: ignore[import-untyped]  # its stubs are a package of their own


@dataclass(frozen=True, kw_only=True)
class LoadedResults:
    """A stored run or prediction, which `load` returns.

    Attributes:
        path: the JSON file that it was read from.
        report: everything in that file.
    """

    path: Path
    report: Report

    @property
    def kind(self) -> Literal["run", "prediction"]:
        """What the folder holds."""
        return "prediction" if self.report.source == "predicted" else "run"

    def to_frame(self) -> pandas.DataFrame:
        """Return a data frame with one row per cell and the columns of `table.csv`, in the same order.

        Units are raw: `_bytes`, `_s` (seconds) and `_frac` (fractions, not percent). Whole numbers are `Int64`, other
        numbers `Float64` and texts `string`, all nullable: unknown is `pandas.NA`.
        """
        import pandas

        table, types = rows(self.report), typing.get_type_hints(Row)
        return pandas.DataFrame(
            {
                name: pandas.array([getattr(row, name) for row in table], dtype=_nullable_dtype(types[name]))
                for name in columns()
            }
        )


def load(folder: str | PathLike[str]) -> LoadedResults:
    """Load what `gcbench run` or `gcbench predict --out` stored.

    Args:
        folder: that folder, or its `report.json`.

    Raises ResultsError when there is no such file, when it is damaged, when a newer gcbench wrote it, and for a stored
    plan or check, which has no table of cells.
    """
    place = Path(folder)
    kind = stored_kind.kind_of(place)
    if kind != "run":
        raise ResultsError(
            f"{place} is a stored {kind}, and load reads runs and predictions; show it with gcbench report {place}"
        )
    return LoadedResults(path=report_file.report_path(place), report=report_file.load(place))


def _nullable_dtype(annotation: object) -> str:
    members = typing.get_args(annotation) or (annotation,)
    return "Int64" if int in members else "Float64" if float in members else "string"
