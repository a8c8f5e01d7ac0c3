"""Shared by all targets: what a tool's settings can express, and the lines that several targets write."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass

from gcbench.core import model_changes
from gcbench.core.records import ALL_LINEAR
from gcbench.core.units import format_bytes
from gcbench.export._handover import Handover, Rival, Training
from gcbench.strategies import Plan, Policy

_WIDTH = 110
LORA_ALPHA = 8
"""peft's own default, which gcbench measures with."""


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What a tool's settings can express, beyond checkpointing all layers or none.

    Attributes:
        stride: checkpoint every k-th layer, from the first on.
        keep: save the outputs of operators, chosen by name.
        offload: move layer inputs to host memory.
        reentrant: torch's old variant (use_reentrant=True).
        compiled: `torch.compile` layer by layer, with or without a memory budget.
    """

    stride: bool = False
    keep: bool = False
    offload: bool = False
    reentrant: bool = False
    compiled: bool = False

    def why_not(self, plan: Plan) -> str | None:
        """Return what of `plan` cannot be expressed, worded to follow the tool's name; None when all can."""
        if any(len(group) > 1 for group in plan.groups) and not plan.own:
            return "cannot recompute several layers as one"
        if len({policy for _, policy in plan.treated()}) > 1:
            return "cannot recompute one layer differently from another"
        stride = stride_of(plan)
        if plan.groups and stride != 1 and not self.stride:
            return "can only checkpoint all layers or none"
        if plan.groups and stride is None:
            return "can only choose every k-th layer"
        if plan.compiled and not self.compiled:
            return "cannot compile layer by layer"
        policy = policy_of(plan)
        if any("#" in name for name in policy.keep):
            return "cannot choose which calls of an operator are saved"
        if policy.keep and not self.keep:
            return "cannot choose which operators are saved"
        if policy.offload and not self.offload:
            return "cannot offload layer inputs to host memory"
        if policy.reentrant and not self.reentrant:
            return "cannot use torch's reentrant variant"
        if policy != Policy(keep=policy.keep, offload=policy.offload, reentrant=policy.reentrant):
            return "cannot express all that this plan does inside a layer"
        return None


def stride_of(plan: Plan) -> int | None:
    """Return k when the plan checkpoints exactly layers 0, k, 2k, …, one at a time; else None.

    For layer 0 alone k is the number of layers, as in transformers' `every_n_layers`.
    """
    if plan.own:
        return 1  # the tool's own switch is the model's
    layers = [group[0] for group in plan.groups if len(group) == 1]
    if not layers or len(layers) != len(plan.groups):
        return None
    stride = layers[1] if len(layers) > 1 else plan.num_layers
    return stride if layers == list(range(0, plan.num_layers, stride)) else None


def policy_of(plan: Plan) -> Policy:
    """Return the policy of the groups, for a plan that has the same one for all of them."""
    return next((policy for _, policy in plan.treated()), Policy())


def qualified(keep: tuple[str, ...]) -> tuple[str, ...]:
    """Return operators as torch's own `name()` spells them: `aten::mm`."""
    return tuple(name if "::" in name else f"aten::{name}" for name in keep)


def cannot_change(tool: str, training: Training) -> str:
    """Return why a tool that loads a model by name cannot train one that `--layers` or `--set` changed."""
    model = model_changes.named(training.model, training.model_changes)
    return (
        f"{tool} loads the unchanged model, and this plan is for {model}; "
        "save that model into a folder and plan with --model FOLDER, or use --emit trainer, trl or python"
    )


_ADDED = "Gradient accumulation and a loop that retains `outputs` add to this peak; gcbench predict reports how much."


def described(rival: Rival, handover: Handover) -> str:
    """Return the comment at the top of every text: the setting, the workload, and how the planned model differs."""
    lora = "" if handover.lora_r is None else f", LoRA of rank {handover.lora_r}"
    header = (
        f"# gcbench plan: {rival.strategy} at batch {rival.batch_size} × {handover.seq_len} tokens, "
        f"{handover.precision}, {handover.optim}{lora}; peak {format_bytes(rival.peak_bytes)}"
    )
    notes = (
        [] if handover.model_changes is None else [f"for {model_changes.named(handover.model, handover.model_changes)}"]
    )
    notes += handover.notes if rival == handover.choice else [_ADDED] if handover.notes else ()
    notes += _of_the_plan(handover)
    return "\n".join([header, *(f"# {line}" for note in notes for line in textwrap.wrap(note, width=_WIDTH))])


def _of_the_plan(handover: Handover) -> list[str]:
    """Return how the planned model differs from the one that the text loads."""
    if not handover.model_notices:
        return []
    return [*handover.model_notices, "The plan is for that model; if the one loaded below differs, plan again."]


def targets_of(handover: Handover) -> list[str] | str | None:
    """Return LoRA's target modules in peft's form."""
    modules = handover.lora_target_modules
    if modules is None or modules == (ALL_LINEAR,):
        return modules and ALL_LINEAR
    return list(modules)


def yaml(settings: Mapping[str, object], indent: str = "") -> str:
    """Return settings as YAML: mappings and lists as blocks, scalars as JSON, so that "no" stays a string.

    A key that begins with # becomes a comment line.
    """
    lines = []
    for key, value in settings.items():
        if key.startswith("#"):
            lines.append(f"{indent}{key}\n")
        elif isinstance(value, Mapping):
            lines.append(f"{indent}{key}:\n{yaml(value, indent + '  ')}")
        elif isinstance(value, (list, tuple)):
            lines.append(f"{indent}{key}:\n" + "".join(f"{indent}  - {_scalar(item)}\n" for item in value))
        else:
            lines.append(f"{indent}{key}: {_scalar(value)}\n")
    return "".join(lines)


def _scalar(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
