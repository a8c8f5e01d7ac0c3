"""Errors that the user can fix, each with its exit code.

GcbenchError
├── ThresholdBroken     1   a cell crashed, nothing fits, a --fail-on threshold was exceeded, or a check failed
├── ScriptFailed        *   the script of a dry run failed by itself; its own exit code is passed on
├── UsageError          2   wrong flags, config file or output folder
├── OutputError         2   standard output cannot be written
├── UnavailableError    3   a model or device is unavailable
│   └── MissingLibrary  3   a package that the model's code needs is not installed
├── ResultsError        4   stored results cannot be read
├── Interrupted       130   Ctrl-C; measured results are stored
└── ReaderGone        141   the reader of standard output has closed it; no message
"""

from __future__ import annotations


class GcbenchError(Exception):
    """One sentence with what was wrong and what to do; `cli.main` prints it and exits with `exit_code`."""

    exit_code = 1


class ThresholdBroken(GcbenchError):
    """Nothing fits, `compare --fail-on` found a regression, or a `check` failed or proved nothing."""

    exit_code = 1


class ScriptFailed(GcbenchError):
    """The script of a dry run failed by itself; `exit_code` is its own."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class UsageError(GcbenchError):
    """Flags, a config file or a folder are invalid."""

    exit_code = 2

    @classmethod
    def of(cls, mistakes: list[str]) -> UsageError:
        """Return one error that lists all mistakes."""
        return cls(mistakes[0] if len(mistakes) == 1 else "\n".join(f"- {mistake}" for mistake in mistakes))


class OutputError(GcbenchError):
    """Standard output is closed, or its disk is full."""

    exit_code = 2


class UnavailableError(GcbenchError):
    """A model or device is unavailable."""

    exit_code = 3


class MissingLibrary(UnavailableError):
    """A package that the model's own code needs is not installed."""


class ResultsError(GcbenchError):
    """A stored run cannot be read."""

    exit_code = 4


class Interrupted(GcbenchError):
    """The user or the system stopped the command (Ctrl-C, SIGTERM)."""

    exit_code = 130


class ReaderGone(GcbenchError):
    """The reader has closed our output (`gcbench … | head`); the exit code is that of SIGPIPE."""

    exit_code = 141


def first_sentence(err: BaseException) -> str:
    """Return the first sentence of another library's error, with the next line if the first one ends in a colon."""
    lines = [line.strip() for line in str(err).splitlines() if line.strip()] or [type(err).__name__]
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return text.partition(". ")[0][:300].rstrip(".:")
