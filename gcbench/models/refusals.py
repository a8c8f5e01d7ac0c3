"""Word the errors and notices about a model that is refused, or built with another class than its config names.

No torch.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gcbench.core.errors import MissingLibrary, UnavailableError, UsageError, first_sentence
from gcbench.core.records import ALL_LINEAR
from gcbench.models import catalogue, library_text
from gcbench.models.sources import ModelSource

_MOST_NAMES = 10
"""Most names that an error message lists."""
_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
"""Fields, besides the vocabulary, by which two models have the same sizes."""
_TEXT_PARTS = ("text_config", "llm_config", "language_config", "thinker_config")
_MULTIMODAL = re.compile(r"vision|audio|image|speech|video")
_LABELS = re.compile(r"For(Sequence|Token)Classification|ForQuestionAnswering|ForMultipleChoice|Reward|ForNextSentence")
_BODY = re.compile(r"(?<!DoubleHeads)Model$")
_CAUSAL_NAME = re.compile(r"ForCausalLM|LMHeadModel|LMHead$|WithLMHead")


def own_code(source: ModelSource) -> UnavailableError:
    """Return the error for a model with its own code, which the user has not allowed to run."""
    return UnavailableError(
        f"{source.name!r} brings its own code for model_type {source.config.get('model_type')!r}, which gcbench does "
        "not run by default; read that code, then add --trust-remote-code"
    )


def unknown_type(source: ModelSource, known: Iterable[str] = ()) -> UnavailableError:
    """Return the error for a type that transformers does not have; `known` are those that it has."""
    model_type = str(source.config.get("model_type"))
    near = difflib.get_close_matches(model_type, list(known), n=1, cutoff=0.75)
    hint = f"did you mean {near[0]}? Else " if near else ""
    return UnavailableError(
        f"the config of {source.name!r} has model_type {model_type!r}, which this transformers does not know; {hint}"
        "upgrade transformers (or, for a type that it has dropped, install an older one), or fix the config"
    )


def not_causal(source: ModelSource) -> UnavailableError:
    """Return the error for a type without a causal LM; with the command that extracts its text model, if it has one."""
    model_type = source.config.get("model_type")
    what = f"{source.name!r} is a {model_type} model, which transformers cannot build as a causal language model"
    text = _text_part(source.config)
    if text is None:
        return UnavailableError(f"{what}; choose a causal LM (gcbench models lists some)")
    part, values, kind = text
    twin = same_sizes(values, kind)
    if twin is not None:
        return UnavailableError(f"{what}; its text model has the sizes of {twin}, so use -m {twin}")
    command = _to_type(source, part, values, kind)
    return UnavailableError(f"{what}; write its text model to a separate file: {command}, then use -m text.json")


def is_encoder_decoder(config: Mapping[str, Any]) -> bool:
    """Return whether a config is one of an encoder-decoder, whose decoder alone would be the causal LM."""
    name, stated = _architecture(config), config.get("is_encoder_decoder")
    if name and _CAUSAL_NAME.search(name):
        return False
    return stated if isinstance(stated, bool) else library_text.is_encoder_decoder(str(config["model_type"]))


def encoder_decoder(source: ModelSource, built: str) -> UnavailableError:
    """Return the error for an encoder-decoder, of which only the decoder would be built."""
    return UnavailableError(
        f"{source.name!r} is an encoder-decoder ({_architecture(source.config) or source.config.get('model_type')}), "
        f"and gcbench trains causal LMs; choose one, or add --set is_encoder_decoder=false to train its decoder alone "
        f"({built})"
    )


def no_such_field(name: str, scope: Iterable[str]) -> UsageError:
    """Return the error for a change of a field that the config does not have."""
    near = difflib.get_close_matches(name.rpartition(".")[2], list(scope), n=3)
    hint = f"; did you mean {' or '.join(near)}?" if near else "; look the name up in its config.json"
    return UsageError(f"--set {name}: the model's config has no such field{hint}")


def no_such_module(lost: Sequence[str], parts: Iterable[str], linear: Sequence[str]) -> UsageError:
    """Return the error for LoRA targets that the model lacks; `parts` names its modules, `linear` its linear layers."""
    others = [name for name in parts if not name.isdecimal()]
    near = dict.fromkeys(found for name in lost for found in difflib.get_close_matches(name, [*linear, *others], n=1))
    hint = f"did you mean {' and '.join(near)}? " if near else ""
    named = " or ".join(map(repr, lost))
    return UsageError(
        f"--lora-target-modules: the model has no module {named}; {hint}its linear layers are {some_of(linear)}"
    )


def no_default_targets(model_type: str, linear: Sequence[str]) -> UsageError:
    """Return the error for a type of model without default target modules in peft."""
    return UsageError(
        f"--lora-r: peft has no default target modules for a {model_type} model; {name_targets(model_type, linear)}"
    )


def name_targets(model_type: str, linear: Sequence[str]) -> str:
    """Return the remedy when peft has no default: the targets that it accepts."""
    possible = possible_targets(model_type, linear)
    if possible != (ALL_LINEAR,):
        return f"add --lora-target-modules {','.join(possible)}, the linear layers that peft can adapt, or some of them"
    some = f", or some of its linear layers: {some_of(linear)}" if linear else ""
    return f"add --lora-target-modules {ALL_LINEAR}{some}"


def possible_targets(model_type: str, linear: Sequence[str]) -> tuple[str, ...]:
    """Return the linear layers that peft can adapt, as values of --lora-target-modules."""
    refused = library_text.no_lora_on(model_type)
    return tuple(name for name in linear if name not in refused) if refused & set(linear) else (ALL_LINEAR,)


def some_of(names: Sequence[str]) -> str:
    """Join the names, or the first few of many."""
    more = ", …" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more


def missing_library(name: str, err: BaseException) -> MissingLibrary | None:
    """Return the error for a missing package that the model's code needs; None for any other error."""
    text = " ".join(str(err).split())
    found = re.search(r"requires the (\S+) library", text) or re.search(r"pip install (?:-U )?`?([\w.\[\]-]+)", text)
    if not found and isinstance(err, ModuleNotFoundError) and err.name:
        found = re.match(r"([^.]+)", err.name)
    if not isinstance(err, ImportError) or not found:
        return None
    return MissingLibrary(
        f"the code of {name!r} needs the package {found[1]}, which is not installed ({first_sentence(err)}); install "
        f"it with pip install {found[1]}"
    )


def other_architecture(config: Mapping[str, Any], built: str) -> str | None:
    """Return the notice for a config of another class than the causal LM that is built; None for a causal LM."""
    name = _architecture(config)
    if name == built or (name and _CAUSAL_NAME.search(name)):
        return None
    if library_text.is_encoder_decoder(str(config["model_type"])):
        return f"The config is of {name or 'an encoder-decoder'}; gcbench trains only its decoder ({built})."
    if not name:
        return None
    if any(_MULTIMODAL.search(field) and isinstance(value, Mapping) for field, value in config.items()):
        return f"The config is of {name}; gcbench trains only its text model ({built})."
    vocabulary = config.get("vocab_size")
    size = f"{vocabulary:,} " if isinstance(vocabulary, int) else ""
    start = f"The config is of {name}; gcbench trains {built} instead, a causal LM"
    if name.endswith("ForMaskedLM"):
        return (
            f"{start} with the same layers and logits over {size}tokens, each of which attends to only those before it."
        )
    logits = f"with logits over {size}tokens at every position"
    if _LABELS.search(name) or _BODY.search(name):
        return f"{start} {logits}, which {name} does not have: its own memory and time are lower."
    return f"{start} {logits}; memory and time of {name} differ."


def same_sizes(values: Mapping[str, Any], model_type: str) -> str | None:
    """Return a model of the catalogue with these sizes and this type; None without one."""
    sizes = [values.get(field) for field in _SIZES]
    if not all(isinstance(size, int) for size in sizes[:3]):
        return None
    for entry in catalogue.architectures():
        config = catalogue.config_of(entry)
        if (
            config.get("model_type") == model_type
            and [config.get(field) for field in _SIZES] == sizes
            and config.get("vocab_size") == values.get("vocab_size")
        ):
            return entry.name
    return None


def _architecture(config: Mapping[str, Any]) -> str | None:
    names = config.get("architectures")
    return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None


def _text_part(config: Mapping[str, Any]) -> tuple[tuple[str, ...], Mapping[str, Any], str] | None:
    """Return the path of the text model in a multimodal config, its values, and a type that it can be built as."""
    for name in _TEXT_PARTS:
        part = config.get(name)
        if not isinstance(part, Mapping):
            continue
        within = _text_part(part)
        if within is not None:
            return ((name, *within[0]), within[1], within[2])
        kind = _causal_type(str(part.get("model_type") or config.get("model_type")))
        if kind is not None:
            return ((name,), part, kind)
    if any(_MULTIMODAL.search(name) and isinstance(value, Mapping) for name, value in config.items()):
        kind = _causal_type(str(config.get("model_type")))
        if kind is not None and "hidden_size" in config:
            return ((), config, kind)
    return None


def _causal_type(model_type: str) -> str | None:
    """Return the type itself, or that of its text model (`qwen2` for `qwen2_5_vl_text`); None without a causal LM."""
    plain = re.sub(r"_(vl|omni|audio|v|text|thinker)(?=_|$)", "", model_type)
    versions = (model_type, plain, re.sub(r"(?<=[a-z0-9])v(?=_|$)", "", plain), re.sub(r"(\d)_5(?=_|$)", r"\1", plain))
    return next((each for each in versions if library_text.causal_lm_class(each)), None)


def _to_type(source: ModelSource, part: tuple[str, ...], values: Mapping[str, Any], kind: str) -> str:
    """Return a command that writes the text model's config to text.json.

    It leaves out positions in several dimensions (mrope), which only images need and text models do not accept.
    """
    where = "".join(f"[{name!r}]" for name in part)
    ropes = [name for name in ("rope_scaling", "rope_parameters") if _is_mrope(values.get(name))]
    rest = f" and k not in {ropes!r}" if ropes else ""
    code = (
        f"import json; c = json.load(open({_path(source)!r})){where}; "
        f"c = {{k: v for k, v in c.items() if not k.endswith('_config'){rest}}}; c['model_type'] = {kind!r}; "
        "json.dump(c, open('text.json', 'w'))"
    )
    return f'python -c "{code}"'


def _is_mrope(rope: object) -> bool:
    return isinstance(rope, Mapping) and "mrope" in (rope.get("type"), rope.get("rope_type"))


def _path(source: ModelSource) -> str:
    return source.config_path or str(Path(source.location) / "config.json")
