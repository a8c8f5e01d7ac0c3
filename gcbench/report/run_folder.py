"""Manages a run folder: locks it, saves after every result, and saves elsewhere when it cannot be written."""

from __future__ import annotations

import itertools
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from gcbench.core.errors import GcbenchError, UsageError
from gcbench.core.files import write_text
from gcbench.core.records import Cell, Report
from gcbench.report import report_file as reports
from gcbench.report.report_file import REPORT_NAME

if TYPE_CHECKING:
    from filelock import BaseFileLock

GRADIENTS = "gradients"
LOCK_NAME = ".gcbench.lock"
"""Exists while a process writes to the folder; one that a killed process left behind locks nothing."""
_TRIES = 5


class Store:
    """A locked folder for a run's report and gradient fingerprints.

    A context manager: on an error inside, a folder that is new and still without a report is removed. A write that
    fails while cells are measured is reported once and retried with the next result; `close` writes what is still
    unwritten to the system's temporary folder.
    """

    def __init__(self, folder: Path, *, made: bool = False, lock: BaseFileLock | None = None) -> None:
        self.folder = folder
        self._made = made
        self._lock = lock
        self._failed: OSError | None = None
        self._unwritten: Report | None = None
        self._incomplete = False
        self._is_reported = False
        self._gradients: dict[str, str] = {}

    @classmethod
    def create(cls, folder: Path, *, can_resume: bool = False) -> Store:
        """Create a folder of results; raises UsageError when it is not empty, is in use or cannot be written.

        Args:
            can_resume: whether the command has --resume.
        """
        made = not folder.exists()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = _locked(folder)
        except OSError as err:
            raise _unwritable(folder, err) from None
        store = cls(folder, made=made, lock=lock)
        try:
            if any(path.name != LOCK_NAME for path in folder.iterdir()):
                begun = can_resume and (folder / REPORT_NAME).exists()
                advice = "add --resume to continue it, or choose another --out" if begun else "choose another --out"
                raise UsageError(f"--out {folder} exists and is not empty; {advice}")
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as err:
            store.release()
            raise _unwritable(folder, err) from None
        except UsageError:
            store.release()
            raise
        return store

    @classmethod
    def new(cls, slug: str, created: str) -> Store:
        """Create a new folder named by `default_folder`; raises UsageError."""
        while True:
            folder = default_folder(slug, created)
            try:
                folder.parent.mkdir(parents=True, exist_ok=True)
                folder.mkdir()
            except OSError as err:
                if isinstance(err, FileExistsError) and folder.is_dir():
                    continue  # another process created it first
                raise _unwritable(folder, err) from None
            store = cls.create(folder)
            store._made = True
            return store

    @classmethod
    def reopen(cls, folder: Path) -> Store:
        """Lock the folder of a run to continue; raises UsageError when another process writes to it."""
        try:
            return cls(folder, lock=_locked(folder))
        except OSError as err:
            raise _unwritable(folder, err) from None

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        self.release()
        if kind is not None:
            self.discard_if_empty()

    def release(self) -> None:
        """Unlock the folder and remove the lock file."""
        if self._lock is None:
            return
        with suppress(OSError):
            Path(self._lock.lock_file).unlink(missing_ok=True)
        with suppress(OSError):
            self._lock.release()
        self._lock = None

    def save(self, report: Report) -> None:
        """Write the report; a failure is reported on stderr and does not stop the run."""
        try:
            reports.save(report, self.folder)
            self._unwritten = None
        except OSError as err:
            self._note(report, err)

    @contextmanager
    def forgiving(self, report: Report) -> Iterator[None]:
        """Handle an OSError of the block, which writes beside the report, as `save` does; `close` reports it again."""
        try:
            yield
        except OSError as err:
            self._incomplete = True
            self._note(report, err)

    def _note(self, report: Report, err: OSError) -> None:
        self._unwritten = report
        if not self._is_reported:
            self._is_reported = True
            print(
                f"warning: {self.folder} cannot be written ({err.strerror}); the run continues, and saving is "
                "retried after each result",
                file=sys.stderr,
            )

    def save_gradients(self, cell: Cell, number: int, text: str) -> None:
        """Store the fingerprint of a cell's gradients, for cells measured later or by --resume."""
        name = f"{cell.key}-r{number}.json"
        self._gradients[name] = text
        with suppress(OSError):  # `save`, which follows, reports it
            write_text(self.folder / GRADIENTS / name, text)

    def load_gradients(self, cell: Cell, number: int) -> str | None:
        """Load a stored fingerprint; None when there is none."""
        name = f"{cell.key}-r{number}.json"
        if name not in self._gradients:
            try:
                self._gradients[name] = (self.folder / GRADIENTS / name).read_text(encoding="utf-8")
            except OSError:
                return None
        return self._gradients[name]

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Leave an OSError of the block, which writes other files than a report, for `close` to report."""
        try:
            yield
        except OSError as err:
            self._failed = err

    def discard_if_empty(self) -> None:
        """Remove the folder if this run created it and ended before it had a report."""
        if self._made and not (self.folder / REPORT_NAME).exists():
            with suppress(OSError):
                self.folder.rmdir()

    def close(self) -> None:
        """Retry a failed save.

        Raises GcbenchError when the folder stays unwritable, with the place where the report is instead, and when
        tables or plots beside the report are missing.
        """
        if self._failed is not None:
            raise GcbenchError(
                f"{self.folder} could not be written ({self._failed.strerror}), so only the output above exists; copy "
                "it, or repeat the command with another --out"
            )
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
                "only the table above exists: copy it"
            ) from None
        raise GcbenchError(
            f"the results could not be written to {self.folder}; they are in {other}: move them once there is room"
        )


def _unwritable(folder: Path, err: OSError) -> UsageError:
    return UsageError(f"--out {folder} cannot be written ({err.strerror}); choose another --out")


def _locked(folder: Path) -> BaseFileLock | None:
    """Lock the folder; None where its file system has no locks. Raises UsageError when another process holds it.

    The operating system releases it when its holder ends, in whichever way.
    """
    from filelock import FileLock, Timeout  # lazily: most commands write to no folder

    for _ in range(_TRIES):
        lock = FileLock(folder / LOCK_NAME, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise UsageError(
                f"--out {folder} is being written to by another gcbench; wait for its end, or choose another --out"
            ) from None
        except (OSError, NotImplementedError):
            return None
        if Path(lock.lock_file).exists():
            return lock
        lock.release()  # its former holder removed the file in between
    return None


def default_folder(model_slug: str, created: str) -> Path:
    """Return `results/MODEL-DATE-TIME` below the current folder, with a number appended when it exists."""
    stamp = created[:19].replace("-", "").replace(":", "").replace("T", "-")
    first = Path("results") / f"{model_slug}-{stamp}"
    others = (first.with_name(f"{first.name}-{number}") for number in itertools.count(2))
    return next(folder for folder in itertools.chain([first], others) if not folder.exists())
