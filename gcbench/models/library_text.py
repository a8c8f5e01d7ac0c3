"""Look up a type of model in the source text of the installed transformers, whose import takes seconds.

When a file is missing or has another form the answer is None, and the child process, which imports it, decides. A
word that is nowhere in these files is not the name of a field or module; one that is may still not be.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path

_AUTO = "models/auto"
_SHARED_CONFIG = ("configuration_utils.py", "modeling_rope_utils.py", "utils/generic.py")
_SHARED_MODULES = ("conversion_mapping.py", "integrations/peft.py", "core_model_loading.py", "integrations/moe.py")
_PAIR = re.compile(r'\(\s*"([^"]+)",\s*"([^"]+)"\s*\)')
_LINEAR = re.compile(r"self\.(\w+) = (?:nn\.Linear|Conv1D)\(")


def is_known(model_type: str) -> bool | None:
    """Whether transformers has a config class for the type; True also where it is only possible."""
    texts = [_text(f"{_AUTO}/auto_mappings.py"), _text(f"{_AUTO}/configuration_auto.py")]
    if any(text is None or "CONFIG_MAPPING_NAMES" not in text for text in texts):
        return None
    return any(f'"{model_type}"' in (text or "") for text in texts)


def causal_lm_class(model_type: str) -> str | None:
    """The class that `AutoModelForCausalLM` builds of the type; "" for none; None where that is not known."""
    classes = _causal_lms()
    return None if classes is None else classes.get(model_type, "")


@cache
def _causal_lms() -> Mapping[str, str] | None:
    block = _block(f"{_AUTO}/modeling_auto.py", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES")
    found = dict(_PAIR.findall(block or ""))
    entries = len(re.findall(r"^ {8}\(", block or "", flags=re.MULTILINE))
    return found if found and len(found) == entries else None


def causal_types() -> tuple[str, ...]:
    """Every type that is built as a causal LM."""
    return tuple(_causal_lms() or ())


def is_encoder_decoder(model_type: str) -> bool:
    """Whether a config of the type is one of an encoder-decoder where it does not say."""
    text = _own_text("configuration", model_type) or ""
    return re.search(r"is_encoder_decoder: bool(?: \| None)? = True", text) is not None


def has_lora_targets(model_type: str) -> bool | None:
    """Whether peft may know which modules of the type get adapters; None without peft."""
    text = _text("utils/constants.py", package="peft")
    return None if text is None else f'"{model_type}"' in text


def no_lora_on(model_type: str) -> frozenset[str]:
    """Names of linear layers that peft gives no adapters in a model of the type: those of state-space layers."""
    text = _text("tuners/tuners_utils.py", package="peft") or ""
    types, names = (
        set(re.findall(r'"(\w+)"', found[1])) if (found := re.search(rf"{name} = {{([^}}]*)}}", text)) else set()
        for name in ("mamba_model_types", "incompatible_modules")
    )
    return frozenset(names if model_type in types else ())


def names_in_config(model_type: str) -> frozenset[str] | None:
    """Every word in the files that a config of the type is made of, each field's name among them."""
    return _words("configuration", model_type, _SHARED_CONFIG)


def names_in_model(model_type: str) -> frozenset[str] | None:
    """Every word in the files that a model of the type is made of; None where it may hold a model of another type."""
    text = _own_text("modeling", model_type)
    if text is None or re.search(r"Auto(Model|Backbone)\w*\.|setattr\(|add_module\(", text):
        return None
    return _words("modeling", model_type, _SHARED_MODULES)


def fields(model_type: str) -> tuple[str, ...]:
    """Names of fields that the config's own file declares, for near names."""
    found = re.findall(r"^ {4}(\w+): ", _own_text("configuration", model_type) or "", flags=re.MULTILINE)
    return tuple(dict.fromkeys(found))


def linear_layers(model_type: str) -> tuple[str, ...]:
    """Names of linear layers in the model's own file, less its output layer."""
    classes = re.split(r"^class ", _own_text("modeling", model_type) or "", flags=re.MULTILINE)
    # In the order of a layer: attention, and then what is after it.
    classes.sort(key=lambda text: "Attention" not in text.partition("(")[0])
    found = [name for text in classes for name in _LINEAR.findall(text)]
    return tuple(name for name in dict.fromkeys(found) if "head" not in name and "embed_out" not in name)


def own_name(model_type: str, field: str) -> str | None:
    """What the config of the type calls a field (gpt2's `max_position_embeddings` is `n_positions`).

    None where that is unknown: its file holds several configs that differ in this.
    """
    text = _own_text("configuration", model_type)
    if text is None:
        return None
    names = set(re.findall(rf'"{field}": "(\w+)"', text))
    if not names:
        return field
    return names.pop() if len(names) == 1 and len(re.findall(r"^class ", text, flags=re.MULTILINE)) == 1 else None


def has_one_list_of_layers(model_type: str) -> bool:
    """Whether a model of the type is one list of layers, as many as `num_hidden_layers`, each to be checkpointed."""
    text = _own_text("modeling", model_type) or ""
    own = own_name(model_type, "num_hidden_layers")
    names = "|".join({"num_hidden_layers", own or "num_hidden_layers"})
    return (
        "supports_gradient_checkpointing = True" in text
        and "supports_gradient_checkpointing = False" not in text
        and len(re.findall(r"^class \w+\((?:\w+, )*GradientCheckpointingLayer", text, flags=re.MULTILINE)) == 1
        and len(re.findall(rf"range\((?:self\.)?config\.(?:{names})\)", text)) == 1
        and not re.search(r"Auto(Model|Backbone)\w*\.", text)
    )


def _words(kind: str, model_type: str, shared: tuple[str, ...]) -> frozenset[str] | None:
    texts = [_text(path) for path in shared]
    module = _module(model_type)
    if module is None or texts[0] is None:
        return None
    waiting, seen = [module], set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        text = _text(f"models/{name}/{kind}_{name}.py")
        if text is None:
            if name == module:
                return None
            continue
        texts.append(text)
        waiting += re.findall(rf"{kind}_(\w+) import", text)
    return frozenset(word for text in texts if text for word in re.findall(r"\w+", text))


def _own_text(kind: str, model_type: str) -> str | None:
    module = _module(model_type)
    return None if module is None else _text(f"models/{module}/{kind}_{module}.py")


@cache
def _module(model_type: str) -> str | None:
    """The folder with the type's code."""
    special = dict(_specials())
    plain = model_type.replace("-", "_")
    module = special.get(model_type, plain).replace("-", "_")
    return module if _text(f"models/{module}/__init__.py") is not None else None


def _specials() -> Iterator[tuple[str, str]]:
    block = _block(f"{_AUTO}/auto_mappings.py", "SPECIAL_MODEL_TYPE_TO_MODULE_NAME")
    yield from _PAIR.findall(block or "")


def _block(path: str, name: str) -> str | None:
    """What stands in the parentheses of `name = OrderedDict(…)`."""
    text = _text(path) or ""
    _, found, rest = text.partition(f"\n{name} = OrderedDict(")
    return rest.partition("\n)")[0] if found else None


@cache
def _text(path: str, *, package: str = "transformers") -> str | None:
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        return None
    return _read(Path(spec.origin).parent / path)


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
