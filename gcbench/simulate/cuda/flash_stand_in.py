"""Replaces transformers' flash_attention_2 on fake tensors by torch's flash kernel, without its package."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface
from transformers.integrations.flash_attention import get_target_dtype
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

from gcbench.models.flash_attention import STAND_IN
from gcbench.simulate.cuda.attention import flash


def register() -> None:
    """Make `STAND_IN` an attention implementation of transformers in this process."""
    AttentionInterface.register(STAND_IN, _attend)
    AttentionMaskInterface.register(STAND_IN, flash_attention_mask)


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Prepare a call without padding as `flash_attention_forward` in transformers/integrations/flash_attention.py does.

    Query, key and value have shape (batch, heads, sequence, head dimension), key and value with their own number of
    heads, which the kernel accepts; a sliding window changes no buffer. Returns (batch, sequence, heads,
    head dimension).
    """
    head_dim, value_dim = query.shape[-1], value.shape[-1]
    if value_dim != head_dim:
        value = functional.pad(value, [0, head_dim - value_dim])
    dtype = get_target_dtype(query, module)
    if dtype is not None:
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
    out = flash(query, key, value, dropout, causal, scaling).transpose(1, 2)
    return out[..., :value_dim] if value_dim != head_dim else out, None
