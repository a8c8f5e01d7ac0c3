"""What the user changed about a model, in words: a relative of llama-3.2-1b with 4 layers is not called by its name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from gcbench.core.records import Json

LAYERS_FIELD = "num_hidden_layers"
"""What `--layers` sets: transformers' name, which configs with another one map to theirs."""


@dataclass(frozen=True, kw_only=True)
class ChangedConfig:
    """What changes come to in a model's config.

    Attributes:
        fields: every field of the config that differs, those that follow from others included; dots lead into nested
            configs.
        keeps_weights: whether every parameter has the shape that it has in the model's own checkpoint, if it is there.
    """

    fields: dict[str, Json]
    keeps_weights: bool


_OF_THE_CHECKPOINT = "quantization_config"
"""How its weights are stored: no part of the model's sizes. That it is taken off is said in a notice of its own."""


def made(layers: int | None, overrides: Mapping[str, Json] | None) -> dict[str, Json]:
    """The fields of the config that `--layers` and `--set` change, with their values."""
    sizes = {name: value for name, value in (overrides or {}).items() if not name.endswith(_OF_THE_CHECKPOINT)}
    return ({} if layers is None else {LAYERS_FIELD: layers}) | sizes


def told(layers: object, overrides: object) -> str | None:
    """`num_hidden_layers=6, hidden_size=512`; None where nothing is changed. Takes the settings of a stored report."""
    changed = made(layers if isinstance(layers, int) else None, overrides if isinstance(overrides, Mapping) else None)
    said = (f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in changed.items())
    return ", ".join(said) or None


def named(model: str, changes: str | None) -> str:
    """`llama-3.2-1b with num_hidden_layers=6`."""
    return model if changes is None else f"{model} with {changes}"
