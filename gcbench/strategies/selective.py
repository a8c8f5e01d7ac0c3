"""`selective:OPS`: in each checkpointed layer, save the outputs of some operators and recompute the rest."""

from __future__ import annotations

import re

from gcbench.strategies._base import Change, Kind

ATTENTION = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
    "_flash_attention_forward",
    "_efficient_attention_forward",
)
"""Fused attention operators. Eager attention calls none of them: it runs matrix products and a softmax."""
MATMUL = ("mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "_scaled_mm", "_scaled_grouped_mm")
NAMED = {"attention": ATTENTION, "matmul": (*MATMUL, *ATTENTION)}

_OPERATOR = re.compile(r"([a-z_]\w*::)?[a-z_]\w*(#\d+)?")


def _parse(argument: str | None) -> Change:
    names = [name for name in (argument or "").split("/") if name]
    if not names or not all(_OPERATOR.fullmatch(name) for name in names):
        shown = "selective" if argument is None else f"selective:{argument}"
        raise ValueError(
            f"{shown!r} does not name the operators to save; write selective:attention, selective:matmul or "
            "operators joined by slashes, like selective:mm/addmm"
        )
    names = list(dict.fromkeys(names))
    keep = tuple(dict.fromkeys(op for name in names for op in NAMED.get(name, (name,))))
    return Change(spec=f"selective:{'/'.join(names)}", to=lambda plan: plan.with_policies(keep=keep), operators=keep)


KIND = Kind(
    syntax="selective:OPS",
    kept="each layer's input and, inside the layer, the outputs of attention (selective:attention), of matrix "
    "products and attention (selective:matmul) or of named operators (selective:mm/_softmax; mm#2 is the third call "
    "of mm)",
    recomputed="the rest of every layer; with a choice of layers (every:2+selective:matmul), the rest of those",
    elsewhere="torch create_selective_checkpoint_contexts, torchtitan selective 'op', Megatron selective "
    "(Korthikanti et al. 2022)",
    parse=_parse,
)
