"""`--config FILE.toml`: which keys each command has, and what a file shared by several commands means for one."""

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
_OF_RUN_ALONE = ("warmup", "steps", "rounds")
_OF_A_TARGET = ("device_memory", "device_file", "expandable_segments")


def _all_but(*names: str) -> tuple[str, ...]:
    return tuple(name for name in _OF_ALL if name not in names)


KEYS: Mapping[str, tuple[str, ...]] = {
    "run": _OF_ALL,
    "predict": (*_all_but(*_OF_RUN_ALONE, "seed"), *_OF_A_TARGET, "reserve", "explain", "exact"),
    "plan": (*_all_but(*_OF_RUN_ALONE, "pretrained"), *_OF_A_TARGET, "reserve", "measure", "from", "emit"),
    "check": (
        *_all_but(*_OF_RUN_ALONE, "pretrained", "memory_limit", "lora_r", "lora_target_modules"),
        *("train", "no_compile", "full_size"),
    ),
}
"""Command -> the keys of its file: the long names of its options, with underscores. A new option is added here.

`memory_limit` is the memory of the device for predict and plan.
"""
_ON_THIS_MACHINE = ("run", "check")


@dataclass(frozen=True, kw_only=True)
class FileSettings:
    """What a file says for one command; nothing without a file.

    Attributes:
        values: canonical key -> value as TOML has it.
        skipped: what was left out, in sentences.
    """

    path: Path | None = None
    values: Mapping[str, object] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()

    @property
    def settings(self) -> dict[str, object]:
        """Those that are fields of `Settings`."""
        return {key: value for key, value in self.values.items() if key in _OF_ALL}

    def text(self, key: str, given: str | Path | None) -> str | None:
        """An option that takes a value: what was `given` as a flag, or else what the file says, as a flag would."""
        if given is not None:
            return str(given)
        value = self.values.get(key)
        if value is None:
            return None
        if isinstance(value, list):
            return ",".join(map(str, value))
        if isinstance(value, (bool, dict)):
            raise UsageError(f"--config: {self.path}: {key} = {value!r} is not a text; write it in quotes")
        return str(value)

    def file(self, key: str, given: Path | None) -> Path | None:
        """An option that takes a path."""
        named = self.text(key, given)
        return None if named is None else Path(named)

    def is_set(self, key: str, given: bool) -> bool:
        """An option without a value."""
        value = self.values.get(key, False)
        if not isinstance(value, bool):
            raise UsageError(f"--config: {self.path}: {key} = {value!r} is neither true nor false; write {key} = true")
        return given or value

    def tell(self, *, quiet: bool) -> None:
        """Say on standard error what was left out."""
        for sentence in () if quiet else self.skipped:
            print(sentence, file=sys.stderr)


def read(path: Path | None, command: str) -> FileSettings:
    """What the file at `path` says for `command`; raises UsageError where it cannot be read, or for an unknown key.

    A key that only other commands have is left out, so that one file serves them all; so is, where something runs on
    this machine, a device that is a card of the catalogue.
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
                f"{path}: device = {value!r} is a card to predict for; gcbench {command} runs on this machine."
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
        raise UsageError(f"--config: there is no {path}; give a TOML file") from None
    except (OSError, UnicodeDecodeError) as err:
        raise UsageError(f"--config: {path} cannot be read ({err}); check the path and its permissions") from None
    except tomllib.TOMLDecodeError as err:
        raise UsageError(f"--config: {path} is not valid TOML ({err}); mend that line") from None


def memory_of_device(given: str | None, file: FileSettings, limit: object) -> int | None:
    """Bytes that a device has by --device-memory, or else by the file, where `memory_limit` means it as well."""
    if given is not None:
        return configs.parse_memory("--device-memory", given)
    if "device_memory" in file.values:
        return configs.parse_memory("--device-memory", file.values["device_memory"])
    return configs.parse_memory("--memory-limit", limit)


def tell(file: FileSettings, raw: Mapping[str, object], *, quiet: bool) -> None:
    """Say on standard error what of a file was left out, and what of `raw` was taken in another sense."""
    file.tell(quiet=quiet)
    for sentence in () if quiet else configs.notices(raw):
        print(sentence, file=sys.stderr)
