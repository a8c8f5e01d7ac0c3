"""The run folder: made once, saved after every result, and nothing lost when it cannot be written."""

from __future__ import annotations

import itertools
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gcbench import report as reports
from gcbench.errors import GcbenchError, UsageError
from gcbench.records import Cell, Report
from gcbench.report import REPORT_NAME, write_text

GRADIENTS = "gradients"


class Store:
    """Where a run's report and gradient fingerprints go.

    A write that fails while cells are measured is told once and tried again with the next result; `close` puts
    what could not be written into the system's temporary folder.
    """

    def __init__(self, folder: Path, *, made: bool = False) -> None:
        self.folder = folder
        self._made = made
        self._unwritten: Report | None = None
        self._incomplete = False
        self._told = False
        self._gradients: dict[str, str] = {}

    @classmethod
    def create(cls, folder: Path, *, can_resume: bool = False) -> Store:
        """A new folder of results; raises UsageError when it holds something already or cannot be written.

        Args:
            can_resume: whether the command has --resume.
        """
        if folder.is_dir() and any(folder.iterdir()):
            advice = (
                "add --resume to continue it, or take another --out"
                if can_resume and (folder / REPORT_NAME).exists()
                else ""
            )
            raise UsageError(f"--out {folder} exists and is not empty; {advice or 'take another --out'}")
        made = not folder.exists()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as err:
            raise UsageError(f"--out {folder} cannot be written ({err.strerror}); take another --out") from None
        return cls(folder, made=made)

    def save(self, report: Report) -> None:
        """Write the report; a failure is told on stderr and does not stop the run."""
        try:
            reports.save(report, self.folder)
            self._unwritten = None
        except OSError as err:
            self._note(report, err)

    @contextmanager
    def forgiving(self, report: Report) -> Iterator[None]:
        """A block that writes beside the report; its failure is told like one of `save`, and again by `close`."""
        try:
            yield
        except OSError as err:
            self._incomplete = True
            self._note(report, err)

    def _note(self, report: Report, err: OSError) -> None:
        self._unwritten = report
        if not self._told:
            self._told = True
            print(
                f"warning: {self.folder} cannot be written ({err.strerror}); measuring goes on, and saving is "
                "tried again after each result",
                file=sys.stderr,
            )

    def save_gradients(self, cell: Cell, number: int, text: str) -> None:
        """Keep the fingerprint of a cell's gradients, for cells measured later or by --resume."""
        name = f"{cell.key}-r{number}.json"
        self._gradients[name] = text
        with suppress(OSError):  # told by `save`, which follows
            write_text(self.folder / GRADIENTS / name, text)

    def load_gradients(self, cell: Cell, number: int) -> str | None:
        """A stored fingerprint; None when there is none."""
        name = f"{cell.key}-r{number}.json"
        if name not in self._gradients:
            try:
                self._gradients[name] = (self.folder / GRADIENTS / name).read_text(encoding="utf-8")
            except OSError:
                return None
        return self._gradients[name]

    def discard_if_empty(self) -> None:
        """Take the folder away again, if this run made it and ended before it had a report."""
        if self._made and not (self.folder / REPORT_NAME).exists():
            with suppress(OSError):
                self.folder.rmdir()

    def close(self) -> None:
        """Try the last save again; raises GcbenchError naming the other place when the folder stays unwritable, and
        when tables and plots are missing from it."""
        if self._unwritten is not None:
            self.save(self._unwritten)
        report = self._unwritten
        if report is None and self._incomplete:
            raise GcbenchError(
                f"{self.folder / REPORT_NAME} is complete, but tables or plots beside it could not be written; make "
                f"them with gcbench report {self.folder} once there is room"
            )
        if report is None:
            return
        try:
            other = Path(tempfile.mkdtemp(prefix="gcbench-run-"))
            reports.save(report, other)
        except OSError as err:
            raise GcbenchError(
                f"the results could not be written to {self.folder} nor to the temporary folder ({err.strerror}); "
                "the table above is all there is: copy it"
            ) from None
        raise GcbenchError(
            f"the results could not be written to {self.folder}; they are in {other}: move them once there is room"
        )


def default_folder(model_slug: str, created: str) -> Path:
    """`results/MODEL-DATE-TIME` below the current folder, with a number behind it when that is taken."""
    stamp = created[:19].replace("-", "").replace(":", "").replace("T", "-")
    first = Path("results") / f"{model_slug}-{stamp}"
    others = (first.with_name(f"{first.name}-{number}") for number in itertools.count(2))
    return next(folder for folder in itertools.chain([first], others) if not folder.exists())
