"""Find the card that a prediction is for, in the built-in catalogue or a user's own file. No torch."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from gcbench.core import spellings
from gcbench.core.errors import UnavailableError, UsageError
from gcbench.core.units import GIB, MIB, parse_memory

PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
"""Number formats of a matrix multiplication, the keys of `matmul_flops`."""
VENDORS = ("nvidia", "amd")
_LEAST_MEMORY_BYTES = 256 * MIB
_MOST_MEMORY_BYTES = 16 * 1024 * GIB
_LEAST_RATE = 1e9
_MOST_NEAR_NAMES = 4
_DESCRIBE = "describe it with --device-file FILE.toml: a [[card]] with its name and memory_bytes"
_REMEDY = f"or set only its memory, like --device-memory 48GiB, or {_DESCRIBE}"
_CATALOGUE_ALONE = "name one of them, as only cards of the catalogue can be emulated"
_LEAST_OF_BOX, _MOST_OF_BOX = 0.88, 1.02
"""Range of the total memory that torch reports, relative to the marketed size in GiB."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """One card; a field is None, or a precision missing, when no figure is published.

    Attributes:
        memory_bytes: total memory that torch reports, less than the marketed size.
        full_name: device name that torch reports.
        compute_capability: like "9.0", or like "gfx942" for AMD.
        num_sms: number of streaming multiprocessors, or of AMD's compute units.
        bandwidth_bytes_per_s: memory bandwidth in the datasheet.
        matmul_flops: precision -> dense peak in the datasheet, operations per second.
        achievable_matmul_flops: the same as measured; GeForce cards exceed their datasheet.
        sources: field name -> where its figure was published.
    """

    name: str
    memory_bytes: int
    aliases: tuple[str, ...] = ()
    full_name: str | None = None
    vendor: str | None = None
    compute_capability: str | None = None
    num_sms: int | None = None
    bandwidth_bytes_per_s: float | None = None
    achievable_bandwidth_bytes_per_s: float | None = None
    matmul_flops: Mapping[str, float] = field(default_factory=dict, hash=False)
    achievable_matmul_flops: Mapping[str, float] = field(default_factory=dict, hash=False)
    sources: Mapping[str, str] = field(default_factory=dict, hash=False, repr=False)

    @property
    def title(self) -> str:
        """The name to show: the one that torch reports, if it is known."""
        return self.full_name or self.name

    @property
    def spellings(self) -> tuple[str, ...]:
        """Every name that finds this card, the short one first."""
        return (self.name, *self.aliases, *([self.full_name] if self.full_name else []))


def cards() -> tuple[Card, ...]:
    """Return the built-in cards, sorted by vendor and memory."""
    return _built_in()


def find(name: str, extra: Path | None = None) -> Card:
    """Return the card called `name`, from the file `extra` or else the catalogue.

    Case, spaces, hyphens, underscores and the vendor's words ("NVIDIA", "GeForce", "RTX") do not matter, and the
    marketed size may be added ("a40-48gb"). Raises UnavailableError, with near names, when none or several match, and
    UsageError when `extra` cannot be read.
    """
    own = read(extra) if extra is not None else ()
    found = _found(name, own)
    if found is not None:
        return found
    other = spellings.no_cuda_device(name)
    if other is not None:
        raise UnavailableError(
            f"{name!r} is {other}, and predictions are for CUDA cards and CPUs; use --device cpu with --device-memory "
            "36GiB, or only --device-memory 36GiB for a CUDA card of that size"
        )
    raise UnavailableError(f"{_unknown(name, own)}; {_REMEDY}")


def find_to_emulate(name: str, extra: Path | None = None, *, takes_file: bool = False) -> Card:
    """Return the card called `name`, from the file `extra` or else the catalogue.

    `takes_file` tells whether the command has `--device-file`, for the remedy. Raises UnavailableError with near names,
    as `find` does, and UsageError when `extra` cannot be read.
    """
    own = read(extra) if extra is not None else ()
    card = _found(name, own)
    if card is None:
        other = spellings.no_cuda_device(name)
        remedy = f"name one of them, or {_DESCRIBE}" if takes_file else _CATALOGUE_ALONE
        raise UnavailableError(
            f"{name!r} is {other}, and only NVIDIA cards can be emulated; gcbench devices lists them"
            if other is not None
            else f"{_unknown(name, own)}; {remedy}"
        )
    return card


def _unknown(name: str, own: Sequence[Card]) -> str:
    """Say that no card, or several, have a name, with near ones."""
    sizes = _sizes(name, own)
    if sizes:
        return f"{name!r} comes in several sizes; near names: {', '.join(sizes)}"
    near = _near(name, _by_key(own))
    hint = f"near names: {', '.join(near)}" if near else "gcbench devices lists all known devices"
    return f"there is no device {name!r} in the catalogue; {hint}"


def known(name: str) -> Card | None:
    """Return the card of the catalogue called `name`; None when there is none."""
    return _found(name, ())


def _by_key(own: Sequence[Card]) -> dict[str, Card]:
    """Return spelling -> card; the user's own cards replace built-in ones of the same name."""
    return {_plain(spelling): card for card in (*cards(), *own) for spelling in card.spellings}


def _found(name: str, own: Sequence[Card]) -> Card | None:
    by_key = _by_key(own)
    exact = by_key.get(_plain(name))
    if exact is not None:
        return exact
    core = _core(name)
    matches = {card.name: card for key, card in by_key.items() if _core(key) == core}
    if not matches:  # "a40-48gb": the marketed size, of which torch reports a little less
        size = re.fullmatch(r"(.*[a-z0-9]*?[a-z].*?|\d{4}(?:ti|super)*)(\d{2,3})gb", core)
        matches = {
            card.name: card
            for key, card in by_key.items()
            if size is not None
            and _core(key) == size[1]
            and _LEAST_OF_BOX <= card.memory_bytes / (int(size[2]) * GIB) <= _MOST_OF_BOX
        }
    return next(iter(matches.values())) if len(matches) == 1 else None


def _sizes(name: str, own: Sequence[Card]) -> list[str]:
    """Return the names of cards that are `name` followed by a size or form factor."""
    core = _core(name)
    if not core:
        return []
    found = {
        card.name: card for card in (*cards(), *own) if re.fullmatch(rf"{re.escape(core)}\d+gb.*", _core(card.name))
    }
    return list(found) if len(found) > 1 else []


def among(needed_bytes: int, limit_bytes: int) -> int | None:
    """Return how many devices of `limit_bytes` are needed for `needed_bytes`; None when one card of the catalogue has
    enough memory."""
    if needed_bytes <= max(card.memory_bytes for card in cards()):
        return None
    return -(-needed_bytes // limit_bytes)


def read(path: Path) -> tuple[Card, ...]:
    """Read the cards in a user's TOML file, in its order; raises UsageError with all mistakes."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(f"there is no device file {path}; give a TOML file with [[card]] tables") from None
    except (OSError, UnicodeDecodeError) as err:
        raise UsageError(f"device file {path} cannot be read ({err}); check the path and its permissions") from None
    return _parse(text, str(path))


@cache
def _built_in() -> tuple[Card, ...]:
    text = resources.files("gcbench.devices").joinpath("cards.toml").read_text(encoding="utf-8")
    return tuple(sorted(_parse(text, "cards.toml"), key=lambda card: (card.vendor or "", card.memory_bytes, card.name)))


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name).casefold()


def _core(name: str) -> str:
    """Return a name without the words that all cards of a vendor share; "80g" becomes "80gb"."""
    plain = re.sub(r"nvidia|geforce|tesla|quadro|instinct|radeon|generation|amd|^rx|rtx|gpu", "", _plain(name))
    return re.sub(r"(?<=\d)g$|(?<=\d)gib$", "gb", plain)


def _near(name: str, by_key: Mapping[str, Card]) -> list[str]:
    """Return short names near `name`: those that contain it, those that it contains, or those spelled similarly."""
    core = _core(name)
    keys = [key for key in by_key if len(core) > 1 and core in key]
    keys = keys or [key for key in by_key if len(_core(key)) > 2 and _core(key) in core]
    keys = keys or difflib.get_close_matches(core, by_key, n=2 * _MOST_NEAR_NAMES)
    return list(dict.fromkeys(by_key[key].name for key in keys))[:_MOST_NEAR_NAMES]


def _parse(text: str, origin: str) -> tuple[Card, ...]:
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as err:
        raise UsageError(f"device file {origin} is not valid TOML ({err}); fix that line") from None
    stray = [key for key in raw if key != "card"]
    mistakes = [f"{origin}: there is no key {key!r}; write each device as a [[card]] table" for key in stray]
    tables = raw.get("card", [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise UsageError.of([*mistakes, f"{origin}: card is not a list of tables; write [[card]] before each device"])
    if not tables and not mistakes:
        mistakes.append(f"{origin} describes no device; write [[card]], then its name and memory_bytes")
    found: list[Card] = []
    owners: dict[str, int] = {}
    for number, table in enumerate(tables, start=1):
        values: dict[str, Any] = {}
        where = f"{origin}, card {number}" + (f" ({table['name']})" if isinstance(table.get("name"), str) else "")
        for raw_key, value in table.items():
            key = _KEY_ALIASES.get(raw_key, raw_key)
            try:
                values[key] = _parser(key)(value)
            except ValueError as err:
                mistakes.append(f"{where}: {raw_key}: {err}")
        present = {_KEY_ALIASES.get(key, key) for key in table}
        mistakes += [
            f"{where}: {key} is missing; write it like {like}" for key, like in _REQUIRED if key not in present
        ]
        if all(key in values for key, _ in _REQUIRED):
            card = Card(**values)
            for spelling in dict.fromkeys(map(_plain, card.spellings)):
                if owners.setdefault(spelling, number) != number:
                    mistakes.append(f"{where}: {spelling!r} also names card {owners[spelling]}; rename one of them")
            found.append(card)
    if mistakes:
        raise UsageError.of(mistakes)
    return tuple(found)


def _parser(key: str) -> Callable[[object], object]:
    if key in _PARSERS:
        return _PARSERS[key]
    near = difflib.get_close_matches(key, _PARSERS, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ValueError(f"there is no such key; {hint}legal are {', '.join(_PARSERS)}")


def _text(raw: object) -> str:
    if not isinstance(raw, str) or not raw.strip():
        raise ValueError(f"{raw!r} is not text; write it in quotes")
    return raw.strip()


def _texts(raw: object) -> tuple[str, ...]:
    if not isinstance(raw, list):
        raise ValueError(f'{raw!r} is not a list; write it like ["name", "other name"]')
    return tuple(_text(item) for item in raw)


def _memory(raw: object) -> int:
    count = parse_memory(raw)
    if not _LEAST_MEMORY_BYTES <= count <= _MOST_MEMORY_BYTES:
        raise ValueError(f"{raw!r} is {count:,} bytes, which no card has; write it with its unit, like 24GiB")
    return count


def _vendor(raw: object) -> str:
    if raw not in VENDORS:
        raise ValueError(f"{raw!r} is unknown; legal are {', '.join(VENDORS)}")
    return str(raw)


def _capability(raw: object) -> str:
    if not re.fullmatch(r"\d+\.\d|gfx[0-9a-f]+", str(raw)) or not isinstance(raw, str):
        raise ValueError(f'{raw!r} is not a compute capability; write it in quotes, like "9.0" or "gfx942"')
    return raw


def _count(raw: object) -> int:
    if not isinstance(raw, int) or isinstance(raw, bool) or raw < 1:
        raise ValueError(f"{raw!r} is not a whole number of 1 or more")
    return raw


def _rate(unit: str, like: str) -> Callable[[object], float]:
    def parse(raw: object) -> float:
        if not isinstance(raw, (int, float)) or isinstance(raw, bool) or not _LEAST_RATE <= raw < float("inf"):
            raise ValueError(f"{raw!r} is not a number of {unit} per second; write it like {like}")
        return float(raw)

    return parse


def _by_precision(raw: object) -> Mapping[str, float]:
    if not isinstance(raw, dict) or any(key not in PRECISIONS for key in raw):
        legal = ", ".join(PRECISIONS)
        raise ValueError(f"{raw!r} is not a table by precision ({legal}); write it like {{ bf16 = 312e12 }}")
    parse = _rate("operations", "312e12")
    return {key: parse(value) for key, value in raw.items()}


def _sources(raw: object) -> Mapping[str, str]:
    if not isinstance(raw, dict):
        raise ValueError(f'{raw!r} is not a table; write it like {{ memory_bytes = "its source" }}')
    return {key: _text(value) for key, value in raw.items()}


_PARSERS: dict[str, Callable[[object], object]] = {
    "name": _text,
    "memory_bytes": _memory,
    "aliases": _texts,
    "full_name": _text,
    "vendor": _vendor,
    "compute_capability": _capability,
    "num_sms": _count,
    "bandwidth_bytes_per_s": _rate("bytes", "936e9"),
    "achievable_bandwidth_bytes_per_s": _rate("bytes", "936e9"),
    "matmul_flops": _by_precision,
    "achievable_matmul_flops": _by_precision,
    "sources": _sources,
}
_KEY_ALIASES = {"memory": "memory_bytes", "total_memory": "memory_bytes"}
_REQUIRED = (("name", '"my-card"'), ("memory_bytes", '"24GiB"'))
