"""What `gcbench predict` does with its flags."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from gcbench.core import spellings
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
    as_json: bool,
    quiet: bool,
    argv: Sequence[str],
) -> None:
    """Settings, cells, predictions, report: what `flags` and the file say would take on the device they name."""
    from gcbench.core.headroom import parse_reserve
    from gcbench.devices.target import TargetOptions

    file = settings_file.read(config, "predict")
    raw = {**file.settings, **flags}
    # A card's name is no device of this machine; memory and segments are settings of a prediction alone.
    device = raw.pop("device", None)
    memory = memory_of_device(device_memory, file, raw.pop("memory_limit", None))
    if device is not None and not isinstance(device, str):
        raise UsageError(f"--device: {device!r} is not a name; write it as text")
    wanted = configs.settings(raw)
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
    from gcbench.predict import session as forecast  # only now: a wrong value is told before anything else is imported

    forecast.predict(
        wanted, target_options, out=out, command=shlex.join(["gcbench", *argv]), as_json=as_json, quiet=quiet
    )
