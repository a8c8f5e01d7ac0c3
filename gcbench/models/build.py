"""Build a model from its config: on the meta device, with random weights, or with pretrained ones."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from typing import Any
from unittest import mock

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, modeling_utils
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from gcbench.checkpointing import apply as checkpointing
from gcbench.checkpointing import own_checkpointing
from gcbench.core.errors import GcbenchError, UnavailableError, UsageError, first_sentence
from gcbench.core.records import Json, Lora, ModelFacts
from gcbench.core.units import counted
from gcbench.models import flash_attention, quantized, refusals
from gcbench.models.lora import with_adapters
from gcbench.models.sources import ModelSource
from gcbench.training.seeding import seed_generators


def build_config(source: ModelSource, *, layers: int | None, overrides: Mapping[str, Json]) -> PreTrainedConfig:
    """Return the model's config with the user's changes applied.

    Raises UnavailableError for a type that transformers cannot build as a causal LM, for a quantised checkpoint unless
    the changes remove its quantisation, and for values that transformers rejects; UsageError for a change of a field
    that the config does not have, or to a value that transformers rejects.
    """
    values = copy.deepcopy(source.config)
    if source.trust_remote_code and "auto_map" in values:
        config: PreTrainedConfig = AutoConfig.from_pretrained(source.location, trust_remote_code=True)
        values = config.to_dict()
        config_class: Any = type(config)
    else:
        config_class = _config_class(source, values)
    values = quantized.without(values, overrides)
    if layers is not None:
        _set_layers(values, config_class, layers)
    for name, value in quantized.other_changes(overrides).items():
        _set(values, config_class, name, value)
    left = quantized.found(values)
    if left:
        raise UnavailableError(quantized.refusal(source.name, left[0]))
    try:
        return config_class.from_dict(values)
    except Exception as err:  # a config class may raise anything at values it cannot use
        missing = refusals.missing_library(source.name, err)
        if missing is not None:
            raise missing from None
        if overrides or layers is not None:
            raise UsageError(
                f"transformers rejects the config of {source.name!r} with these --layers and --set: "
                f"{first_sentence(err)}; change them"
            ) from None
        raise UnavailableError(
            f"transformers rejects the config of {source.name!r}: {first_sentence(err)}; fix it, or change it with "
            "--set"
        ) from None


def build_meta(
    config: PreTrainedConfig,
    *,
    lora: Lora | None = None,
    without_adapters: Callable[[torch.nn.Module], None] | None = None,
    **kwargs: Any,
) -> torch.nn.Module:
    """Build the model on the meta device, without storage. With `lora`, raises what `with_adapters` does.

    `without_adapters` is called with the model before it has any.
    """
    with _uninitialised():
        with torch.device("meta"):
            model = _from_config(config, **kwargs)
        if without_adapters is not None:
            without_adapters(model)
        # Adapters are made on the CPU and moved to the model's device, as in `build`: that allocates other things.
        return model if lora is None else with_adapters(model, lora)


@contextmanager
def initialising_on_meta() -> Iterator[None]:
    """Initialise the weights of models on the meta device too, for what that allocates; transformers leaves it out.

    Where a model's own code cannot do so without values, the rest of it is left out.
    """
    initialize = getattr(PreTrainedModel, "initialize_weights", None)
    if initialize is None or not hasattr(modeling_utils, _DEVICE_IN_CONTEXT):
        yield
        return

    def as_far_as_possible(model: PreTrainedModel) -> None:
        with suppress(Exception):
            initialize(model)

    with (
        mock.patch.object(modeling_utils, _DEVICE_IN_CONTEXT, lambda: None),
        mock.patch.object(PreTrainedModel, "initialize_weights", as_far_as_possible),
    ):
        yield


_DEVICE_IN_CONTEXT = "get_torch_context_manager_or_global_device"
"""What transformers asks for the device on which a model is built."""


def build(
    source: ModelSource,
    config: PreTrainedConfig,
    *,
    device: str,
    dtype: torch.dtype,
    attn_implementation: str | None,
    seed: int,
    lora: Lora | None = None,
) -> torch.nn.Module:
    """Build the model on its device in training mode, with random weights drawn from `seed`, or pretrained ones.

    With `lora` the model is frozen and has adapters; raises what `with_adapters` does.
    """
    seed_generators(seed)
    kwargs: dict[str, Any] = {"dtype": dtype}
    if attn_implementation is not None:
        kwargs["attn_implementation"] = attn_implementation
    if source.weights is not None:
        model = AutoModelForCausalLM.from_pretrained(
            source.weights, config=config, trust_remote_code=source.trust_remote_code, **kwargs
        ).to(device)
        own_checkpointing.switch_off(model)
    else:
        with torch.device(device) if device != "cpu" else nullcontext():
            model = _from_config(config, trust_remote_code=source.trust_remote_code, **kwargs)
    if lora is not None:
        model = with_adapters(model, lora)
    model.train()
    model.config.use_cache = False
    return model  # type: ignore[no-any-return]


@contextmanager
def _uninitialised() -> Iterator[None]:
    """Skip torch's initialisation of parameters, which does nothing on the meta device but takes time."""

    def untouched(tensor: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        return tensor

    with ExitStack() as stack:
        for name in ("kaiming_uniform_", "uniform_", "normal_", "zeros_", "ones_"):
            stack.enter_context(mock.patch.object(torch.nn.init, name, untouched))
        yield


def _from_config(config: PreTrainedConfig, **kwargs: Any) -> torch.nn.Module:
    # A copy, because building the model changes its config.
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), **kwargs)
    own_checkpointing.switch_off(model)  # old configs may switch checkpointing on
    return model  # type: ignore[no-any-return]


def facts(
    source: ModelSource,
    config: PreTrainedConfig,
    attn_implementation: str | None,
    *,
    changed: bool = False,
    lora: Lora | None = None,
) -> ModelFacts:
    """Return facts about the model, read from the model built on the meta device.

    Raises UsageError when the model does not support the attention implementation, or when it cannot be built and its
    config was `changed` by the user; UnavailableError when transformers cannot build it unchanged; and what
    `with_adapters` raises.
    """
    kwargs: dict[str, Any] = {"trust_remote_code": source.trust_remote_code}
    if attn_implementation is not None:
        kwargs["attn_implementation"] = attn_implementation
    try:
        model = build_meta(config, lora=lora, **kwargs)
        if attn_implementation == flash_attention.STAND_IN and not getattr(model, "_supports_flash_attn", False):
            raise ValueError("the model does not support it")
    except GcbenchError:
        raise
    except Exception as err:  # modelling code may raise anything
        missing = refusals.missing_library(source.name, err) if attn_implementation is None else None
        if missing is not None:
            raise missing from None
        if attn_implementation is not None:
            named = flash_attention.FLASH if attn_implementation == flash_attention.STAND_IN else attn_implementation
            raise UsageError(
                f"{source.name!r} does not support --attn-implementation {named}: {first_sentence(err)}; "
                "leave the flag out to use the model's default"
            ) from None
        if changed:
            raise UsageError(
                f"transformers cannot build {source.name!r} with these --layers and --set: {first_sentence(err)}; "
                "change them"
            ) from None
        raise UnavailableError(
            f"transformers cannot build {source.name!r}: {first_sentence(err)}; check its config"
        ) from None
    return ModelFacts(
        model=source.name,
        model_type=config.model_type,
        num_params=sum(p.numel() for p in model.parameters()),
        num_layers=len(checkpointing.layers_of(model)),
        max_seq_len=max_seq_len(config),
        attn_implementation=_attention_in_use(model),
        checkpointing_refusal=checkpointing.refusal(model),
        num_trainable_params=sum(p.numel() for p in model.parameters() if p.requires_grad),
        only_own=own_checkpointing.advice(model) if own_checkpointing.is_all(model) else None,
    )


def check_layers(source: ModelSource, changed: ModelFacts, layers: int, overrides: Mapping[str, Json]) -> None:
    """Raise UsageError when `--layers` has no effect because the model derives its depth from other fields."""
    original = facts(source, build_config(source, layers=None, overrides=quantized.taken_out(overrides)), None)
    if original.num_layers and changed.num_layers == original.num_layers != layers:
        raise UsageError(
            f"--layers {layers} has no effect on {source.name!r}, which has {counted(original.num_layers, 'layer')} "
            "from other fields of its config; change those with --set"
        )


def _attention_in_use(model: torch.nn.Module) -> str | None:
    if not any("attention" in type(module).__name__.lower() for module in model.modules()):
        return None
    text_config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    return getattr(text_config, "_attn_implementation", None)


def possible_limits(config: PreTrainedConfig) -> tuple[int, ...]:
    """Return possible maximum lengths of a model with its own code, by the field names that such code uses."""
    if config.model_type in CONFIG_MAPPING:
        return ()
    values = vars(config.get_text_config())
    return tuple(v for name in _LIMITS if type(v := values.get(name)) is int and v > 0)


_LIMITS = (
    *("n_positions", "n_ctx", "num_positions", "max_positions", "context_length", "block_size"),
    *("seq_length", "seq_len", "max_seq_len", "max_seq_length", "max_seqlen", "max_sequence_length"),
)


def max_seq_len(config: PreTrainedConfig) -> int | None:
    """Return the model's maximum length in tokens; None when its config has no `max_position_embeddings`."""
    length = getattr(config.get_text_config(), "max_position_embeddings", None)
    return length if isinstance(length, int) and length > 0 else None


def _config_class(source: ModelSource, values: Mapping[str, Any]) -> Any:
    model_type = values.get("model_type")
    if model_type not in CONFIG_MAPPING and "auto_map" in values:
        raise refusals.own_code(source)
    if model_type not in CONFIG_MAPPING:
        raise refusals.unknown_type(source, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise refusals.not_causal(source)
    return CONFIG_MAPPING[model_type]


def _set_layers(values: dict[str, Any], config_class: Any, layers: int) -> None:
    """Change the number of layers, and every list with one entry per layer (`layer_types` and the like)."""
    defaults = config_class()
    text_defaults = defaults.get_text_config()
    part = next((name for name, value in vars(defaults).items() if value is text_defaults), None)
    text = values if part is None else values.setdefault(part, {})
    native = text_defaults.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    name = "num_hidden_layers" if "num_hidden_layers" in text else native
    depth = text.get(name, getattr(text_defaults, "num_hidden_layers", None))
    if depth is None:
        raise UsageError(f"--layers: {config_class.__name__} has no number of layers; change its fields with --set")
    text[name] = layers
    if hasattr(text_defaults, "decoder_layers"):  # the decoder of an encoder-decoder is the causal LM
        text["decoder_layers"] = layers
    for field, value in text.items():
        if isinstance(value, list) and len(value) == depth and depth > 1:
            text[field] = [value[i % depth] for i in range(layers)]


def _set(values: dict[str, Any], config_class: Any, name: str, value: Json) -> None:
    """Set the field `name` (dots separate nested configs) in a config's raw values."""
    known = config_class().to_dict() | values
    target, scope = values, known
    *outer, last = name.split(".")
    for part in outer:
        if not isinstance(scope.get(part), dict):
            raise refusals.no_such_field(name, scope)
        scope = scope[part]
        if not isinstance(target.get(part), dict):
            target[part] = {}
        target = target[part]
    if last not in scope and last not in config_class.attribute_map:
        raise refusals.no_such_field(name, scope)
    # Stored under the native name (n_embd); otherwise one spelling would silently override the other.
    target[config_class.attribute_map.get(last, last) if not outer else last] = value
