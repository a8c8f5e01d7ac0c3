"""Finds mistakes that a model's config shows, before a process with torch starts. No torch.

The child process decides: nothing is refused here that it would accept, and what text cannot show is left to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gcbench import strategies
from gcbench.core.errors import UsageError
from gcbench.core.records import ALL_LINEAR, Json, Lora
from gcbench.job.settings import Settings
from gcbench.models import library_text, quantized, refusals, sources
from gcbench.models.sources import ModelSource

_TEXT_CONFIGS = ("text_config", "text_encoder", "decoder", "generator")
"""Where transformers looks for the config of the text model within one of several models."""
IN_EACH_PRECISION = "in each precision"


@dataclass(frozen=True, kw_only=True)
class Requested:
    """The settings to check against a model, with the meaning that they have in `Settings`.

    Attributes:
        strategies: the strategies that the user named; none for the default ones, which are dropped where unsupported.
        precision: None for several.
    """

    overrides: Mapping[str, Json]
    layers: int | None = None
    seq_lens: Sequence[int] = ()
    strategies: Sequence[str] = ()
    lora: Lora | None = None
    precision: str | None = None


def model_of(settings: Settings, *, pretrained: bool = False) -> ModelSource:
    """Find the model that a command's settings name, and examine it; raises what `sources.resolve` and `examine` do."""
    changes = settings.set or {}
    source = sources.resolve(
        settings.model, pretrained=pretrained, trust_remote_code=settings.trust_remote_code, overrides=changes
    )
    requested = Requested(
        overrides=changes,
        layers=settings.layers,
        seq_lens=settings.seq_len or (),
        strategies=settings.strategies or (),
        lora=settings.lora,
        precision=settings.precision,
    )
    return examine(source, requested)


def examine(source: ModelSource, requested: Requested) -> ModelSource:
    """Check the requested settings against the model's config, and add notices to the model.

    Raises UnavailableError for a model that transformers cannot build as a causal LM, and UsageError with every mistake
    that the config shows.
    """
    config = source.config
    model_type = str(config["model_type"])
    notices = _about_weights(source, requested.precision)
    if "auto_map" in config and source.trust_remote_code:
        return replace(source, notices=notices)  # its own code decides about everything
    changes = quantized.other_changes(requested.overrides)
    built = _refuse_type(source, changes)
    if built is None:
        return replace(source, notices=notices)
    unknown = [refusals.no_such_field(name, scope) for name, scope in _unknown_fields(config, changes)]
    if unknown:
        raise UsageError.of([str(err) for err in unknown])
    changed = _with(config, changes, model_type)
    mistakes = [
        *(beyond_positions(source.name, length, limit) for length, limit in _too_long(changed, requested.seq_lens)),
        *_impossible_strategies(changed, requested),
        *_impossible_targets(changed, requested.lora),
    ]
    if mistakes:
        raise UsageError.of(mistakes)
    other = refusals.other_architecture(changed, built)
    return replace(source, notices=(*notices, *([other] if other else [])))


def beyond_positions(model: str, length: int, limit: int) -> str:
    """The message for a sequence length beyond the model's positions."""
    return (
        f"--seq-len {length} is beyond the {limit} positions of {model}; shorten it, or change the model with --set "
        f"max_position_embeddings={length}"
    )


def _about_weights(source: ModelSource, precision: str | None) -> tuple[str, ...]:
    full = IN_EACH_PRECISION if precision is None else f"in {'bf16' if precision == 'bf16' else 'fp32'}"
    if source.quantised:
        return (quantized.notice(source.quantised, full),)
    if source.published_in is not None:
        return (f"{source.name} is published in {source.published_in}; gcbench uses full weights {full}.",)
    return ()


def _refuse_type(source: ModelSource, changes: Mapping[str, Json]) -> str | None:
    """Find the class that will be built, None where transformers' files do not show it; raises UnavailableError."""
    model_type = str(source.config["model_type"])
    known = library_text.is_known(model_type)
    if known is False and "auto_map" in source.config:
        raise refusals.own_code(source)
    if known is False:
        raise refusals.unknown_type(source, library_text.causal_types())
    built = library_text.causal_lm_class(model_type)
    if built == "":
        raise refusals.not_causal(source)
    if built is not None and refusals.is_encoder_decoder({**source.config, **changes}):
        raise refusals.encoder_decoder(source, built)
    return built


def _unknown_fields(config: Mapping[str, Any], changes: Mapping[str, Json]) -> list[tuple[str, Sequence[str]]]:
    """List changes of fields that the config cannot have, each with the names that it has."""
    model_type = str(config["model_type"])
    names = library_text.names_in_config(model_type)
    if names is None:
        return []
    scope = tuple(dict.fromkeys((*config, *library_text.fields(model_type))))
    firsts = {name: name.partition(".")[0] for name in changes}
    return [(name, scope) for name, first in firsts.items() if first not in names and first not in config]


def _with(config: Mapping[str, Any], changes: Mapping[str, Json], model_type: str) -> dict[str, Any]:
    """Copy the config with its changed fields, under the config's own names for them, at most one level deep."""
    changed: dict[str, Any] = {k: dict(v) if isinstance(v, dict) else v for k, v in config.items()}
    for name, value in changes.items():
        outer, dot, last = name.partition(".")
        if not dot:
            changed[library_text.own_name(model_type, name) or name] = value
        elif "." not in last:
            part = changed.get(outer)
            changed[outer] = {**(part if isinstance(part, dict) else {}), last: value}
    return changed


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The part of the config that describes the text model; None where that is ambiguous."""
    parts = [config[name] for name in _TEXT_CONFIGS if config.get(name) is not None]
    if not parts:
        return config
    part = parts[0]
    return part if len(parts) == 1 and isinstance(part, Mapping) and isinstance(part.get("model_type"), str) else None


def _size(config: Mapping[str, Any], field: str) -> int | None:
    """A size under the config's own name for it, or under the common one; None where it has both, or neither."""
    own = library_text.own_name(str(config["model_type"]), field)
    if own is None or (own != field and own in config and field in config):
        return None
    value = config.get(own, config.get(field))
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _too_long(config: Mapping[str, Any], seq_lens: Sequence[int]) -> list[tuple[int, int]]:
    text = _text_config(config)
    limit = None if text is None else _size(text, "max_position_embeddings")
    return [] if limit is None else [(length, limit) for length in seq_lens if length > limit]


def _depth(config: Mapping[str, Any], layers: int | None) -> int | None:
    """The number of layers that can be checkpointed, where the model is one list of them; else None."""
    if _text_config(config) is not config or not library_text.has_one_list_of_layers(str(config["model_type"])):
        return None
    depth = _size(config, "num_hidden_layers")
    return depth if depth is None or layers is None else layers


def _impossible_strategies(config: Mapping[str, Any], requested: Requested) -> list[str]:
    depth = _depth(config, requested.layers)
    mistakes = []
    for spec in requested.strategies if depth is not None else ():
        strategy = strategies.parse(spec)
        if strategy.content is not None:
            continue  # a file's layers are those that run, which may be fewer
        try:
            strategy.plan_for(depth or 0)
        except ValueError as err:
            mistakes.append(f"--strategies: {err}")
    return mistakes


def _impossible_targets(config: Mapping[str, Any], lora: Lora | None) -> list[str]:
    """Messages for LoRA target modules that the model does not have, or that peft has no default for."""
    model_type = str(config["model_type"])
    if lora is None or lora.target_modules == (ALL_LINEAR,):
        return []
    words = library_text.names_in_model(model_type)
    if words is None:
        return []
    linear = library_text.linear_layers(model_type)
    if lora.target_modules is None:
        known = library_text.has_lora_targets(model_type)
        return [] if known is not False else [str(refusals.no_default_targets(model_type, linear))]
    lost = [
        name for name in lora.target_modules if not all(part in words or part.isdecimal() for part in name.split("."))
    ]
    return [str(refusals.no_such_module(lost, (), linear))] if lost and linear else []
