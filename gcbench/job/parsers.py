"""Parse single values of settings: text from flags, native values from TOML. Each raises ValueError with a remedy."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Callable

from gcbench import strategies as registry
from gcbench.core import spellings, units
from gcbench.core.records import ALL_LINEAR, Json
from gcbench.devices import cards
from gcbench.training import optimizers

PRECISION_NAMES = ("fp32", "bf16", "bf16-mixed", "fp16-mixed")


def listed(raw: object) -> list[object]:
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


def whole(raw: object, *, at_least: int, at_most: int | None = None) -> int:
    """Parse a whole number within limits."""
    digits = spellings.count(str(raw))
    if isinstance(raw, bool) or not digits.removeprefix("-").isdecimal():
        raise ValueError(f"{raw!r} is not a whole number; write {at_least} or more")
    number = int(digits)
    if number < at_least:
        raise ValueError(f"{number} is too small; it must be {at_least} or more")
    if at_most is not None and number > at_most:
        raise ValueError(f"{number} is out of range (max {at_most:,}); write a smaller number")
    return number


def count(at_least: int, at_most: int | None = None) -> Callable[[object], int]:
    """Return a parser of a whole number within limits."""
    return lambda raw: whole(raw, at_least=at_least, at_most=at_most)


def counts(at_least: int, at_most: int, *, spelled: Callable[[str], str]) -> Callable[[object], tuple[int, ...]]:
    """Return a parser of several whole numbers within limits; `spelled` turns other spellings into digits."""

    def parse(raw: object) -> tuple[int, ...]:
        if isinstance(raw, str) and re.fullmatch(r"\d{1,3}(?:,\d{3})+", raw.strip()) and re.search(r",0", raw):
            raise ValueError(f"{raw!r} reads as a list; did you mean {raw.strip().replace(',', '')}?")
        with_commas = re.sub(r"(?<=[\dkK])\s+(?=\d)", ",", raw) if isinstance(raw, str) else raw
        items = [spelled(item) if isinstance(item, str) else item for item in listed(with_commas)]
        return tuple(dict.fromkeys(whole(item, at_least=at_least, at_most=at_most) for item in items))

    return parse


def text(raw: object) -> str:
    """Parse a name."""
    if not isinstance(raw, str) or not raw.strip():
        raise ValueError(f"{raw!r} is not a name; write it as text")
    return raw.strip()


def name_in(legal: tuple[str, ...], raw: object) -> str:
    """Parse one of the names in `legal`, with hyphens or underscores."""
    by_plain = {name.replace("_", "-"): name for name in legal}
    found = by_plain.get(re.sub(r"[_ ]", "-", text(raw).lower()))
    if found is None:
        close = difflib.get_close_matches(str(raw).lower(), legal, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ValueError(f"{raw!r} is unknown; {hint}legal are {', '.join(legal)}")
    return found


def precision(raw: object) -> str:
    """Parse one of `PRECISION_NAMES` from any tool's spelling; raises ValueError."""
    if isinstance(raw, (int, str)) and not isinstance(raw, bool):  # 16 is a precision in Lightning
        raw = spellings.precision(str(raw))
    return name_in(PRECISION_NAMES, raw)


def optimizer(raw: object) -> str:
    """Parse an optimizer of --optim from any tool's spelling; raises ValueError."""
    return name_in(optimizers.names(), spellings.optimizer(raw, optimizers.names()) if isinstance(raw, str) else raw)


def attention(raw: object) -> str:
    """Parse an attention implementation into transformers' spelling; raises ValueError."""
    return spellings.attention(text(raw))


def attention_or_own(raw: object) -> str | None:
    """Parse an attention implementation, and the names for the model's own choice into None."""
    return None if text(raw).lower() in ("default", "auto", "none") else attention(raw)


def one_of(legal: tuple[str, ...]) -> Callable[[object], str]:
    """Return a parser of names in `legal`."""
    return lambda raw: name_in(legal, raw)


def strategies(raw: object) -> tuple[str, ...]:
    """Parse strategies, from any tool's spelling; all mistakes are reported together."""
    specs: dict[str, None] = {}
    mistakes: list[str] = []
    for item in listed(raw):
        try:
            named = spellings.strategy(item) if isinstance(item, str) else str(item)
            specs[registry.parse(named).spec] = None
        except ValueError as err:
            mistakes.append(str(err))
    if mistakes:
        raise ValueError("; ".join(mistakes))
    return tuple(specs)


def modules(raw: object) -> tuple[str, ...]:
    """Parse names of modules, or `all-linear` alone."""
    names = tuple(dict.fromkeys(text(item) for item in listed(raw)))
    if not any(name.lower().replace("_", "-") == ALL_LINEAR for name in names):
        return names
    if len(names) > 1:
        raise ValueError(f"{ALL_LINEAR} means every linear layer; leave out the other names, or it")
    return (ALL_LINEAR,)


def device(raw: object) -> str:
    """Parse a device of this machine."""
    name = spellings.device(text(raw)).lower()
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


def card(raw: object) -> str:
    """Parse the name of a card to emulate; raises UnavailableError for one that cannot be emulated."""
    from gcbench.emulate.properties import capability_of  # only where a card is to be emulated

    card = cards.find_to_emulate(text(raw))
    capability_of(card)
    return card.name


def yes_no(raw: object) -> bool:
    """Parse true or false, as TOML has them."""
    if isinstance(raw, bool):
        return raw
    raise ValueError(f"{raw!r} is neither true nor false")


def memory(raw: object) -> int:
    """Parse an amount of memory into bytes."""
    count = units.parse_memory(raw)
    if count < units.LEAST_BARE_BYTES:
        raise ValueError(f"{raw!r} is less memory than any device has; write it like 8GiB")
    return count


def seconds(raw: object) -> float | None:
    """Parse seconds; `none` is no limit."""
    if raw == "none":
        return None
    try:
        seconds = float(str(raw).strip().removesuffix("s"))
    except ValueError:
        seconds = 0.0
    if isinstance(raw, bool) or not 0 < seconds < float("inf"):
        raise ValueError(f"{raw!r} is not a time; write seconds, like 600, or none for no limit")
    return seconds


def rounds(raw: object) -> int | None:
    """Parse a number of rounds; `auto` is as many as it takes."""
    return None if raw == "auto" else whole(raw, at_least=1, at_most=1000)


def points(raw: object) -> float | None:
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


def overrides(raw: object) -> dict[str, Json]:
    """Parse changes to a config, like `hidden_size=512`."""
    if isinstance(raw, dict):
        return raw
    changes: dict[str, Json] = {}
    for item in raw if isinstance(raw, (list, tuple)) else [raw]:
        name, equals, value = str(item).partition("=")
        if not equals or not name.strip():
            raise ValueError(f"{item!r} is not key=value; write it like hidden_size=512")
        changes[name.strip()] = literal(value.strip())
    return changes


def literal(text: str) -> Json:
    """Parse a TOML value (number, true, list, quoted text); anything else is text, and `null` is None."""
    if text in ("null", "None"):
        return None
    spelled = {"True": "true", "False": "false"}.get(text, text)
    try:
        value: Json = tomllib.loads(f"value = {spelled}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    return value
