"""Parses the settings of a run from flags and TOML; all mistakes are reported together."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from gcbench import strategies
from gcbench.core import spellings, units
from gcbench.core.errors import UnavailableError, UsageError
from gcbench.core.records import ALL_LINEAR, Json, Lora
from gcbench.devices import cards
from gcbench.training import optimizers

PRECISION_NAMES = ("fp32", "bf16", "bf16-mixed", "fp16-mixed")
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
    if "target_interval" in values and "max_time" in values and values["target_interval"] is values["max_time"] is None:
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
        return [] if raw is None else [str(item) for item in _listed(raw)]

    return spellings.notices(texts("precision"), texts("seq_len"))


def canonical(key: str) -> str:
    """Return the name of a setting for any of its spellings."""
    plain = key.replace("-", "_")
    return ALIASES.get(plain, plain)


def parse_device(name: str) -> str:
    """Check a device's name; raises UsageError."""
    try:
        return _device(name)
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
        return tuple(dict.fromkeys(parse(item) for item in _listed(raw)))
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


def _listed(raw: object) -> list[object]:
    """The items of `1,2,4`, of a TOML list, or of one value."""
    if isinstance(raw, (list, tuple)):
        items: list[object] = list(raw)
    elif isinstance(raw, str):
        items = [part.strip() for part in raw.removesuffix(",").split(",")]
    else:
        items = [raw]
    if not items or any(item == "" for item in items):
        raise ValueError(f"{raw!r} has an empty item; write a list like 1,2,4")
    return items


def _whole(raw: object, *, at_least: int, at_most: int | None = None) -> int:
    text = spellings.count(str(raw))
    if isinstance(raw, bool) or not text.removeprefix("-").isdecimal():
        raise ValueError(f"{raw!r} is not a whole number; write {at_least} or more")
    number = int(text)
    if number < at_least:
        raise ValueError(f"{number} is too small; it must be {at_least} or more")
    if at_most is not None and number > at_most:
        raise ValueError(f"{number} is out of range (max {at_most:,}); write a smaller number")
    return number


def _count(at_least: int, at_most: int | None = None) -> Callable[[object], int]:
    return lambda raw: _whole(raw, at_least=at_least, at_most=at_most)


def _counts(at_least: int, at_most: int, *, spelled: Callable[[str], str]) -> Callable[[object], tuple[int, ...]]:
    def parse(raw: object) -> tuple[int, ...]:
        if isinstance(raw, str) and re.fullmatch(r"\d{1,3}(?:,\d{3})+", raw.strip()) and re.search(r",0", raw):
            raise ValueError(f"{raw!r} reads as a list; did you mean {raw.strip().replace(',', '')}?")
        with_commas = re.sub(r"(?<=[\dkK])\s+(?=\d)", ",", raw) if isinstance(raw, str) else raw
        items = [spelled(item) if isinstance(item, str) else item for item in _listed(with_commas)]
        return tuple(dict.fromkeys(_whole(item, at_least=at_least, at_most=at_most) for item in items))

    return parse


def _text(raw: object) -> str:
    if not isinstance(raw, str) or not raw.strip():
        raise ValueError(f"{raw!r} is not a name; write it as text")
    return raw.strip()


def _one_of(legal: tuple[str, ...], raw: object) -> str:
    by_plain = {name.replace("_", "-"): name for name in legal}
    found = by_plain.get(re.sub(r"[_ ]", "-", _text(raw).lower()))
    if found is None:
        close = difflib.get_close_matches(str(raw).lower(), legal, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ValueError(f"{raw!r} is unknown; {hint}legal are {', '.join(legal)}")
    return found


def precision(raw: object) -> str:
    """Parse one of `PRECISION_NAMES` from any tool's spelling; raises ValueError."""
    if isinstance(raw, (int, str)) and not isinstance(raw, bool):  # 16 is a precision in Lightning
        raw = spellings.precision(str(raw))
    return _one_of(PRECISION_NAMES, raw)


def optimizer(raw: object) -> str:
    """Parse an optimizer of --optim from any tool's spelling; raises ValueError."""
    return _one_of(optimizers.names(), spellings.optimizer(raw, optimizers.names()) if isinstance(raw, str) else raw)


def attention(raw: object) -> str:
    """Parse an attention implementation into transformers' spelling; raises ValueError."""
    return spellings.attention(_text(raw))


def _attention_or_own(raw: object) -> str | None:
    """Parse an attention implementation, and the names for the model's own choice into None."""
    return None if _text(raw).lower() in ("default", "auto", "none") else attention(raw)


def one_of(legal: tuple[str, ...]) -> Callable[[object], str]:
    """Return a parser of names in `legal`."""
    return lambda raw: _one_of(legal, raw)


def _strategies(raw: object) -> tuple[str, ...]:
    specs: dict[str, None] = {}
    mistakes: list[str] = []
    for item in _listed(raw):
        try:
            named = spellings.strategy(item) if isinstance(item, str) else str(item)
            specs[strategies.parse(named).spec] = None
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
        raise ValueError(f"{ALL_LINEAR} means every linear layer; leave out the other names, or it")
    return (ALL_LINEAR,)


def _device(raw: object) -> str:
    name = spellings.device(_text(raw)).lower()
    kind, colon, index = name.partition(":")
    if name in ("auto", "cpu", "cuda") or (kind == "cuda" and colon and index.isdecimal()):
        return name
    legal = "legal are auto, cpu, cuda and cuda:N"
    other = spellings.no_cuda_device(name)
    if other is not None:
        raise ValueError(f"{raw!r} is {other}, on which nothing can be measured yet; {legal}")
    card = cards.known(name)
    if card is not None:
        raise ValueError(
            f"{raw!r} is a card of the catalogue, and this command runs on this machine; {legal}; --emulate "
            f"{card.name} emulates that card, and gcbench predict --device {card.name} and gcbench plan --device "
            f"{card.name} predict for it"
        )
    raise ValueError(f"{raw!r} is unknown; {legal}")


def _card(raw: object) -> str:
    from gcbench.emulate.properties import capability_of  # only where a card is to be emulated

    card = cards.find_to_emulate(_text(raw))
    capability_of(card)
    return card.name


def _yes_no(raw: object) -> bool:
    if isinstance(raw, bool):
        return raw
    raise ValueError(f"{raw!r} is neither true nor false")


def _bytes(raw: object) -> int:
    count = units.parse_memory(raw)
    if count < units.LEAST_BARE_BYTES:
        raise ValueError(f"{raw!r} is less memory than any device has; write it like 8GiB")
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


def _rounds(raw: object) -> int | None:
    return None if raw == "auto" else _whole(raw, at_least=1, at_most=1000)


def _points(raw: object) -> float | None:
    """Parse percentage points; `none` for no target."""
    if raw == "none":
        return None
    try:
        points = float(str(raw).strip().removesuffix("%"))
    except ValueError:
        points = 0.0
    if isinstance(raw, bool) or not 0 < points <= 100:
        raise ValueError(f"{raw!r} is not a number of percentage points; write one above 0 and up to 100, like 5")
    return points


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
    """Parse a TOML value (number, true, list, quoted text); anything else is text, and `null` is None."""
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
    "batch_size": _counts(1, MAX_BATCH_SIZE, spelled=spellings.count),
    "seq_len": _counts(2, MAX_SEQ_LEN, spelled=spellings.tokens),
    "strategies": _strategies,
    "precision": precision,
    "optim": optimizer,
    "attn_implementation": _attention_or_own,
    "device": _device,
    "emulate": _card,
    "warmup": _count(1, 1000),
    "steps": _count(1, 100_000),
    "rounds": _rounds,
    "target_interval": _points,
    "max_time": _seconds,
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
