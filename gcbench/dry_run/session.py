"""One `gcbench dry-run` from checked options to the printed report: run, judge, plan what would fit, store, show."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from gcbench.core import streams
from gcbench.core.errors import GcbenchError, Interrupted, ScriptFailed, ThresholdBroken, UnavailableError
from gcbench.core.files import temporary_folder, write_text
from gcbench.core.interruption import ignore_more
from gcbench.devices import cards
from gcbench.devices.cards import Card
from gcbench.dry_run import process, step_time, verdict, view, would_fit
from gcbench.dry_run.records import DryRun, PredictedTime, WouldFit
from gcbench.emulate.environment import environment
from gcbench.report.run_folder import Store
from gcbench.report.stored_kind import DRY_RUN_NAME

TEXT_NAME = "dry-run.txt"


@dataclass(frozen=True, kw_only=True)
class DryRunOptions:
    """Options of `gcbench dry-run`.

    Attributes:
        device: a card's name.
        device_memory: bytes; None for what the card has.
        max_steps: optimizer steps after which the script ends; None for no limit.
        snapshot: file for PyTorch's memory snapshot.
        plans: whether to plan also where it fits.
    """

    device: str
    device_file: Path | None = None
    device_memory: int | None = None
    num_devices: int = 1
    max_steps: int | None = None
    snapshot: Path | None = None
    plans: bool = False


def dry_run(
    command: Sequence[str],
    options: DryRunOptions,
    *,
    out: Path | None,
    invocation: str,
    as_json: bool,
    quiet: bool,
) -> None:
    """Run the command on the emulated card, and report; raises the verdict where it is not that it fits."""
    card = cards.find_to_emulate(options.device, options.device_file, takes_file=True)
    if options.device_memory is not None:
        card = replace(card, memory_bytes=options.device_memory)
    python = process.interpreter_of(command)
    store = Store.create(out) if out is not None else None
    folder = temporary_folder()
    try:
        emulated = environment(card, num_cards=options.num_devices, python=python, ledger=folder / "ledger")
        result = _run(command, options, card, emulated, folder, store, invocation, to_stderr=as_json, quiet=quiet)
        if store is not None:
            with store.attempt():
                write_text(store.folder / DRY_RUN_NAME, view.document(result))
                write_text(store.folder / TEXT_NAME, view.text(result, width=100))
        if as_json:
            streams.print_json(view.document(result))
        else:
            view.show(result)
        if store is not None and not quiet:
            Console(stderr=True).print(
                f"Everything is in {store.folder}", markup=False, highlight=False, soft_wrap=True
            )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if store is not None:
            store.close()
    _raise(result)


def _run(
    command: Sequence[str],
    options: DryRunOptions,
    card: Card,
    emulated: dict[str, str],
    folder: Path,
    store: Store | None,
    invocation: str,
    *,
    to_stderr: bool,
    quiet: bool,
) -> DryRun:
    child = process.child_environment(
        os.environ, emulated, folder=folder, max_steps=options.max_steps, snapshot=options.snapshot
    )
    created = datetime.now(UTC).isoformat(timespec="seconds")
    ended = process.run(command, child, folder=folder, to_stderr=to_stderr)
    observed = ended.observed[0] if ended.observed else None
    judged = verdict.judge(ended, card, options.num_devices)
    wanted = judged.ending == "does not fit" or (options.plans and judged.ending == "fits")
    fitting: WouldFit | None = None
    if wanted and observed is not None:
        if not quiet:
            print("planning what would fit …", file=sys.stderr)
        fitting = would_fit.plan(
            observed.workload,
            _device_flags(options),
            emulated,
            folder=folder,
            keep=None if store is None else store.folder,
        )
    time: PredictedTime | None = None
    if judged.ending == "fits" and observed is not None:
        time = step_time.predict(observed, _device_flags(options), emulated, num_cards=options.num_devices)
    return DryRun(
        invocation=invocation,
        command=tuple(command),
        created=created,
        card=card,
        num_cards=options.num_devices,
        observed=observed,
        script_exit_code=ended.exit_code,
        verdict=judged,
        would_fit=fitting,
        time=time,
    )


def _device_flags(options: DryRunOptions) -> list[str]:
    flags = ["--device", options.device]
    if options.device_memory is not None:
        flags += ["--device-memory", f"{options.device_memory}B"]
    if options.device_file is not None:
        flags += ["--device-file", str(options.device_file)]
    return flags


def _raise(result: DryRun) -> None:
    """Raise the verdict as the error that carries its exit code; nothing where it fits."""
    judged = result.verdict
    errors: dict[str, type[GcbenchError]] = {
        "does not fit": ThresholdBroken,
        "not emulated": UnavailableError,
        "unobserved": UnavailableError,
    }
    if judged.ending == "interrupted":
        ignore_more()
        raise Interrupted(judged.sentence)
    if judged.ending == "script failed":
        raise ScriptFailed(judged.sentence, judged.exit_code)
    if judged.ending in errors:
        raise errors[judged.ending](judged.sentence)
