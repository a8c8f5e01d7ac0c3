"""Find how `--layers` and `--set` change a model's config, and whether pretrained weights still fit it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress

import torch
from transformers import PreTrainedConfig

from gcbench.core.model_changes import ChangedConfig, changed_fields
from gcbench.core.records import Json
from gcbench.models import build as models
from gcbench.models import quantized
from gcbench.models.sources import ModelSource

_NOT_OF_THE_MODEL = ("transformers_version", "_name_or_path", "architectures", "dtype", "torch_dtype")


def of(source: ModelSource, *, layers: int | None, overrides: Mapping[str, Json]) -> ChangedConfig:
    """Return every field that differs from the model's own config, derived fields included.

    Raises what `models.build_config` does for changes that cannot be made.
    """
    new = models.build_config(source, layers=layers, overrides=overrides)
    old = models.build_config(source, layers=None, overrides=quantized.taken_out(overrides))
    fields = dict(_differences(old, new)) or changed_fields(layers, overrides)
    keeps = False
    with suppress(Exception):  # a model's own code; what cannot be built cannot be loaded either
        before, after = _shapes(source, old), _shapes(source, new)
        keeps = all(before.get(name, shape) == shape for name, shape in after.items())
    return ChangedConfig(fields=fields, keeps_weights=keeps)


def _differences(old: PreTrainedConfig, new: PreTrainedConfig, outer: str = "") -> Iterator[tuple[str, Json]]:
    before = old.to_dict()
    for name, value in new.to_dict().items():
        if name in _NOT_OF_THE_MODEL or (name in before and before[name] == value):
            continue
        mine, theirs = getattr(old, name, None), getattr(new, name, None)
        if isinstance(mine, PreTrainedConfig) and isinstance(theirs, PreTrainedConfig):
            yield from _differences(mine, theirs, f"{outer}{name}.")
        else:
            yield f"{outer}{name}", value


def _shapes(source: ModelSource, config: PreTrainedConfig) -> dict[str, torch.Size]:
    model = models.build_meta(config, trust_remote_code=source.trust_remote_code)
    return {name: parameter.shape for name, parameter in model.named_parameters()}
