"""Checks the flags of `gcbench plan` all together, then plans by a search or from a stored run."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from gcbench.core import headroom, spellings
from gcbench.core.errors import UsageError
from gcbench.job import settings as configs
from gcbench.job import settings_file
from gcbench.job.settings_file import memory_of_device, tell
from gcbench.plan.planned import PlanOptions

T = TypeVar("T")

_OF_THE_WORKLOAD = ("precision", "optim", "attn_implementation", "layers", "set", "lora_r", "lora_target_modules")
"""Settings of the workload, which a stored run or plan has already."""
_OF_THE_TARGET = ("device", "batch_size", "memory_limit", "emulate")
"""Settings that have a meaning of their own here."""


def run(
    flags: dict[str, object],
    *,
    batch: str | None,
    reserve: str | None,
    emit: str | None,
    measure: bool,
    emulate: bool,
    from_run: Path | None,
    device_memory: str | None,
    device_file: Path | None,
    expandable_segments: bool,
    config: Path | None,
    out: Path | None,
    as_json: bool,
    quiet: bool,
    argv: Sequence[str],
) -> None:
    """Plan what `flags` describe; raises UsageError with every mistake found."""
    mistakes: list[str] = []

    def checked(parse: Callable[[], T]) -> T | None:
        try:
            return parse()
        except UsageError as err:
            mistakes.extend(line.removeprefix("- ") for line in str(err).splitlines())
        return None

    file = settings_file.read(config, "plan")
    merged = {**file.settings, **flags}
    batch = file.text("batch_size", batch)
    reserve, emit = file.text("reserve", reserve), file.text("emit", emit)
    measure = file.is_set("measure", measure)
    # For the commands that run, it names the card; here, the card is that of --device.
    emulate = emulate or isinstance(file.values.get("emulate"), str) or file.is_set("emulate", False)
    from_run = file.file("from", from_run)
    raw = {key: value for key, value in merged.items() if key not in _OF_THE_TARGET}
    if from_run is not None:
        raw.setdefault("model", "of the run")
    # Where the search chooses the batch sizes, the settings are checked with a batch of one.
    has_batch = batch is not None and batch.strip().lower() != "auto"
    settings = checked(lambda: configs.settings({**raw, "batch_size": batch if has_batch else "1"}))
    memory = checked(lambda: memory_of_device(device_memory, file, merged.get("memory_limit")))
    held_back = checked(lambda: headroom.parse_reserve(reserve))
    tool = checked(lambda: _tool(emit))
    if settings is not None and settings.seq_len is not None and len(settings.seq_len) > 1:
        mistakes.append(f"--seq-len: a plan is for one length, not {len(settings.seq_len)}; pass one")
    if from_run is not None and measure:
        mistakes.append("--measure: a stored run was measured already; leave out --measure, or --from")
    if from_run is not None and emulate:
        mistakes.append("--emulate: a stored run or plan is taken as it is; leave out --emulate, or --from")
    if measure and emulate:
        mistakes.append("--emulate: --measure runs the candidates on this machine's own device; leave out one of them")
    if from_run is not None:
        mistakes += [
            f"--{name.replace('_', '-')}: a stored run or plan has its own; leave it out, or leave out --from"
            for name in _OF_THE_WORKLOAD
            if name in raw
        ]
    if mistakes:
        raise UsageError.of(list(dict.fromkeys(mistakes)))
    assert settings is not None
    device = merged.get("device")
    tell(file, raw, quiet=quiet)

    from gcbench.devices.target import TargetOptions
    from gcbench.plan import session as plan_session  # only now: a wrong value is an error before this is imported

    options = PlanOptions(
        batch_sizes=tuple(sorted(settings.batch_size)) if has_batch else None,
        reserve_frac=held_back,
        emit=tool,
        measure=measure,
        emulate=emulate,
    )
    target_options = TargetOptions(
        device=None if device is None else spellings.device(str(device)),
        device_memory=memory,
        device_file=file.file("device_file", device_file),
        expandable_segments=file.is_set("expandable_segments", expandable_segments),
    )
    command = shlex.join(["gcbench", *argv])
    if from_run is not None:
        plan_session.plan_from_stored(
            from_run, settings, target_options, options, out=out, command=command, as_json=as_json, quiet=quiet
        )
        return
    plan_session.plan(settings, target_options, options, out=out, command=command, as_json=as_json, quiet=quiet)


def _tool(name: str | None) -> str | None:
    if name is None:
        return None
    from gcbench import export

    plain = name.strip().lower().replace("_", "-")
    if plain in export.names():
        return plain
    near = difflib.get_close_matches(plain, export.names(), n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UsageError(f"--emit: there is no target {name!r}; {hint}legal are {', '.join(export.names())}")
