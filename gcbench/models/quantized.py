"""Recognise a quantised checkpoint by its config.json, and name its quantisation. No torch.

The size of quantised weights, and what their kernels save for the backward pass, are not modelled: such a checkpoint
is refused, unless the user requests full weights instead.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gcbench.core.errors import UnavailableError
from gcbench.core.records import Json

KEY = "quantization_config"
OVERRIDE = f"--set {KEY}=null"
_DICTS = (KEY, "compression_config", "quantization", "quant_config")
"""Fields with quantisation settings: of transformers, older compressed-tensors, MLX, and older AWQ."""
_FLAGS = {"load_in_4bit": ("bitsandbytes", "4"), "load_in_8bit": ("bitsandbytes", "8")}
"""Top-level fields of older bitsandbytes checkpoints."""
_BIT_FIELDS = ("quantization_bit",)
"""Fields of older checkpoints with their own code (ChatGLM, Qwen-VL); 0 means not quantised."""
_DTYPES = ("dtype", "torch_dtype")
_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq", "hf_quant_config.json": "modelopt"}
"""Files beside config.json, and the methods that write them."""
_BITS_OF_METHOD = {
    **dict.fromkeys(("fp8", "fbgemm_fp8", "mxfp8", "eetq"), "8"),
    **dict.fromkeys(("mxfp4", "nvfp4", "fp_quant", "fouroversix"), "4"),
    "bitnet": "2",
}
"""Bits by method, where the config may omit them; BitNet packs four ternary weights into a byte."""
_NUMBER_FIELDS = ("bits", "w_bit", "nbits", "num_bits", "weight_bits", "quantization_bit", "bits_per_weight")
_TEXT_FIELDS = (
    "weights",
    "weights_dtype",
    "quant_type",
    "quant_algo",
    "weight_dtype",
    "forward_dtype",
    "dtype",
    "format",
)
_NAMED_BITS = (
    re.compile(r"(?:int|fp|float)([1-8])_?weight", re.IGNORECASE),  # before what the same name says of activations
    re.compile(r"(?:int|fp|float|nf|w)_?([1-8])(?!\d)", re.IGNORECASE),
)


@dataclass(frozen=True, kw_only=True)
class Quantisation:
    """One field of a config that declares quantised weights.

    Attributes:
        path: names of the nested configs that contain it; empty for the config itself.
        field: name of the field, or of the file beside config.json.
        method: `bitsandbytes nf4`, `gptq`, …, as the config names it.
        bits: bits per weight; None when the config does not declare them.
    """

    path: tuple[str, ...]
    field: str
    method: str | None
    bits: str | None

    @property
    def words(self) -> str:
        """Description such as `4-bit (bitsandbytes nf4)`."""
        if self.bits is None:
            return f"quantised ({self.method})" if self.method else "quantised"
        return f"{self.bits}-bit ({self.method})" if self.method else f"{self.bits}-bit"


def found(config: Mapping[str, Any], path: tuple[str, ...] = ()) -> tuple[Quantisation, ...]:
    """Return every field of a raw config, nested ones included, that declares quantised weights."""
    places = list(_own(config, path))
    for name, value in config.items():
        if isinstance(value, Mapping) and name not in _DICTS:
            places += found(value, (*path, name))
    return tuple(places)


def found_beside(folder: Path) -> tuple[Quantisation, ...]:
    """Return the quantisation that files beside config.json declare."""
    places = []
    for name, maker in _FILES.items():
        try:
            content = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        values = content.get("quantization", content) if isinstance(content, dict) else None
        # ModelOpt's is also written where nothing but the cache is quantised.
        if isinstance(values, dict) and values and (maker != "modelopt" or values.get("quant_algo")):
            method = f"modelopt {values['quant_algo']}" if maker == "modelopt" else _method(values) or maker
            places.append(Quantisation(path=(), field=name, method=method, bits=_bits(values, method)))
    return tuple(places)


def without(config: Mapping[str, Any], overrides: Mapping[str, Json]) -> dict[str, Any]:
    """Return a copy of the config without the quantisation that `overrides` remove by `quantization_config=null`.

    In a nested config this removes the quantisation inside it; at the top level, all of it.
    """
    paths = [tuple(name.split(".")[:-1]) for name, value in overrides.items() if _takes_out(name, value)]
    result = copy.deepcopy(dict(config))
    for place in found(config):
        if any(place.path[: len(path)] == path for path in paths):
            part = result
            for name in place.path:
                part = part[name]
            part.pop(place.field, None)
    return result


def other_changes(overrides: Mapping[str, Json]) -> dict[str, Json]:
    """Return the changes of a config that do not remove quantisation."""
    return {name: value for name, value in overrides.items() if not _takes_out(name, value)}


def taken_out(overrides: Mapping[str, Json]) -> dict[str, Json]:
    """Return the changes that remove quantisation from a config, without which a quantised one is refused."""
    return {name: value for name, value in overrides.items() if _takes_out(name, value)}


def check(
    name: str, config: Mapping[str, Any], overrides: Mapping[str, Json], beside: tuple[Quantisation, ...] = ()
) -> tuple[Quantisation, ...]:
    """Return the quantisation that `overrides` replace by full weights; empty for a checkpoint without any.

    Raises UnavailableError for a quantised checkpoint, and for one that `overrides` would quantise.
    """
    places = (*found(config), *beside)
    left = (*found(_changed(without(config, overrides), overrides)), *(() if _all_out(overrides) else beside))
    if left:
        raise UnavailableError(refusal(name, left[0]))
    return places


def refusal(name: str, place: Quantisation) -> str:
    """Return why a quantised checkpoint is refused, with the remedy."""
    return (
        f"{name!r} is a quantised checkpoint: its weights are {place.words}, whose memory gcbench does not "
        f"model; use the unquantised model, or add {OVERRIDE} to use full weights in --precision instead"
    )


def pretrained_refusal(name: str, place: Quantisation) -> str:
    """Return why the weights of a quantised checkpoint are not loaded, with the remedy."""
    return (
        f"--pretrained: the stored weights of {name!r} are {place.words} and cannot be loaded as full weights; leave "
        "out --pretrained, or use the unquantised model"
    )


def notice(places: tuple[Quantisation, ...], full: str) -> str:
    """Return the notice that full weights replace quantised ones; `full` is `in bf16`."""
    words = " and ".join(dict.fromkeys(place.words for place in places))
    return f"The checkpoint is {words}; gcbench uses full weights {full}."


def _takes_out(name: str, value: Json) -> bool:
    if name.rpartition(".")[2] in _DICTS:
        return value in (None, "", {}) or (isinstance(value, str) and value.lower() in ("null", "none"))
    return False


def _all_out(overrides: Mapping[str, Json]) -> bool:
    return any("." not in name and _takes_out(name, value) for name, value in overrides.items())


def _changed(config: dict[str, Any], overrides: Mapping[str, Json]) -> dict[str, Any]:
    """Return the config with those changes that could quantise it."""
    for name, value in other_changes(overrides).items():
        *outer, last = name.split(".")
        if last not in (*_DICTS, *_FLAGS, *_BIT_FIELDS, *_DTYPES):
            continue
        part: Any = config
        for step in outer:
            part = part.setdefault(step, {}) if isinstance(part, dict) else None
        if isinstance(part, dict):
            part[last] = value
    return config


def _own(config: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[Quantisation]:
    for field in _DICTS:
        value = config.get(field)
        if isinstance(value, Mapping) and value:
            if field in ("quantization", "quant_config") and not _is_quantisation(value):
                continue
            method = _method(value) or ("mlx" if field == "quantization" else None)
            yield Quantisation(path=path, field=field, method=method, bits=_bits(value, method))
        elif field == KEY and value and not isinstance(value, Mapping):
            yield Quantisation(path=path, field=field, method=str(value) if isinstance(value, str) else None, bits=None)
    for field, (method, bits) in _FLAGS.items():
        if config.get(field) is True:
            yield Quantisation(path=path, field=field, method=method, bits=bits)
    for field in _BIT_FIELDS:
        value = config.get(field)
        if isinstance(value, int) and 0 < value < 16:
            yield Quantisation(path=path, field=field, method=None, bits=str(value))
    for field in _DTYPES:
        value = config.get(field)
        narrow = re.search(r"(?:float|u?int)([48])(?!\d)", value) if isinstance(value, str) else None
        if narrow:
            yield Quantisation(path=path, field=field, method=str(value).removeprefix("torch."), bits=narrow[1])


def _is_quantisation(values: Mapping[str, Any]) -> bool:
    """Return whether a field with a common name declares quantisation: it names a method or bits."""
    return bool(_method(values)) or _bits(values, None) is not None


def _method(values: Mapping[str, Any]) -> str | None:
    name = next((values[key] for key in ("quant_method", "quantization_method") if values.get(key)), None)
    if name is None:
        if any(key.lstrip("_").startswith(("load_in_", "bnb_")) for key in values):
            name = "bitsandbytes"
        else:
            name = values.get("quant_algo") or values.get("quant_type") or values.get("version")
    if name is None or not isinstance(name, str):
        return None
    kind = values.get("bnb_4bit_quant_type") if _is_on(values, "load_in_4bit") else None
    algorithm = values.get("quant_algo") if name == "modelopt" else None
    more = next((text for text in (kind, algorithm) if isinstance(text, str)), None)
    return f"{name} {more}" if more else name


def _is_on(values: Mapping[str, Any], flag: str) -> bool:
    return values.get(flag) is True or values.get(f"_{flag}") is True


def _bits(values: Mapping[str, Any], method: str | None) -> str | None:
    """Return the bits per weight, from flags, numbers or names anywhere in the field."""
    for flag, (_, bits) in _FLAGS.items():
        if _is_on(values, flag):
            return bits
    number = next(_numbers(values), None)
    if number is not None:
        return number
    known = _BITS_OF_METHOD.get((method or "").partition(" ")[0].lower())
    if known is not None:
        return known
    texts = [*_texts(values), method or ""]
    named = next((match for pattern in _NAMED_BITS for text in texts if (match := pattern.search(text))), None)
    return named[1] if named else None


def _numbers(value: Any) -> Iterator[str]:
    """Yield numeric bits in a field: top-level ones before nested ones, without those of activations."""
    if not isinstance(value, Mapping):
        return
    for name in _NUMBER_FIELDS:
        bits = value.get(name)
        if isinstance(bits, str) and bits.isdecimal():
            bits = int(bits)
        if isinstance(bits, (int, float)) and not isinstance(bits, bool) and 0 < bits < 16:
            yield f"{bits:g}"
    for name, part in value.items():
        if "activation" not in name and "cache" not in name:
            yield from _numbers(part)


def _texts(value: Any) -> Iterator[str]:
    if not isinstance(value, Mapping):
        return
    for name in _TEXT_FIELDS:
        text = value.get(name)
        if isinstance(text, str):
            yield text
        elif isinstance(text, Mapping):
            yield from _strings(text)
    for name, part in value.items():
        if "activation" not in name and "cache" not in name and name not in _TEXT_FIELDS:
            yield from _texts(part)


def _strings(value: Any) -> Iterator[str]:
    """Yield all text in a value, including field names, which torchao uses for kinds of weights."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, part in value.items():
            yield from (str(name), *_strings(part))
