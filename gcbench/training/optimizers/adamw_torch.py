"""`adamw_torch`: torch.optim.AdamW as torch chooses it (foreach on CUDA, one by one on the CPU)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

NAME = "adamw_torch"
SUMMARY = "torch.optim.AdamW as torch chooses it (foreach on CUDA, one by one on the CPU)"


def build(params: Iterable[torch.nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
    """Make AdamW with torch's own choice of implementation."""
    from torch.optim import AdamW

    return AdamW(params, lr=learning_rate)
