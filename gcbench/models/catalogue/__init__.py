"""Built-in catalogue of published causal language models and their parameter counts."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable

__all__ = ["Architecture", "architectures", "config_of", "find", "nearest"]

_NEAREST_CUTOFF = 0.6


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One published architecture.

    `published_params` counts distinct trainable parameters (tied weights once) as published,
    and `published_as` says what was published and where. `params_tolerance` is relative: 0 for
    an exact published count, otherwise half a unit in the last published digit. `published_in` is
    what the published weights are quantised in; None for full ones. `config_of` never says so: it
    is the config of full weights.
    """

    name: str
    hub_id: str
    aliases: tuple[str, ...]
    family: str
    published_params: int
    published_as: str
    params_tolerance: float
    note: str | None
    published_in: str | None = None


def architectures() -> tuple[Architecture, ...]:
    """Return every catalogued architecture, sorted by family, then by published size.

    Raises:
        ValueError: the packaged index is malformed.
    """
    return _index()


def find(name: str) -> Architecture | None:
    """Return the architecture called `name`, or None if the catalogue has none.

    Case does not matter. `name` may be the short name, the Hub id, an alias, or the last path
    part of the Hub id; a short name wins over a Hub id, which wins over the other two.
    """
    return _by_key().get(name.strip().casefold())


def config_of(architecture: Architecture) -> dict[str, object]:
    """Return a fresh copy of the architecture's published configuration (its `config.json`).

    Raises:
        FileNotFoundError: the catalogue has no configuration under `architecture.name`.
        ValueError: the stored configuration is not a JSON object.
    """
    path = _data().joinpath("configs", f"{architecture.name}.json")
    config = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise ValueError(f"catalogue configuration {architecture.name!r} is not a JSON object")
    return config


def nearest(name: str, limit: int = 3) -> tuple[str, ...]:
    """Return up to `limit` short names that resemble `name`, closest first.

    `name` is compared with short names, Hub ids, aliases and their last path parts, ignoring
    case and punctuation. The result is empty when nothing is close.

    Raises:
        ValueError: `limit` is less than 1.
    """
    if limit < 1:
        raise ValueError(f"limit must be at least 1, not {limit}")
    wanted = {_squeezed(name), _squeezed(_last_part(name))} - {""}
    scored = []
    for architecture in _index():
        known = {_squeezed(key) for key in _keys(architecture)}
        score = max((_similarity(a, b) for a in wanted for b in known), default=0.0)
        if score >= _NEAREST_CUTOFF:
            scored.append((-score, architecture.name))
    return tuple(short for _, short in sorted(scored)[:limit])


def _data() -> Traversable:
    return resources.files(__name__)


@cache
def _index() -> tuple[Architecture, ...]:
    tables = tomllib.loads(_data().joinpath("index.toml").read_text(encoding="utf-8"))
    found = [_architecture(name, table) for name, table in tables.items()]
    found.sort(key=lambda a: (a.family.casefold(), a.published_params, a.name))
    return tuple(found)


def _architecture(name: str, table: object) -> Architecture:
    if not isinstance(table, dict):
        raise ValueError(f"catalogue index: {name!r} is not a table")
    try:
        return Architecture(
            name=name,
            hub_id=table["hub_id"],
            aliases=tuple(table.get("aliases", ())),
            family=table["family"],
            published_params=table["published_params"],
            published_as=table["published_as"],
            params_tolerance=float(table["params_tolerance"]),
            note=table.get("note"),
            published_in=table.get("published_in"),
        )
    except KeyError as error:
        raise ValueError(f"catalogue index: {name!r} has no {error.args[0]!r}") from error


@cache
def _by_key() -> dict[str, Architecture]:
    found: dict[str, Architecture] = {}
    for keys_of in (_names, _hub_ids, _other_keys):
        for architecture in _index():
            for key in keys_of(architecture):
                found.setdefault(key.casefold(), architecture)
    return found


def _names(architecture: Architecture) -> Iterator[str]:
    yield architecture.name


def _hub_ids(architecture: Architecture) -> Iterator[str]:
    yield architecture.hub_id


def _other_keys(architecture: Architecture) -> Iterator[str]:
    yield from architecture.aliases
    yield _last_part(architecture.hub_id)


def _keys(architecture: Architecture) -> Iterator[str]:
    yield from _names(architecture)
    for hub_id in (architecture.hub_id, *architecture.aliases):
        yield hub_id
        yield _last_part(hub_id)


def _last_part(hub_id: str) -> str:
    return hub_id.strip().rpartition("/")[2]


def _squeezed(text: str) -> str:
    return "".join(c for c in text.casefold() if c.isalnum())


def _similarity(a: str, b: str) -> float:
    matcher = SequenceMatcher(None, a, b, autojunk=False)
    return 0.0 if matcher.quick_ratio() < _NEAREST_CUTOFF else matcher.ratio()
