"""Optimizers under the names of transformers' `TrainingArguments.optim`. One file each.

Every module has `NAME`, `SUMMARY` and `build(params)`; torch is imported only inside `build`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, cast

from gcbench.core.plugins import modules

if TYPE_CHECKING:
    import torch

LEARNING_RATE = 5e-5
"""The default of transformers' `TrainingArguments`."""


def names() -> tuple[str, ...]:
    """Return every optimizer's name."""
    return tuple(module.NAME for module in modules(__name__))


def build(name: str, params: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """Make the optimizer called `name` for `params`; raises KeyError where there is none."""
    by_name = {module.NAME: module for module in modules(__name__)}
    return cast("torch.optim.Optimizer", by_name[name].build(params, LEARNING_RATE))
