"""Reads `--config FILE.toml`: the keys of each command, from a file that several commands may share."""

from __future__ import annotations

import difflib
import sys
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

from gcbench.core.errors import UsageError
from gcbench.devices import cards
from gcbench.job import settings as configs
from gcbench.job.settings import Settings, canonical

_OF_ALL = tuple(f.name for f in fields(Settings))
_OF_RUN_ALONE = ("warmup", "steps", "rounds", "target_interval", "max_time")
_OF_A_TARGET = ("device_memory", "device_file", "expandable_segments")


def _all_but(*names: str) -> tuple[str, ...]:
    return tuple(name for name in _OF_ALL if name not in names)


KEYS: Mapping[str, tuple[str, ...]] = {
    "run": _OF_ALL,
    "predict": (*_all_but(*_OF_RUN_ALONE, "seed", "emulate"), *_OF_A_TARGET, "reserve", "explain", "exact"),
    "plan": (*_all_but(*_OF_RUN_ALONE, "pretrained"), *_OF_A_TARGET, "reserve", "measure", "from", "emit"),
    "check": (
        *_all_but(*_OF_RUN_ALONE, "pretrained", "memory_limit", "lora_r", "lora_target_modules"),
        *("train", "no_compile", "full_size"),
    ),
}
"""Command -> the keys of its file: the long names of its options, with underscores. Add a new option here.

For predict and plan, `memory_limit` is the memory of the device.
"""
_ON_THIS_MACHINE = ("run", "check")


@dataclass(frozen=True, kw_only=True)
class FileSettings:
    """The settings of a file for one command; empty without a file.

    Attributes:
        values: canonical key -> value as parsed from TOML.
        skipped: which settings are ignored and why, in sentences.
    """

    path: Path | None = None
    values: Mapping[str, object] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()

    @property
    def settings(self) -> dict[str, object]:
        """The values that are fields of `Settings`."""
        return {key: value for key, value in self.values.items() if key in _OF_ALL}

    def text(self, key: str, flag: str | Path | None) -> str | None:
        """Return an option with a value as text: the flag's value, else the file's in the form that the flag takes."""
        if flag is not None:
            return str(flag)
        value = self.values.get(key)
        if value is None:
            return None
        if isinstance(value, list):
            return ",".join(map(str, value))
        if isinstance(value, (bool, dict)):
            raise UsageError(f"--config: {self.path}: {key} = {value!r} is not text; write it in quotes")
        return str(value)

    def file(self, key: str, flag: Path | None) -> Path | None:
        """Return an option with a path."""
        name = self.text(key, flag)
        return None if name is None else Path(name)

    def is_set(self, key: str, flag: bool) -> bool:
        """Return whether an option without a value is set, by its flag or in the file."""
        value = self.values.get(key, False)
        if not isinstance(value, bool):
            raise UsageError(f"--config: {self.path}: {key} = {value!r} is neither true nor false; write {key} = true")
        return flag or value

    def tell(self, *, quiet: bool) -> None:
        """Print on standard error which settings are ignored."""
        for sentence in () if quiet else self.skipped:
            print(sentence, file=sys.stderr)


def read(path: Path | None, command: str) -> FileSettings:
    """Read the settings of a file for `command`; raises UsageError where it cannot be read, or for an unknown key.

    A key that only other commands have is ignored, so that one file works for all of them. Commands that run on this
    machine also ignore a device that is a card of the catalogue.
    """
    if path is None:
        return FileSettings()
    values: dict[str, object] = {}
    others: dict[str, None] = {}
    unknown: list[str] = []
    skipped: list[str] = []
    for raw_key, value in _toml(path).items():
        key = canonical(raw_key)
        if key not in {name for names in KEYS.values() for name in names}:
            unknown.append(f"--config: {path}: there is no setting {raw_key!r}; {_instead(key, command)}")
        elif key in values:
            unknown.append(f"--config: {path}: {raw_key} sets {key} a second time; keep one of them")
        elif key not in KEYS[command]:
            others[key] = None
        elif key == "device" and command in _ON_THIS_MACHINE and isinstance(value, str) and cards.known(value):
            skipped.append(
                f"{path}: device = {value!r} is a card to predict for; gcbench {command} ignores it and runs on this "
                "machine."
            )
        else:
            values[key] = value
    if unknown:
        raise UsageError.of(unknown)
    if others:
        skipped.append(f"{path}: gcbench {command} has no {_listed(others)}; left out.")
    return FileSettings(path=path, values=values, skipped=tuple(skipped))


def _instead(key: str, command: str) -> str:
    near = difflib.get_close_matches(key, KEYS[command], n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"{hint}legal are {', '.join(sorted(KEYS[command]))}"


def _listed(names: Iterable[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last


def _toml(path: Path) -> dict[str, object]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"--config: there is no {path}; pass the path of a TOML file") from None
    except (OSError, UnicodeDecodeError) as err:
        raise UsageError(f"--config: {path} cannot be read ({err}); check the path and its permissions") from None
    except tomllib.TOMLDecodeError as err:
        raise UsageError(f"--config: {path} is not valid TOML ({err}); fix that line") from None


def memory_of_device(flag: str | None, file: FileSettings, limit: object) -> int | None:
    """Return a device's memory in bytes: --device-memory, else the file's `device_memory`, else `limit`."""
    if flag is not None:
        return configs.parse_memory("--device-memory", flag)
    if "device_memory" in file.values:
        return configs.parse_memory("--device-memory", file.values["device_memory"])
    return configs.parse_memory("--memory-limit", limit)


def tell(file: FileSettings, raw: Mapping[str, object], *, quiet: bool) -> None:
    """Print on standard error which settings of a file are ignored, and how ambiguous ones of `raw` are read."""
    file.tell(quiet=quiet)
    for sentence in () if quiet else configs.notices(raw):
        print(sentence, file=sys.stderr)
