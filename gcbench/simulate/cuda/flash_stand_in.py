"""Replaces transformers' flash_attention_2 on fake tensors by torch's flash kernel, without its package.

The package's functions allocate what torch's kernels do: `mha_fwd`, `mha_bwd`, `mha_varlen_fwd` and `mha_varlen_bwd` of
csrc/flash_attn/flash_api.cpp, and flash_attn/flash_attn_interface.py, github.com/Dao-AILab/flash-attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface
from transformers.integrations.flash_attention import get_target_dtype
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

from gcbench.models.flash_attention import STAND_IN
from gcbench.simulate.cuda.attention import flash

_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


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
    """Prepare a call as `flash_attention_forward` in transformers/integrations/flash_attention.py does.

    Query, key and value have shape (batch, heads, sequence, head dimension), key and value with their own number of
    heads, which the kernel accepts; a sliding window changes no buffer. `cu_seq_lens_q` and the other three arguments
    of packed sequences select the kernel for lengths that vary. So does a mask of shape (batch, sequence): how many
    tokens are padding is a value, so that all are taken for tokens. Returns (batch, sequence, heads, head dimension).
    """
    head_dim, value_dim = query.shape[-1], value.shape[-1]
    if value_dim != head_dim:
        value = functional.pad(value, [0, head_dim - value_dim])
    dtype = get_target_dtype(query, module)
    if dtype is not None:
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
    lengths = [kwargs.get(name) for name in _PACKED]
    if attention_mask is not None:
        out = _padded(query, key, value, dropout, causal, scaling)
    elif None not in lengths:
        out = _packed(query, key, value, lengths, dropout, causal, scaling)
    else:
        out = flash(query, key, value, dropout, causal, scaling).transpose(1, 2)
    return out[..., :value_dim] if value_dim != head_dim else out, None


def _packed(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lengths: Sequence[Any],
    dropout: float,
    causal: bool,
    scaling: float | None,
) -> torch.Tensor:
    """Run several sequences as one, in (tokens, heads, head dimension), as `flash_attn_varlen_func` does."""
    batch = query.shape[0]
    tokens = [tensor.transpose(1, 2).reshape(-1, *_per_token(tensor)) for tensor in (query, key, value)]
    out = _varlen(tokens, lengths, dropout, causal, scaling)
    return out.view(batch, -1, *out.shape[1:])


def _padded(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout: float, causal: bool, scaling: float | None
) -> torch.Tensor:
    """Take the tokens out of a padded batch and put the results back, as `_upad_input` and `pad_input` do."""
    batch, _, length, _ = query.shape
    chosen = torch.arange(batch * length, device=query.device)
    ends = torch.arange(batch + 1, dtype=torch.int32, device=query.device)
    tokens = [tensor.transpose(1, 2).reshape(-1, *_per_token(tensor))[chosen] for tensor in (query, key, value)]
    out = _varlen(tokens, (ends, ends, length, length), dropout, causal, scaling)
    whole = torch.zeros(batch * length, *out.shape[1:], dtype=out.dtype, device=out.device)
    whole[chosen] = out
    return whole.view(batch, length, *out.shape[1:])


def _per_token(tensor: torch.Tensor) -> tuple[int, int]:
    return tensor.shape[1], tensor.shape[3]


def _varlen(
    tokens: Sequence[torch.Tensor], lengths: Sequence[Any], dropout: float, causal: bool, scaling: float | None
) -> torch.Tensor:
    """Run the kernel with head dimensions padded to a multiple of 8 (`FlashAttnVarlenFunc`).

    `tokens`: query, key and value. `lengths`: where each sequence of queries and of keys begins, int32, and the longest
    of both.
    """
    head_dim = tokens[0].shape[-1]
    padding = -head_dim % 8
    query, key, value = (functional.pad(tensor, [0, padding]) if padding else tensor for tensor in tokens)
    scaling = head_dim**-0.5 if scaling is None else scaling
    out: torch.Tensor = torch.ops.aten._flash_attention_forward.default(
        query, key, value, *lengths, dropout, causal, False, scale=scaling
    )[0]
    return out[..., :head_dim] if padding else out
