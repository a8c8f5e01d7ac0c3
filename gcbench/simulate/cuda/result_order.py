"""Lists CUDA's operators that allocate their results in another order than they return them in.

Read from the allocator's history of an H100 (torch 2.11) and of the CUDA builds of torch 2.11 and 2.13, and from
pytorch's sources, named beside each. The order decides which free block each result gets, so it moves the reserved
peak and, through blocks that are not split, the allocated one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

_aten = torch.ops.aten

ON_CUDA: Mapping[Any, tuple[int, ...]] = {
    # native_dropout_cuda: the mask, then the output (aten/src/ATen/native/cuda/Dropout.cu)
    _aten.native_dropout.default: (1, 0),
    # seed and offset of dropout, the output, the log-sum-exp (aten/src/ATen/native/transformers/cuda/attention.cu)
    _aten._scaled_dot_product_cudnn_attention.default: (6, 7, 0, 1),
    # the same file: seed and offset are numbers in host memory, except while a graph is captured
    _aten._scaled_dot_product_efficient_attention.default: (0, 1),
}
"""Operator -> the places of its results, in the order of allocation. Results not listed are in host memory."""
