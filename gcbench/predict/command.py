"""Runs `gcbench predict`: checks flags and settings file, then predicts."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from gcbench.core import snapshot_files, spellings
from gcbench.core.errors import UsageError
from gcbench.job import settings as configs
from gcbench.job import settings_file
from gcbench.job.settings_file import memory_of_device, tell


def run(
    flags: dict[str, object],
    *,
    device_memory: str | None,
    device_file: Path | None,
    reserve: str | None,
    expandable_segments: bool,
    explain: bool,
    exact: bool,
    config: Path | None,
    out: Path | None,
    snapshot: Path | None,
    as_json: bool,
    quiet: bool,
    argv: Sequence[str],
) -> None:
    """Predict what `flags` and the settings file describe; raises UsageError for wrong values."""
    from gcbench.core.headroom import parse_reserve
    from gcbench.devices.target import TargetOptions

    file = settings_file.read(config, "predict")
    raw = {**file.settings, **flags}
    # The device may be a card of the catalogue; its memory and segments are settings of predictions alone.
    device = raw.pop("device", None)
    memory = memory_of_device(device_memory, file, raw.pop("memory_limit", None))
    if device is not None and not isinstance(device, str):
        raise UsageError(f"--device: {device!r} is not a name; write it as text")
    settings = configs.settings(raw)
    target_options = TargetOptions(
        device=None if device is None else spellings.device(device),
        device_memory=memory,
        device_file=file.file("device_file", device_file),
        expandable_segments=file.is_set("expandable_segments", expandable_segments),
        explain=file.is_set("explain", explain),
        exact=file.is_set("exact", exact),
        reserve_frac=parse_reserve(file.text("reserve", reserve)),
    )
    tell(file, raw, quiet=quiet)
    snapshot = snapshot_files.check(snapshot)
    from gcbench.predict import session as forecast  # lazily: a wrong value is reported before heavy imports

    forecast.predict(
        settings,
        target_options,
        out=out,
        snapshot=snapshot,
        command=shlex.join(["gcbench", *argv]),
        as_json=as_json,
        quiet=quiet,
    )
