"""Describe what the user changed about a model: llama-3.2-1b with 4 layers is not called llama-3.2-1b."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from gcbench.core.records import Json

LAYERS_FIELD = "num_hidden_layers"
"""The field that `--layers` sets: transformers' name, which configs with another name map to theirs."""


@dataclass(frozen=True, kw_only=True)
class ChangedConfig:
    """The changes of a model's config.

    Attributes:
        fields: every field of the config that differs, derived ones included; nested names have dots.
        keeps_weights: whether every parameter that is in the model's own checkpoint has the shape that it has there.
    """

    fields: dict[str, Json]
    keeps_weights: bool


_OF_THE_CHECKPOINT = "quantization_config"
"""How the weights are stored, not a size of the model. A separate notice reports when it is removed."""


def changed_fields(layers: int | None, overrides: Mapping[str, Json] | None) -> dict[str, Json]:
    """Return the fields of the config that `--layers` and `--set` change, with their values."""
    sizes = {name: value for name, value in (overrides or {}).items() if not name.endswith(_OF_THE_CHECKPOINT)}
    return ({} if layers is None else {LAYERS_FIELD: layers}) | sizes


def describe(layers: object, overrides: object) -> str | None:
    """Return `num_hidden_layers=6, hidden_size=512`; None without changes. Accepts a stored report's settings."""
    changed = changed_fields(
        layers if isinstance(layers, int) else None, overrides if isinstance(overrides, Mapping) else None
    )
    fields = (f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in changed.items())
    return ", ".join(fields) or None


def named(model: str, changes: str | None) -> str:
    """Return `llama-3.2-1b with num_hidden_layers=6`, or the model's name alone."""
    return model if changes is None else f"{model} with {changes}"
