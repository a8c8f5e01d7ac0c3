"""Lets a gradient scaler run on fake tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch


@contextmanager
def scaler_for_fake_tensors() -> Iterator[None]:
    """Let a gradient scaler step its optimizer without reading whether a gradient overflowed: as if none did.

    `GradScaler._maybe_opt_step` in torch/amp/grad_scaler.py reads one number, which fake tensors do not have. What the
    scaler allocates is recorded: scale and growth tracker, their copies for the device, `found_inf`, and the check
    itself, which works in place. Holds for devices other than CUDA, too.
    """

    def step(scaler: Any, optimizer: torch.optim.Optimizer, state: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        return optimizer.step(*args, **kwargs)

    with mock.patch.object(torch.amp.GradScaler, "_maybe_opt_step", step):
        yield
