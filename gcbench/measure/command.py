"""Turns the flags and the file of `gcbench run` into settings, and runs it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from gcbench.core import snapshot_files
from gcbench.core.errors import UsageError
from gcbench.core.records import Report
from gcbench.job import settings as configs
from gcbench.job import settings_file
from gcbench.job.settings_file import tell
from gcbench.report import report_file as reports


def run(
    flags: dict[str, object],
    *,
    config: Path | None,
    out: Path | None,
    resume: bool,
    snapshot: Path | None,
    as_json: bool,
    quiet: bool,
    argv: Sequence[str],
) -> None:
    """Measure every cell of the settings that flags, file and a resumed run make up, and show the report."""
    previous: Report | None = None
    if resume and snapshot is not None:
        raise UsageError("--snapshot cannot be added to a stored run, whose steps are not repeated; leave out --resume")
    if resume:
        if out is None:
            raise UsageError("--resume needs the folder of the run to finish; add --out DIR")
        previous = reports.reopen(out)
    file = settings_file.read(config, "run")
    raw = configs.merged(previous.settings if previous else {}, file.settings, flags)
    settings = configs.settings(raw)
    if settings.emulate is not None:
        _refuse_timing(flags)
    tell(file, raw, quiet=quiet)
    snapshot = snapshot_files.check(snapshot)
    from gcbench.measure import session  # only now: a wrong value is reported before anything else is imported

    session.measure(
        settings,
        out=out,
        previous=previous,
        snapshot=snapshot,
        command=shlex.join(["gcbench", *argv]),
        as_json=as_json,
        quiet=quiet,
    )


def _refuse_timing(flags: Mapping[str, object]) -> None:
    """Raise UsageError for flags about timed steps, of which an emulated card has none."""
    passed = [
        f"--{name.replace('_', '-')}" for name in ("steps", "rounds", "target_interval", "max_time") if name in flags
    ]
    if passed:
        raise UsageError(
            f"{' and '.join(passed)}: an emulated card has no times, so there is one round without timed steps; leave "
            f"{'it' if len(passed) == 1 else 'them'} out, or --emulate"
        )
