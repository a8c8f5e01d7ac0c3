"""`adamw_torch_fused`: torch.optim.AdamW with the fused kernel: no temporaries."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

NAME = "adamw_torch_fused"
SUMMARY = "torch.optim.AdamW with the fused kernel: no temporaries"


def build(params: Iterable[torch.nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
    """Make AdamW with the fused implementation."""
    from torch.optim import AdamW

    return AdamW(params, lr=learning_rate, fused=True)
