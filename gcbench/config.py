"""Settings of a run: from flags and TOML, checked once, all mistakes together."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from gcbench import optimizers, strategies
from gcbench.errors import UnavailableError, UsageError
from gcbench.records import ALL_LINEAR, Json, Lora
from gcbench.units import parse_bytes

PRECISION_NAMES = ("fp32", "bf16", "bf16-mixed", "fp16-mixed")
DEFAULT_STRATEGIES = ("off", "per-layer", "every:2", "every:4")
MAX_BATCH_SIZE = 1_000_000
MAX_SEQ_LEN = 2**24
MAX_LORA_R = 2**16


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the user asked for; None where the default depends on the model or the device.

    The field names are the TOML keys and, with hyphens, the long flags.
    """

    model: str
    batch_size: tuple[int, ...]
    seq_len: tuple[int, ...] | None = None
    strategies: tuple[str, ...] | None = None
    precision: str = "fp32"
    optim: str = "adamw_torch"
    attn_implementation: str | None = None
    device: str = "auto"
    warmup: int | None = None
    steps: int | None = None
    rounds: int = 3
    seed: int = 0
    layers: int | None = None
    set: dict[str, Json] | None = None
    pretrained: bool = False
    trust_remote_code: bool = False
    memory_limit: int | None = None
    """Bytes."""
    timeout: float | None = 3600.0
    """Seconds for one child process; None for no limit."""
    lora_r: int | None = None
    lora_target_modules: tuple[str, ...] | None = None

    @property
    def lora(self) -> Lora | None:
        """The adapters to train; None to train all parameters."""
        return None if self.lora_r is None else Lora(r=self.lora_r, target_modules=self.lora_target_modules)


ALIASES = {
    "batch": "batch_size",
    "sequence_length": "seq_len",
    "strategy": "strategies",
    "optimizer": "optim",
    "attention_implementation": "attn_implementation",
    "warmup_steps": "warmup",
    "num_layers": "layers",
}
"""Second spellings, for flags and TOML keys alike."""


def settings(given: Mapping[str, object]) -> Settings:
    """Check and convert raw values (text from flags, native values from TOML); None means not given.

    Raises UsageError with every mistake found.
    """
    mistakes: list[str] = []
    values: dict[str, Any] = {}
    for raw_key, raw in given.items():
        if raw is None:
            continue
        key = canonical(raw_key)
        if key not in _PARSERS:
            near = difflib.get_close_matches(key, [*_PARSERS, *ALIASES], n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            mistakes.append(f"there is no setting {raw_key!r}; {hint}legal are {', '.join(sorted(_PARSERS))}")
            continue
        try:
            values[key] = _PARSERS[key](raw)
        except ValueError as err:
            mistakes.append(f"{_flag(key)}: {err}")
    for key, example in (("model", "gpt2"), ("batch_size", "16")):
        if key not in values and not any(m.startswith(_flag(key)) for m in mistakes):
            mistakes.append(f"{_flag(key)} is missing; write it like {_flag(key)} {example}")
    if (
        "lora_target_modules" in values
        and "lora_r" not in values
        and not any(m.startswith("--lora-r") for m in mistakes)
    ):
        mistakes.append("--lora-target-modules needs the rank of the adapters too; write it like --lora-r 8")
    if mistakes:
        raise UsageError.of(mistakes)
    return Settings(**values)


def read_toml(path: Path) -> dict[str, object]:
    """The raw settings in a TOML file, under their canonical names; raises UsageError when it cannot be read."""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"--config: there is no {path}; give a TOML file") from None
    except (OSError, UnicodeDecodeError) as err:
        raise UsageError(f"--config: {path} cannot be read ({err}); check the path and its permissions") from None
    except tomllib.TOMLDecodeError as err:
        raise UsageError(f"--config: {path} is not valid TOML ({err}); mend that line") from None
    return {canonical(key): value for key, value in raw.items()}


def canonical(key: str) -> str:
    """The one name of a setting for any of its spellings."""
    plain = key.replace("-", "_")
    return ALIASES.get(plain, plain)


def parse_device(name: str) -> str:
    """A device's name, checked; raises UsageError."""
    try:
        return _device(name)
    except ValueError as err:
        raise UsageError(f"--device: {err}") from None


def parse_memory(flag: str, raw: object) -> int | None:
    """An amount of memory in bytes, None where none is given; raises UsageError."""
    if raw is None:
        return None
    try:
        return _bytes(raw)
    except ValueError as err:
        raise UsageError(f"{flag}: {err}") from None


def optimizer_names() -> tuple[str, ...]:
    """Those that --optim takes."""
    return tuple(optimizers.names())


def several(flag: str, raw: str | None, legal: tuple[str, ...] | None = None) -> tuple[str, ...] | None:
    """The names in `a,b`, each one of `legal` where that is given; None where nothing is given; raises UsageError."""
    if raw is None:
        return None
    parse = _text if legal is None else _one_of(legal)
    try:
        return tuple(dict.fromkeys(parse(item) for item in _listed(raw)))
    except ValueError as err:
        raise UsageError(f"{flag}: {err}") from None


def as_json(resolved: Settings) -> dict[str, Json]:
    """The settings as a report stores them; `settings(as_json(s)) == s`."""
    stored: dict[str, Json] = {}
    for field in fields(resolved):
        value = getattr(resolved, field.name)
        stored[field.name] = list(value) if isinstance(value, tuple) else value
    if resolved.timeout is None:
        stored["timeout"] = "none"
    return stored


def _flag(key: str) -> str:
    return "--" + {"batch_size": "batch"}.get(key, key).replace("_", "-")


def _listed(raw: object) -> list[object]:
    """The items of `1,2,4`, of a TOML list, or of one value."""
    if isinstance(raw, (list, tuple)):
        items: list[object] = list(raw)
    elif isinstance(raw, str):
        items = [part.strip() for part in raw.split(",")]
    else:
        items = [raw]
    if not items or any(item == "" for item in items):
        raise ValueError(f"{raw!r} has an empty item; write a list like 1,2,4")
    return items


def _whole(raw: object, *, at_least: int, at_most: int | None = None) -> int:
    text = str(raw).strip()
    if isinstance(raw, (bool, float)) or not text.removeprefix("-").isdecimal():
        raise ValueError(f"{raw!r} is not a whole number; write one of {at_least} or more")
    number = int(text)
    if number < at_least:
        raise ValueError(f"{number} is too small; it must be {at_least} or more")
    if at_most is not None and number > at_most:
        raise ValueError(f"{number} is absurd; it must be {at_most:,} or less")
    return number


def _count(at_least: int, at_most: int | None = None) -> Callable[[object], int]:
    return lambda raw: _whole(raw, at_least=at_least, at_most=at_most)


def _counts(at_least: int, at_most: int) -> Callable[[object], tuple[int, ...]]:
    def parse(raw: object) -> tuple[int, ...]:
        return tuple(dict.fromkeys(_whole(item, at_least=at_least, at_most=at_most) for item in _listed(raw)))

    return parse


def _text(raw: object) -> str:
    if not isinstance(raw, str) or not raw.strip():
        raise ValueError(f"{raw!r} is not a name; write it as text")
    return raw.strip()


def _one_of(legal: tuple[str, ...]) -> Callable[[object], str]:
    def parse(raw: object) -> str:
        by_plain = {name.replace("_", "-"): name for name in legal}
        found = by_plain.get(_text(raw).lower().replace("_", "-"))
        if found is None:
            near = difflib.get_close_matches(str(raw), legal, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ValueError(f"{raw!r} is unknown; {hint}legal are {', '.join(legal)}")
        return found

    return parse


def _strategies(raw: object) -> tuple[str, ...]:
    specs: dict[str, None] = {}
    mistakes: list[str] = []
    for item in _listed(raw):
        try:
            specs[strategies.parse(str(item)).spec] = None
        except ValueError as err:
            mistakes.append(str(err))
    if mistakes:
        raise ValueError("; ".join(mistakes))
    return tuple(specs)


def _modules(raw: object) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(_text(item) for item in _listed(raw)))
    if not any(name.lower().replace("_", "-") == ALL_LINEAR for name in names):
        return names
    if len(names) > 1:
        raise ValueError(f"{ALL_LINEAR} stands for every linear layer; leave out the other names, or it")
    return (ALL_LINEAR,)


def _device(raw: object) -> str:
    name = _text(raw).lower()
    kind, colon, index = name.partition(":")
    if name in ("auto", "cpu", "cuda") or (kind == "cuda" and colon and index.isdecimal()):
        return name
    from gcbench import cards  # what no legal name needs

    try:
        card = cards.find(name).name
    except UnavailableError:
        raise ValueError(f"{raw!r} is unknown; legal are auto, cpu, cuda and cuda:N") from None
    raise ValueError(
        f"{raw!r} is a card to predict for, and this command runs on this machine; gcbench predict --device {card} and "
        f"gcbench plan --device {card} tell what that card would do, and legal here are auto, cpu, cuda and cuda:N"
    )


def _yes_no(raw: object) -> bool:
    if isinstance(raw, bool):
        return raw
    raise ValueError(f"{raw!r} is neither true nor false")


def _bytes(raw: object) -> int:
    count = raw if isinstance(raw, int) and not isinstance(raw, bool) else parse_bytes(_text(raw))
    if count <= 0:
        raise ValueError(f"{raw!r} leaves no memory at all; write it like 8GiB")
    return count


def _seconds(raw: object) -> float | None:
    if raw == "none":
        return None
    try:
        seconds = float(str(raw).strip().removesuffix("s"))
    except ValueError:
        seconds = 0.0
    if isinstance(raw, bool) or not 0 < seconds < float("inf"):
        raise ValueError(f"{raw!r} is not a time; write seconds, like 600, or none for no limit")
    return seconds


def _overrides(raw: object) -> dict[str, Json]:
    if isinstance(raw, dict):
        return raw
    changes: dict[str, Json] = {}
    for item in raw if isinstance(raw, (list, tuple)) else [raw]:
        name, equals, value = str(item).partition("=")
        if not equals or not name.strip():
            raise ValueError(f"{item!r} is not key=value; write it like hidden_size=512")
        changes[name.strip()] = _literal(value.strip())
    return changes


def _literal(text: str) -> Json:
    """A TOML value (numbers, true, lists, quoted text); anything else is text. `null` is None."""
    if text in ("null", "None"):
        return None
    spelled = {"True": "true", "False": "false"}.get(text, text)
    try:
        value: Json = tomllib.loads(f"value = {spelled}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    return value


_PARSERS: dict[str, Callable[[object], object]] = {
    "model": _text,
    "batch_size": _counts(1, MAX_BATCH_SIZE),
    "seq_len": _counts(2, MAX_SEQ_LEN),
    "strategies": _strategies,
    "precision": _one_of(PRECISION_NAMES),
    "optim": _one_of(optimizers.names()),
    "attn_implementation": _text,
    "device": _device,
    "warmup": _count(1, 1000),
    "steps": _count(1, 100_000),
    "rounds": _count(1, 1000),
    "seed": _count(0, 2**31 - 1),
    "layers": _count(1, 10_000),
    "set": _overrides,
    "pretrained": _yes_no,
    "trust_remote_code": _yes_no,
    "memory_limit": _bytes,
    "timeout": _seconds,
    "lora_r": _count(1, MAX_LORA_R),
    "lora_target_modules": _modules,
}
