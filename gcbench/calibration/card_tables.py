"""Loads measured operator tables of cards: the user's own, or those that are shipped. No torch.

A table is what benchmarks/gpu_rates.py writes on a machine with the card: kernel times by operator, dtype and shape.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

from gcbench.calibration import op_times
from gcbench.calibration.op_times import Calibration
from gcbench.core.json_codec import decode
from gcbench.devices.cards import Card

_SHIPPED = "rates"
"""The folder of tables in `gcbench.devices`."""


def own_folder() -> Path:
    """The folder of the user's own tables, in the user's cache folder."""
    return op_times.default_folder() / _SHIPPED


def load(card: Card, folder: Path | None = None) -> Calibration | None:
    """The operator table of a card, the user's own before a shipped one; None where there is no valid one.

    Args:
        folder: where the user's own tables are; None for `own_folder`.
    """
    return next((table for text in _texts(card, folder) if (table := _read(text)) is not None), None)


def _texts(card: Card, folder: Path | None) -> Iterator[str]:
    name = f"{card.name}.json"
    for place in ((folder or own_folder()) / name, resources.files("gcbench.devices").joinpath(_SHIPPED, name)):
        try:
            yield place.read_text(encoding="utf-8")
        except (OSError, ValueError):  # no file, or not text
            continue


def _read(text: str) -> Calibration | None:
    try:
        document = json.loads(text)
        table = decode(Calibration, document["calibration"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return table if table.schema == op_times.SCHEMA and table.points and op_times.is_sound(table) else None
