"""The run folder: made once, saved after every result, and nothing lost when it cannot be written."""

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
"""In a folder that is being written to. What a killed process leaves of it locks nothing."""
_TRIES = 5


class Store:
    """Where a run's report and gradient fingerprints go, and what keeps other processes out of it.

    A context manager: an error inside takes a folder away again that was made for nothing. A write that fails while
    cells are measured is told once and tried again with the next result; `close` puts what could not be written into
    the system's temporary folder.
    """

    def __init__(self, folder: Path, *, made: bool = False, lock: BaseFileLock | None = None) -> None:
        self.folder = folder
        self._made = made
        self._lock = lock
        self._failed: OSError | None = None
        self._unwritten: Report | None = None
        self._incomplete = False
        self._told = False
        self._gradients: dict[str, str] = {}

    @classmethod
    def create(cls, folder: Path, *, can_resume: bool = False) -> Store:
        """A new folder of results; raises UsageError when it holds something already, is in use or cannot be written.

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
                advice = "add --resume to continue it, or take another --out" if begun else "take another --out"
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
        """A new folder of its own for what began at `created`: see `default_folder`; raises UsageError."""
        while True:
            folder = default_folder(slug, created)
            try:
                folder.parent.mkdir(parents=True, exist_ok=True)
                folder.mkdir()
            except OSError as err:
                if isinstance(err, FileExistsError) and folder.is_dir():
                    continue  # another process was faster
                raise _unwritable(folder, err) from None
            store = cls.create(folder)
            store._made = True
            return store

    @classmethod
    def reopen(cls, folder: Path) -> Store:
        """The folder of a run to continue; raises UsageError when another process writes to it."""
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
        """Let other processes have the folder, and leave no trace of having kept them out."""
        if self._lock is None:
            return
        with suppress(OSError):
            Path(self._lock.lock_file).unlink(missing_ok=True)
        with suppress(OSError):
            self._lock.release()
        self._lock = None

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
                f"warning: {self.folder} cannot be written ({err.strerror}); it goes on, and saving is tried "
                "again after each result",
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

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """A block that writes files that are no report; a failure is told by `close`, after all has been shown."""
        try:
            yield
        except OSError as err:
            self._failed = err

    def discard_if_empty(self) -> None:
        """Take the folder away again, if this run made it and ended before it had a report."""
        if self._made and not (self.folder / REPORT_NAME).exists():
            with suppress(OSError):
                self.folder.rmdir()

    def close(self) -> None:
        """Try the last save again.

        Raises GcbenchError naming the other place when the folder stays unwritable, and when something that belongs
        beside the report is missing from it.
        """
        if self._failed is not None:
            raise GcbenchError(
                f"{self.folder} could not be written ({self._failed.strerror}), so what is above is all there is; copy "
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
                "the table above is all there is: copy it"
            ) from None
        raise GcbenchError(
            f"the results could not be written to {self.folder}; they are in {other}: move them once there is room"
        )


def _unwritable(folder: Path, err: OSError) -> UsageError:
    return UsageError(f"--out {folder} cannot be written ({err.strerror}); take another --out")


def _locked(folder: Path) -> BaseFileLock | None:
    """The folder's lock, taken; None where its file system has none. Raises UsageError when another process holds it.

    The operating system gives it back when its holder ends, however that happens.
    """
    from filelock import FileLock, Timeout  # only now: most commands write to no folder

    for _ in range(_TRIES):
        lock = FileLock(folder / LOCK_NAME, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise UsageError(
                f"--out {folder} is being written to by another gcbench; wait for its end, or take another --out"
            ) from None
        except (OSError, NotImplementedError):
            return None
        if Path(lock.lock_file).exists():
            return lock
        lock.release()  # the holder took its file away as it ended, and this was still that one
    return None


def default_folder(model_slug: str, created: str) -> Path:
    """`results/MODEL-DATE-TIME` below the current folder, with a number behind it when that is taken."""
    stamp = created[:19].replace("-", "").replace(":", "").replace("T", "-")
    first = Path("results") / f"{model_slug}-{stamp}"
    others = (first.with_name(f"{first.name}-{number}") for number in itertools.count(2))
    return next(folder for folder in itertools.chain([first], others) if not folder.exists())
