"""Finds the order in which a model runs its layers, on fake tensors (shapes and dtypes, no data)."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch

from gcbench.checkpointing import apply as checkpointing
from gcbench.checkpointing import own_checkpointing
from gcbench.core.errors import GcbenchError
from gcbench.core.records import Phase
from gcbench.job.describe import DescribeTask
from gcbench.models import build as models
from gcbench.simulate.trace.fake_model import FakeModel
from gcbench.training.step import TrainingStep

_SEQ_LEN = 8


class _Enough(Exception):
    """The forward pass is over."""


def layers_in_order(task: DescribeTask) -> tuple[int, ...] | None:
    """Find the numbers of the layers that training runs, in the order in which they run.

    None where they run in `modules()` order, which is known without a run for layers in one list, and where the model's
    code fails on fake tensors, because it reads values.
    """
    model = _built(task)
    if _in_one_list(model):
        return None
    fake_model = FakeModel(model, precision="bf16")

    def on_phase(phase: Phase) -> None:
        if phase == "backward":
            raise _Enough

    with checkpointing.layers_run(model) as ran, fake_model.ready():
        batch = torch.zeros(1, _SEQ_LEN, dtype=torch.int64)
        try:
            TrainingStep(model, batch=batch, precision="bf16", optim="sgd", seed=0)(on_phase)
        except _Enough:
            pass
        except GcbenchError:
            raise
        except Exception:  # a model's own code
            return None
    order = tuple(ran.order)
    return None if order == tuple(range(len(fake_model.layers))) else order


def own_groups(task: DescribeTask) -> tuple[tuple[int, ...], ...] | None:
    """Find the groups of layers that a model's own checkpointing recomputes; None where its code needs values."""
    return groups_of(_built(task))


def groups_of(model: torch.nn.Module) -> tuple[tuple[int, ...], ...] | None:
    """Do the same for a bf16 model on the meta device, which must not be used afterwards."""
    try:
        fake_model = FakeModel(model, precision="bf16")

        def on_phase(phase: Phase) -> None:
            if phase == "optimizer":
                raise _Enough

        with (
            own_checkpointing.RecomputedGroups(fake_model.layers) as seen,
            fake_model.ready(own=True),
            suppress(_Enough),
        ):
            batch = torch.zeros(1, _SEQ_LEN, dtype=torch.int64)
            TrainingStep(model, batch=batch, precision="bf16", optim="sgd", seed=0)(on_phase)
    except Exception:  # a model's own code
        return None
    return seen.groups


def _built(task: DescribeTask) -> torch.nn.Module:
    assert task.source is not None
    config = models.build_config(task.source, layers=task.layers, overrides=task.overrides)
    kwargs: dict[str, Any] = (
        {} if task.attn_implementation is None else {"attn_implementation": task.attn_implementation}
    )
    return models.build_meta(
        config, lora=task.lora, dtype=torch.bfloat16, trust_remote_code=task.source.trust_remote_code, **kwargs
    )


def _in_one_list(model: torch.nn.Module) -> bool:
    """Whether the layers are one list and of one class: mllama's list has some that text never runs."""
    layers = checkpointing.layers_of(model)
    ids = {id(layer) for layer in layers}
    return len({type(layer) for layer in layers}) == 1 and any(
        ids == {id(child) for child in module.children()}
        for module in model.modules()
        if isinstance(module, torch.nn.ModuleList)
    )
