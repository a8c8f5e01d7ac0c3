"""Runs the user's command in an emulated environment, with the observer in each of its Python processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from gcbench.core.errors import UsageError
from gcbench.core.json_codec import decode
from gcbench.dry_run.observer import SETTINGS_VARIABLE
from gcbench.dry_run.records import Observed

STARTUP_FOLDER = Path(__file__).parent / "observer" / "startup"
_ENDS_BY_ITSELF_S = 5.0


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How the command ended.

    Attributes:
        exit_code: negative for a signal.
        stacks: Python stacks of processes that a signal ended.
    """

    exit_code: int
    was_interrupted: bool
    observed: tuple[Observed, ...]
    stacks: str


def child_environment(
    base: Mapping[str, str], emulated: Mapping[str, str], *, folder: Path, max_steps: int | None, snapshot: Path | None
) -> dict[str, str]:
    """Return the environment of the command: this process's own, the emulated card and the observer.

    Args:
        folder: private folder to which the observer writes.
    """
    settings = {
        "folder": str(folder),
        "steps": max_steps,
        "snapshot": None if snapshot is None else str(snapshot.absolute()),
    }
    python_path = [str(STARTUP_FOLDER), *([base["PYTHONPATH"]] if base.get("PYTHONPATH") else [])]
    return {
        **base,
        **emulated,
        SETTINGS_VARIABLE: json.dumps(settings),
        "PYTHONPATH": os.pathsep.join(python_path),
    }


def interpreter_of(command: Sequence[str]) -> Path:
    """Return the Python that a command runs: itself, that of a script's first line, else this one.

    Raises UsageError where there is no such program.
    """
    found = shutil.which(command[0])
    if found is None:
        raise UsageError(
            f"there is no program {command[0]!r}; write the command as in a shell, like: -- python train.py"
        )
    if Path(found).name.startswith("python"):
        return Path(found)
    try:
        with Path(found).open("rb") as file:
            words = file.readline(512).decode(errors="replace").removeprefix("#!").split()
    except OSError:
        words = []
    named = [word for word in words if Path(word).name.startswith("python")]
    script_python = shutil.which(named[0]) if named else None
    return Path(script_python or sys.executable)


def run(command: Sequence[str], environment: Mapping[str, str], *, folder: Path, to_stderr: bool) -> Ended:
    """Run the command to its end, with this terminal's input and output.

    Args:
        to_stderr: whether the command's standard output goes to standard error, as this one's is a document.

    Raises UsageError where the program cannot be run.
    """
    sys.stdout.flush()
    try:
        process = subprocess.Popen(
            list(command), env=dict(environment), stdout=sys.stderr.fileno() if to_stderr else None
        )
    except OSError as err:
        raise UsageError(f"{command[0]!r} cannot be run ({err.strerror}); write it as in a shell") from None
    was_interrupted = False
    try:
        process.wait()
    except KeyboardInterrupt:  # a terminal has sent it to the command as well
        was_interrupted = True
        _end(process)
    return Ended(
        exit_code=process.returncode,
        was_interrupted=was_interrupted,
        observed=_observed(folder),
        stacks="\n".join(path.read_text("utf-8", errors="replace") for path in sorted(folder.glob("stack-*.txt"))),
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    """Wait for an interrupted command, and end one that does not end by itself."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        if not sys.stdin.isatty():  # then nobody else has sent it
            process.send_signal(signal.SIGINT)
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(subprocess.TimeoutExpired):
                process.wait(_ENDS_BY_ITSELF_S)
                return
            process.send_signal(number)
        process.wait()
    finally:
        signal.signal(signal.SIGINT, before)


def _observed(folder: Path) -> tuple[Observed, ...]:
    """Read what the processes reported, the one that trained first."""
    found = [
        decode(Observed, json.loads(path.read_text(encoding="utf-8")))
        for path in sorted(folder.glob("observed-*.json"))
    ]
    found = [each for each in found if each.torch is not None]
    return tuple(sorted(found, key=_activity, reverse=True))


def _activity(observed: Observed) -> tuple[bool, int, int, int]:
    return (
        observed.failure is not None and observed.failure.is_out_of_memory,
        observed.num_steps,
        observed.num_out_of_memory,
        observed.peak_reserved_bytes,
    )
