"""Models how much of a card's rates its kernels reach: matrix products by shape, attention by kernel. No torch.

Constants come from published measurements of kernels, each named beside it, and two from gcbench's own runs on an H100
(`EAGER_BANDWIDTH_SHARE`, `HOST_CALL_S`). benchmarks/published_times.py holds the model to whole training steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

LARGE_PRODUCT_SHARE = 0.95
"""Share of a card's achievable rate, which is that of its best shape, that a large square product reaches: on an A100
256.5 TFLOP/s (cuBLASLt, fp16, 16384 x 16384 x 16384, https://github.com/Azure/AI-benchmarking-guide
Azure_Results/ND_A100_v4_results.md) of 271.2."""
_TILE = 128
"""Rows and columns of the block of the result that a thread block computes in cuBLAS's most used kernels (NVIDIA,
Matrix Multiplication Background User's Guide, section 4)."""
_TILE_SHARES = {128: 1.0, 64: 0.9, 32: 0.75, 16: 0.5}
"""Smaller tiles, for thin matrices, and the share of the rate that they reach: they load more bytes per operation (same
guide, section 4.1); the values are by judgement."""
_HALF_WAVE = 0.5
"""Waves of thread blocks lost per product: the last one is half full on average, and cuBLAS chooses among tiles and
splits to avoid worse. With it, the model is within 9 % of the 119.4, 221.8, 228.0, 253.7 and 256.5 TFLOP/s that the
same A100 reaches on squares of 1024, 2048, 4096, 8192 and 16384."""
_SPLIT_K_DEPTH, _SPLIT_K_WAVES = 1024, 2.0
"""A product with few tiles is split along its depth, in parts of at least so many, into at most so many waves."""
_FILL_DEPTH, _FILL_DEPTH_FP32 = 64, 8
"""Depth whose time a tile spends to fill its pipeline and to write its result: two to four steps of 16 to 32, and as
long without tensor cores, at an eighth of the rate."""

_NON_CAUSAL_RAMP, _CAUSAL_RAMP = 250, 500
"""Tokens at which attention reaches half of its rate: backward at 512, 1024, 2048, 4096 tokens has 68, 81, 91 and 97 %
of the rate at 8192 on an RTX A5000 (https://github.com/gpu-mode/ring-attention/issues/10); under a causal mask, half of
the tokens count."""
_FLASH: Mapping[int, tuple[float, float, float, float]] = {
    7: (0.5, 0.5, 0.5, 0.5),
    80: (0.67, 0.60, 0.72, 0.66),
    8: (0.85, 0.80, 0.85, 0.80),
    9: (0.40, 0.39, 0.43, 0.40),
    10: (0.21, 0.19, 0.25, 0.22),
    12: (0.55, 0.50, 0.55, 0.50),
}
"""Share of the achievable matmul rate that FlashAttention-2 reaches on long sequences: forward and backward with up to
64, then with more numbers per head, by major compute capability, 80 for 8.0. 8.0: 172 and 183 TFLOP/s forward at 4096
tokens (https://github.com/pytorch/pytorch/pull/126122); backward 63 % of the peak at most (Dao 2023, arXiv:2307.08691).
8.6: 82 and 77 on an RTX A5000 (issue above), 55 and 54 on an RTX 3090
(https://github.com/Dao-AILab/flash-attention/issues/416). 9.0: 312 and 299 on an H100
(https://github.com/Dao-AILab/flash-attention/pull/2688), 328 with 128 per head (Azure_Results above). 10.0: 380 and 334
on a B200 (https://github.com/Dao-AILab/flash-attention/issues/1589). The others by judgement."""
_FLASH_OTHERWISE = (0.5, 0.5, 0.5, 0.5)
_CUDNN: Mapping[int, tuple[float, float, float, float]] = {9: (0.62, 0.58, 0.66, 0.60), 10: (0.66, 0.50, 0.90, 0.65)}
"""The same of cuDNN's attention. 9.0: 1.54 times FlashAttention-2 forward, on an H20
(https://github.com/Dao-AILab/flash-attention/issues/1310). 10.0: 1157 and 1700 TFLOP/s forward on a B200
(https://github.com/Dao-AILab/flash-attention/pull/2605). Backward by judgement; elsewhere as FlashAttention-2."""
_EFFICIENT: Mapping[int, tuple[float, float]] = {80: (0.40, 0.28), 8: (0.60, 0.40), 9: (0.18, 0.12), 10: (0.10, 0.07)}
"""Share that memory-efficient attention reaches, forward and backward. 8.6: 43 and 27 TFLOP/s on an RTX 3090 (issue 416
above). 9.0 and 10.0: from what Llama-3.2-1B takes more with it than with cuDNN's on an H200 and a B200
(https://github.com/NVIDIA/cudnn-frontend benchmark/Llama-3.2-1B-Training)."""
_FP32 = (0.40, 0.40)
"""In fp32, without tensor cores, at any length, by judgement: a product's rate, less the softmax between."""
_FEW_PER_HEAD = 64

EAGER_BANDWIDTH_SHARE = 0.8
"""Share of the bandwidth of a plain copy that eager mode's memory-bound kernels reach: strided operands, reductions and
casts are slower than a copy. From gcbench's own runs on an H100 (results/reference/*-h100)."""

HOST_CALL_S: Mapping[str, float] = {
    "model": 10e-6,
    "checkpoint": 14e-6,
    "policy": 100e-6,
    "recompute": 14e-6,
    "backward": 7e-6,
    "optimizer": 7e-6,
}
"""Seconds that Python, the dispatcher and autograd take to launch one kernel, by caller (`Work.caller`). A policy
decides on every operator in Python: on an H100, selective checkpointing of Llama-3.1-8B with LoRA takes 0.06 to 0.15 s
longer than its kernels (results/reference/llama-3.1-8b-lora-h100), which fits 80 to 120 us. The others by judgement for
a server's processor; half and double as much is common, which the bands allow for."""
HOST_VIEW_SHARE = 0.4
"""Time of a view over that of a call that launches a kernel, by judgement."""


def product_share(dims: Sequence[int], *, dtype: str, num_sms: int) -> float:
    """The share of a card's achievable rate that a product of (batch, m, n, k) reaches on so many multiprocessors."""
    batch, rows, columns, depth = (max(size, 1) for size in dims)
    tiles = batch * math.ceil(rows / _TILE) * math.ceil(columns / _TILE)
    waves = tiles / num_sms
    waves = max(waves, min(waves * (depth // _SPLIT_K_DEPTH), _SPLIT_K_WAVES))
    filled = _coverage(rows) * _coverage(columns)
    fill = _FILL_DEPTH_FP32 if dtype == "fp32" else _FILL_DEPTH
    return LARGE_PRODUCT_SHARE * filled * waves / (waves + _HALF_WAVE) * depth / (depth + fill)


def _coverage(size: int) -> float:
    """The best share of the rate at which tiles cover so many rows or columns."""
    return max(share * size / (math.ceil(size / tile) * tile) for tile, share in _TILE_SHARES.items())


def attention_share(
    op: str, dims: Sequence[int], *, dtype: str, is_causal: bool, capability: tuple[int, int] | None
) -> float:
    """The share of the achievable matmul rate of its dtype that an attention kernel reaches.

    Args:
        op: its name in PyTorch, which names the kernel and the direction.
        dims: (batch, heads, queries, keys, numbers per head).
        capability: NVIDIA's compute capability; None where it is unknown.
    """
    queries, per_head = dims[2], dims[4]
    way = 1 if "backward" in op else 0
    generation = _generation(capability)
    if dtype == "fp32":
        return _FP32[way]
    if "efficient" in op:
        share = _EFFICIENT.get(generation, _FP32)[way]
    else:
        table = _CUDNN if "cudnn" in op and generation in _CUDNN else _FLASH
        share = table.get(generation, _FLASH_OTHERWISE)[way + (0 if per_head <= _FEW_PER_HEAD else 2)]
    half_at = _CAUSAL_RAMP if is_causal else _NON_CAUSAL_RAMP
    return share * queries / (queries + half_at)


def host_s(caller: str, *, is_view: bool) -> float:
    """The seconds that Python, the dispatcher and autograd take to launch a call (`Work.caller` names the caller)."""
    return HOST_CALL_S[caller] * (HOST_VIEW_SHARE if is_view else 1.0)


def _generation(capability: tuple[int, int] | None) -> int:
    if capability is None:
        return 0
    return 80 if capability == (8, 0) else capability[0]
