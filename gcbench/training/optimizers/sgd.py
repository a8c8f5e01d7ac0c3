"""`sgd`: torch.optim.SGD without momentum: no state."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

NAME = "sgd"
SUMMARY = "torch.optim.SGD without momentum: no state"


def build(params: Iterable[torch.nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
    """Make Plain SGD."""
    from torch.optim import SGD

    return SGD(params, lr=learning_rate)
