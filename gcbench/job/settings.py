"""Parses the settings of a run from flags and TOML; all mistakes are reported together."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from gcbench.core import spellings, units
from gcbench.core.errors import UnavailableError, UsageError
from gcbench.core.records import Json, Lora
from gcbench.job import parsers
from gcbench.job.parsers import PRECISION_NAMES as PRECISION_NAMES
from gcbench.job.parsers import attention as attention
from gcbench.job.parsers import one_of as one_of
from gcbench.job.parsers import optimizer as optimizer
from gcbench.job.parsers import precision as precision

DEFAULT_STRATEGIES = ("off", "per-layer", "every:2", "every:4")
MAX_BATCH_SIZE = 1_000_000
MAX_SEQ_LEN = 2**24
MAX_LORA_R = 2**16
DEFAULT_TARGET_POINTS, DEFAULT_MAX_S = 5.0, 165.0
"""With time for start-up and plots, the default job on two cores ends within three minutes."""
EMULATED_DEVICE = "cuda:0"
"""The name that torch has for an emulated card."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The user's settings; None where the default depends on the model or the device.

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
    emulate: str | None = None
    """The card to emulate, by its name in the catalogue; `device` is then "cuda:0"."""
    warmup: int | None = None
    steps: int | None = None
    rounds: int | None = None
    """Turns of each cell; None to go on until `target_interval` is reached, or `max_time`."""
    target_interval: float | None = DEFAULT_TARGET_POINTS
    """Half-width of the 95 % interval of each overhead, in percentage points; None to use all of `max_time`."""
    max_time: float | None = DEFAULT_MAX_S
    """Seconds for each batch size and sequence length, set-up included; None for no limit."""
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
"""Other spelling -> name, of flags and TOML keys."""


def settings(raw_values: Mapping[str, object]) -> Settings:
    """Check and convert raw values (text from flags, native values from TOML); None means not set.

    Raises UsageError with every mistake found, else UnavailableError for a card that cannot be emulated.
    """
    mistakes: list[str] = []
    unavailable: UnavailableError | None = None
    values: dict[str, Any] = {}
    for raw_key, raw in raw_values.items():
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
        except UnavailableError as err:
            unavailable = err
    for key, example in (("model", "gpt2"), ("batch_size", "16")):
        if key not in values and not any(m.startswith(_flag(key)) for m in mistakes):
            mistakes.append(f"{_flag(key)} is missing; write it like {_flag(key)} {example}")
    if (
        "lora_target_modules" in values
        and "lora_r" not in values
        and not any(m.startswith("--lora-r") for m in mistakes)
    ):
        mistakes.append("--lora-target-modules also needs the rank of the adapters; add it, like --lora-r 8")
    adaptive = [_flag(key) for key in ("target_interval", "max_time") if key in values]
    if values.get("rounds") is not None and adaptive:
        mistakes.append(
            f"{' and '.join(adaptive)}: --rounds sets the number of rounds; leave out --rounds to go on until the "
            f"intervals are narrow, or {' and '.join(adaptive)}"
        )
    if values.get("target_interval", 0) is values.get("max_time", 0) is None:
        mistakes.append(
            "--target-interval none and --max-time none: without either the run has no end; set one of them"
        )
    if values.get("emulate") is not None:
        mistakes += _against_emulation(values)
        values["device"] = EMULATED_DEVICE
    if mistakes:
        raise UsageError.of(mistakes)
    if unavailable is not None:
        raise unavailable
    return Settings(**values)


def merged(*layers: Mapping[str, object]) -> dict[str, object]:
    """Merge raw values, later ones over earlier ones: a number of rounds replaces the goals of the layers before it.

    The reverse holds too: a target or a time replaces the number of rounds.
    """
    values: dict[str, object] = {}
    for layer in layers:
        named = {canonical(key) for key, value in layer.items() if value is not None}
        replaced: set[str] = set()
        if "rounds" in named:
            replaced |= {"target_interval", "max_time"}
        if named & {"target_interval", "max_time"}:
            replaced |= {"rounds"}
        values = {key: value for key, value in values.items() if canonical(key) not in replaced}
        values |= layer
    return values


def _against_emulation(values: Mapping[str, Any]) -> list[str]:
    """List the settings that contradict `--emulate`."""
    card, device = values["emulate"], values.get("device", "auto")
    mistakes = []
    if device not in ("auto", "cuda", EMULATED_DEVICE):
        mistakes.append(f"--device {device}: the device is the emulated {card}; leave out --device, or --emulate")
    if values.get("pretrained"):
        mistakes.append(
            "--pretrained: nothing is computed on an emulated card, so no weights are needed; leave it out, or "
            "--emulate"
        )
    return mistakes


def notices(raw_values: Mapping[str, object]) -> tuple[str, ...]:
    """Say how raw settings that have two possible meanings were interpreted, in sentences."""

    def texts(key: str) -> list[str]:
        raw = raw_values.get(key)
        return [] if raw is None else [str(item) for item in parsers.listed(raw)]

    return spellings.notices(texts("precision"), texts("seq_len"))


def canonical(key: str) -> str:
    """Return the name of a setting for any of its spellings."""
    plain = key.replace("-", "_")
    return ALIASES.get(plain, plain)


def parse_device(name: str) -> str:
    """Check a device's name; raises UsageError."""
    try:
        return parsers.device(name)
    except ValueError as err:
        raise UsageError(f"--device: {err}") from None


def parse_memory(flag: str, raw: object) -> int | None:
    """Parse an amount of memory into bytes, None into None; raises UsageError."""
    if raw is None:
        return None
    try:
        return units.parse_memory(raw)
    except ValueError as err:
        raise UsageError(f"{flag}: {err}") from None


def several(flag: str, raw: object, parse: Callable[[object], str]) -> tuple[str, ...] | None:
    """Parse each name in `a,b` by `parse`, None into None; raises UsageError."""
    if raw is None:
        return None
    try:
        return tuple(dict.fromkeys(parse(item) for item in parsers.listed(raw)))
    except ValueError as err:
        raise UsageError(f"{flag}: {err}") from None


def as_json(resolved: Settings) -> dict[str, Json]:
    """Convert settings to what a report stores; `settings(as_json(s)) == s`."""
    stored: dict[str, Json] = {}
    for field in fields(resolved):
        value = getattr(resolved, field.name)
        stored[field.name] = list(value) if isinstance(value, tuple) else value
    if resolved.timeout is None:
        stored["timeout"] = "none"
    for key in ("target_interval", "max_time"):
        if resolved.rounds is not None:
            del stored[key]  # the number of rounds is set instead
        elif stored[key] is None:
            stored[key] = "none"
    return stored


def _flag(key: str) -> str:
    return "--" + {"batch_size": "batch"}.get(key, key).replace("_", "-")


_PARSERS: dict[str, Callable[[object], object]] = {
    "model": parsers.text,
    "batch_size": parsers.counts(1, MAX_BATCH_SIZE, spelled=spellings.count),
    "seq_len": parsers.counts(2, MAX_SEQ_LEN, spelled=spellings.tokens),
    "strategies": parsers.strategies,
    "precision": parsers.precision,
    "optim": parsers.optimizer,
    "attn_implementation": parsers.attention_or_own,
    "device": parsers.device,
    "emulate": parsers.card,
    "warmup": parsers.count(1, 1000),
    "steps": parsers.count(1, 100_000),
    "rounds": parsers.rounds,
    "target_interval": parsers.points,
    "max_time": parsers.seconds,
    "seed": parsers.count(0, 2**31 - 1),
    "layers": parsers.count(1, 10_000),
    "set": parsers.overrides,
    "pretrained": parsers.yes_no,
    "trust_remote_code": parsers.yes_no,
    "memory_limit": parsers.memory,
    "timeout": parsers.seconds,
    "lora_r": parsers.count(1, MAX_LORA_R),
    "lora_target_modules": parsers.modules,
}
