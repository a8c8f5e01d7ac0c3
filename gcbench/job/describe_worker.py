"""Describes the device and the model in a child process. Imports torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from gcbench.checkpointing import apply as checkpointing
from gcbench.core.errors import GcbenchError
from gcbench.core.records import EMULATED, Machine
from gcbench.devices import backends
from gcbench.devices.backends import Device
from gcbench.diagnoses.failures import crash
from gcbench.emulate.environment import card_behind
from gcbench.job.describe import DescribeTask
from gcbench.models import build as models
from gcbench.models import flash_attention
from gcbench.processes.messages import Answer, Refusal

_PRELOAD = "LD_PRELOAD"


def describe(task: DescribeTask, send: Callable[[object], None] = lambda event: None) -> Answer:
    """Describe the device and the model of a run, or answer with the reason why that fails."""
    try:
        device = backends.open_device(backends.choose(task.device))
        checkpointing.check_operators(task.operators)
        if task.source is None:
            return Answer(machine=_machine(device))
        config = models.build_config(task.source, layers=task.layers, overrides=task.overrides)
        changed = task.layers is not None or bool(task.overrides)
        traced = _as_traced(task)
        facts = models.facts(task.source, config, traced.attn_implementation, changed=changed, lora=task.lora)
        if task.layers is not None:
            models.check_layers(task.source, facts, task.layers, task.overrides)
        if task.needs_order and facts.checkpointing_refusal is None:
            from gcbench.job.layer_order import layers_in_order  # most runs do not need it

            facts = replace(facts, layers_in_order=layers_in_order(traced))
        if facts.only_own is not None:
            from gcbench.job.layer_order import own_groups

            facts = replace(facts, own_groups=own_groups(traced))
        if traced is not task:
            facts = replace(facts, attn_implementation=task.attn_implementation)
        changes = None
        if task.needs_changes:
            from gcbench.models import changed_config  # most runs do not need it

            changes = changed_config.of(task.source, layers=task.layers, overrides=task.overrides)
        return Answer(machine=_machine(device), facts=facts, changed=changes)
    except GcbenchError as err:
        return Answer(refusal=Refusal(error=type(err).__name__, message=str(err)))
    except Exception as err:
        return Answer(failure=crash(err))


def _machine(device: Device) -> Machine:
    """Describe the device; one that is emulated says so, and not by which library."""
    machine, card = device.describe(), card_behind(device.name)
    if card is None:
        return machine
    settings = {name: value for name, value in machine.settings.items() if name != _PRELOAD}
    return replace(machine, settings=settings | {EMULATED: card})


def _as_traced(task: DescribeTask) -> DescribeTask:
    """Replace the attention implementation by the one that a prediction for the task's target traces."""
    if not flash_attention.is_stood_in(task.attn_implementation, task.target):
        return task
    from gcbench.simulate.cuda import flash_stand_in

    flash_stand_in.register()
    return replace(task, attn_implementation=flash_attention.STAND_IN)
