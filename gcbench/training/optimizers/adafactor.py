"""`adafactor`: transformers' Adafactor with the Trainer's settings: factored second moments."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

NAME = "adafactor"
SUMMARY = "transformers' Adafactor with the Trainer's settings: factored second moments"


def build(params: Iterable[torch.nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
    """Make Adafactor without its own schedule, as the Trainer builds it."""
    from transformers.optimization import Adafactor

    optimizer: torch.optim.Optimizer = Adafactor(params, lr=learning_rate, scale_parameter=False, relative_step=False)
    return optimizer
