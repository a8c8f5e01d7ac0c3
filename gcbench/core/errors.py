"""What can go wrong in a way the user can mend, each with its exit code.

GcbenchError
├── ThresholdBroken     1   a cell crashed, nothing fits, a --fail-on threshold was broken, or a check is bad
├── UsageError          2   wrong flags, config file or output folder
├── OutputError         2   standard output that cannot be written
├── UnavailableError    3   a model or device that cannot be had
│   └── MissingLibrary  3   a package that the model's code needs is not installed
├── ResultsError        4   stored results that cannot be read
├── Interrupted       130   Ctrl-C; what was measured is kept
└── ReaderGone        141   the reader of standard output has gone; nothing is said
"""

from __future__ import annotations


class GcbenchError(Exception):
    """One sentence that says what was wrong and what to do; `cli.main` prints it and exits with `exit_code`."""

    exit_code = 1


class ThresholdBroken(GcbenchError):
    """Nothing fits, `compare --fail-on` found something worse, or a `check` is wrong or shows nothing."""

    exit_code = 1


class UsageError(GcbenchError):
    """Flags, a config file or a folder that cannot be used as given."""

    exit_code = 2

    @classmethod
    def of(cls, mistakes: list[str]) -> UsageError:
        """All mistakes found at the edge, as one error."""
        return cls(mistakes[0] if len(mistakes) == 1 else "\n".join(f"- {mistake}" for mistake in mistakes))


class OutputError(GcbenchError):
    """Standard output that is closed, or on a disk that is full."""

    exit_code = 2


class UnavailableError(GcbenchError):
    """A model or device that is not there."""

    exit_code = 3


class MissingLibrary(UnavailableError):
    """A package that the model's own code needs is not installed."""


class ResultsError(GcbenchError):
    """A stored run that cannot be read."""

    exit_code = 4


class Interrupted(GcbenchError):
    """Ctrl-C or SIGTERM."""

    exit_code = 130


class ReaderGone(GcbenchError):
    """The reader of our output has gone (`gcbench … | head`); ends as the signal for it would have ended us."""

    exit_code = 141


def first_sentence(err: BaseException) -> str:
    """What another library's error says first, with the next line where its line ends in a colon."""
    lines = [line.strip() for line in str(err).splitlines() if line.strip()] or [type(err).__name__]
    told = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return told.partition(". ")[0][:300].rstrip(".:")
