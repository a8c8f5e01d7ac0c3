"""Checks the flags of `gcbench dry-run`, then runs the user's command."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from gcbench.core import spellings
from gcbench.core.errors import UsageError
from gcbench.core.units import parse_memory

FORM = "gcbench dry-run --device rtx-4090 -- python train.py"
_HERE = ("auto", "cuda", "cpu")
_MOST_CARDS = 8


def run(
    command: Sequence[str],
    *,
    device: str | None,
    device_memory: str | None,
    device_file: Path | None,
    num_devices: str | None,
    steps: str | None,
    snapshot: Path | None,
    plans: bool,
    out: Path | None,
    as_json: bool,
    quiet: bool,
    argv: Sequence[str],
) -> None:
    """Dry-run `command` on the named card; raises UsageError with every mistake found."""
    mistakes: list[str] = []
    if not command:
        mistakes.append(f"there is no command to run; write it after --, like: {FORM}")
    if device is None:
        mistakes.append(f"--device is missing; name the card to emulate, like: {FORM}")
    elif device.lower() in _HERE or device.lower().startswith("cuda:"):
        mistakes.append(f"--device: {device!r} is no card to emulate; name one of gcbench devices, like rtx-4090")
    memory: int | None = None
    if device_memory is not None:
        try:
            memory = parse_memory(device_memory)
        except ValueError as err:
            mistakes.append(f"--device-memory: {err}")
    max_steps = _count("--steps", steps, 1_000_000, mistakes)
    cards = _count("--num-devices", num_devices, _MOST_CARDS, mistakes)
    if snapshot is not None and not snapshot.absolute().parent.is_dir():
        mistakes.append(f"--snapshot: there is no folder {snapshot.parent}; create it or name another file")
    if mistakes:
        raise UsageError.of(mistakes)
    assert device is not None

    from gcbench.dry_run import session  # only now: a wrong value is an error before this is imported

    session.dry_run(
        command,
        session.DryRunOptions(
            device=spellings.device(device),
            device_file=device_file,
            device_memory=memory,
            num_devices=cards or 1,
            max_steps=max_steps,
            snapshot=snapshot,
            plans=plans,
        ),
        out=out,
        invocation=shlex.join(["gcbench", *argv]),
        as_json=as_json,
        quiet=quiet,
    )


def _count(flag: str, text: str | None, most: int, mistakes: list[str]) -> int | None:
    if text is None:
        return None
    if not text.strip().isdecimal() or not 1 <= int(text) <= most:
        mistakes.append(f"{flag}: {text!r} is not a whole number from 1 to {most:,}")
        return None
    return int(text)
