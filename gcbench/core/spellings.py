"""Translate other tools' names of precisions, optimizers, attention kernels, strategies and devices into gcbench's.

An unambiguous name is translated; an ambiguous one is refused with the likely intended names. No torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

TOKENS_PER_K = 1024
"""Tokens per k in a context length such as `4k`."""

_PRECISIONS: Mapping[str, tuple[str, ...]] = {
    "fp32": ("float32", "float", "32", "32-true", "fp32-true", "full", "single", "no"),
    "bf16": ("bfloat16", "bf16-true", "bf16-full", "bf16-pure", "full-bf16", "pure-bf16", "true-bf16"),
    "bf16-mixed": ("bfloat16-mixed", "mixed-bf16", "mixed-bfloat16", "amp-bf16", "bf16-amp", "bf16mixed"),
    "fp16-mixed": ("16-mixed", "float16-mixed", "mixed-fp16", "mixed-float16", "amp-fp16", "fp16-amp", "fp16mixed"),
}
_HALF = ("float16", "fp16", "half", "16")
"""Read as fp16-mixed, because nobody trains weights that are themselves fp16."""
_NO_PRECISIONS: Mapping[str, str] = {
    **dict.fromkeys(
        ("16-true", "fp16-true", "full-fp16", "pure-fp16", "fp16-full"),
        "fp16 weights are not supported; did you mean fp16-mixed (weights in fp32, computation in fp16)?",
    ),
    **dict.fromkeys(
        ("amp", "mixed", "auto", "automatic", "mixed-precision"),
        "it is ambiguous; did you mean bf16-mixed or fp16-mixed?",
    ),
    "tf32": "it changes fp32 matrix products and not the memory; did you mean fp32?",
    **dict.fromkeys(
        ("fp8", "float8", "int8", "8bit", "8-bit", "int4", "4bit", "4-bit", "nf4", "fp4", "nvfp4", "mxfp8"),
        "quantised weights are not supported; legal are fp32, bf16, bf16-mixed, fp16-mixed",
    ),
}
_OPTIMIZERS: Mapping[str, tuple[str, ...]] = {
    "adamw_torch": ("adamw", "adam-w", "adamw-hf", "torch.optim.adamw", "optim.adamw", "adamw-pytorch"),
    "adamw_torch_fused": ("adamw-fused", "fused-adamw", "adamw-torch-fused", "adamwfused", "fused"),
    "sgd": ("torch.optim.sgd", "optim.sgd"),
    "adafactor": ("torch.optim.adafactor", "transformers.adafactor"),
}
_ATTENTION: Mapping[str, tuple[str, ...]] = {
    "flash_attention_2": (
        *("flash", "fa", "fa2", "flash2", "flash-2", "flash-attn", "flash-attn-2", "flash-attention", "flashattention"),
        *("flash-attention2", "flashattention2", "flashattention-2"),
    ),
    "flash_attention_3": ("fa3", "flash3", "flash-3", "flash-attn-3", "flash-attention3", "flashattention3"),
    "flex_attention": ("flex", "flex-attn", "flexattention"),
    "sdpa": ("sdp", "torch-sdpa", "pytorch-sdpa", "scaled-dot-product-attention", "torch"),
    "eager": ("vanilla", "naive"),
}
_NO_ATTENTION: Mapping[str, str] = {
    "math": "sdpa selects this kernel automatically; did you mean eager or sdpa?",
    **dict.fromkeys(
        ("xformers", "efficient", "memory-efficient", "mem-efficient", "cudnn"),
        "sdpa selects this kernel automatically where it can; did you mean sdpa?",
    ),
}
_OFF = ("none", "no", "false", "disabled", "disable", "baseline", "no-checkpointing")
_PER_LAYER = (
    "per-layer",
    "full",
    "all",
    "layer",
    "layers",
    "per-layers",
    "perlayer",
    "each",
    "every-layer",
    "all-layers",
)
_CHOICES = ("every", "segment", "first", "last", "uniform", "selective")
_AS = {"uniform": "segment"}
"""Megatron's `uniform`."""


def precision(text: str) -> str:
    """Return the precision that `text` means, or `text` if it is no other tool's name of one; raises ValueError."""
    plain = _plain(text)
    if plain in _NO_PRECISIONS:
        raise ValueError(f"{text!r} is unknown: {_NO_PRECISIONS[plain]}")
    if plain in _HALF:
        return "fp16-mixed"
    return _found(plain, _PRECISIONS) or text


def optimizer(text: str, legal: Sequence[str]) -> str:
    """Return the optimizer that `text` means, or `text`; raises ValueError for a known one that is not supported."""
    plain = _plain(text)
    found = _found(plain, _OPTIMIZERS)
    if found is not None:
        return found
    if re.search(r"8-?bit|4-?bit|paged|bnb|bitsandbytes|galore|apollo|lomo|grokadamw|ademamix", plain):
        raise ValueError(
            f"gcbench does not support the optimizer {text!r}; legal are {', '.join(legal)}, and gcbench plan reports "
            "how much memory an 8-bit AdamW would free"
        )
    if plain in (
        "adam",
        "adam-torch",
        "torch-adam",
        "adam-fused",
        "apex-adamw",
        "adamw-apex-fused",
        "adamw-anyprecision",
    ):
        fused = "fused" in plain or "apex" in plain
        raise ValueError(f"{text!r} is unknown; did you mean {'adamw_torch_fused' if fused else 'adamw_torch'}?")
    return text


def attention(text: str) -> str:
    """Return the attention implementation that `text` means, or `text` for transformers to check; raises ValueError."""
    plain = _plain(text)
    if plain in _NO_ATTENTION:
        raise ValueError(f"{text!r} is not an attention implementation of transformers: {_NO_ATTENTION[plain]}")
    named = {name.replace("_", "-"): name for name in _ATTENTION}
    return named.get(plain) or _found(plain, _ATTENTION) or text


def strategy(text: str) -> str:
    """Return the spec of a strategy with its parts in gcbench's spelling; unknown parts stay unchanged."""
    if text.strip().lower().startswith("plan:"):
        return text
    return "+".join(_part(part.strip()) for part in text.split("+"))


def _part(text: str) -> str:
    plain = _plain(text)
    if plain in _OFF:
        return "off"
    if plain in _PER_LAYER:
        return "per-layer"
    match = re.fullmatch(rf"({'|'.join(_CHOICES)})[-=]?(\d+|(?<=[-=])[a-z][\w/#:-]*)", plain)
    if match is None:
        return re.sub(r"^uniform:", "segment:", text, flags=re.IGNORECASE)
    return f"{_AS.get(match[1], match[1])}:{text.strip()[match.start(2) :]}"


def device(text: str) -> str:
    """Return `gpu`, `cuda0` and the like in torch's spelling; other names stay unchanged."""
    plain = _plain(text).replace("-", "")
    match = re.fullmatch(r"(?:gpu|cuda)(?::?(\d+))?", plain) or re.fullmatch(r"(\d)", plain)
    if match is None:
        return text
    return f"cuda:{int(match[1])}" if match[1] else "cuda"


def no_cuda_device(text: str) -> str | None:
    """Describe a processor that is neither a CUDA card nor the CPU, such as an Apple GPU or a TPU; None for others."""
    plain = _plain(text).replace("-", "")
    if re.fullmatch(
        r"mps|metal|apple.*|(?:mac(?:book)?(?:pro|air|mini|studio)?)?m[1-9](?:pro|max|ultra)?(?:\d+gb?)?", plain
    ):
        return "an Apple GPU"
    if re.fullmatch(r"tpu.*|v[2-6][ep]?", plain):
        return "a TPU"
    if re.fullmatch(
        r"hpu.*|gaudi.*|xpu.*|arc[ab]?\d+.*|npu.*|ascend.*|910[abc]?|trainium.*|trn\d.*|inferentia.*", plain
    ):
        return "an accelerator of another kind"
    return None


def count(text: str) -> str:
    """Return a number in plain digits: `16.0` is 16 and `4_096` is 4096; anything else stays unchanged."""
    plain = text.strip()
    if re.fullmatch(r"\d+\.0+", plain):
        return plain.partition(".")[0]
    return plain.replace("_", "") if re.fullmatch(r"\d+(?:_\d+)+", plain) else plain


def tokens(text: str) -> str:
    """Return a length in tokens in plain digits: as `count`, and `4k` is 4096."""
    match = re.fullmatch(r"(\d+)\s*[kK]", text.strip())
    return str(int(match[1]) * TOKENS_PER_K) if match is not None else count(text)


def notices(precisions: Sequence[str], lengths: Sequence[str]) -> tuple[str, ...]:
    """Return sentences on values that may have been meant differently."""
    sentences = [
        f"--precision {text} is read as fp16-mixed: weights in fp32, computation in fp16."
        for text in precisions
        if _plain(text) in _HALF
    ]
    sentences += [
        f"--seq-len {text} is read as {tokens(text)} tokens." for text in lengths if text.strip()[-1:] in ("k", "K")
    ]
    return tuple(dict.fromkeys(sentences))


def _plain(text: str) -> str:
    return re.sub(r"[_\s]+", "-", text.strip().lower().removeprefix("torch."))


def _found(plain: str, table: Mapping[str, tuple[str, ...]]) -> str | None:
    return next((name for name, others in table.items() if plain in others), None)
