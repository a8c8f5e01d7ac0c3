"""What `gcbench plan` hands over to a training tool: the choice, all else that fits, and the run it is for."""

from __future__ import annotations

from dataclasses import dataclass

from gcbench.core.model_changes import ChangedConfig
from gcbench.strategies import Plan

SEARCHED = "plan"
"""The strategy of a plan that the search put together; without a file, it has no spec."""


@dataclass(frozen=True, kw_only=True)
class Rival:
    """A setting that fits the budget.

    Attributes:
        strategy: its spec, such as `every:2+offload` or `plan:FILE.json`; `SEARCHED` for a plan that has none.
        plan: what the spec is for this model, over all its layers in `modules()` order.
        batch_size: sequences per step and device.
        tokens_per_s_frac: its tokens per second over those of the choice; 1.0 is as fast.
    """

    strategy: str
    plan: Plan
    batch_size: int
    peak_bytes: int
    tokens_per_s_frac: float


@dataclass(frozen=True, kw_only=True)
class Training:
    """What is known of the run before anything is planned.

    Attributes:
        model: as the user named it.
        model_changes: what `--layers` and `--set` changed about it, in words; None for the model itself.
        precision: `fp32`, `bf16`, `bf16-mixed` or `fp16-mixed`.
        optim: a name of transformers' `TrainingArguments.optim`, of those in `gcbench.training.optimizers`.
        attn_implementation: None where the model chooses.
        model_notices: in what the model that was planned differs from what its config says, in sentences.
        lora_target_modules: None where peft chooses; `("all-linear",)` for all linear layers.
    """

    model: str
    precision: str
    optim: str
    attn_implementation: str | None
    lora_r: int | None
    lora_target_modules: tuple[str, ...] | None
    model_changes: str | None = None
    model_notices: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Handover(Training):
    """A choice to be written down as a tool's settings.

    Attributes:
        hub_id: under which `from_pretrained` finds the model, where that is another name.
        rivals: all others that fit, best first.
        plan_file: where the choice's plan is stored as JSON, if it is.
        config: what was changed about the model's config; None for the model itself.
        notes: what a real run may add to the choice's peak, a sentence each.
    """

    hub_id: str | None
    choice: Rival
    rivals: tuple[Rival, ...]
    plan_file: str | None
    seq_len: int
    config: ChangedConfig | None = None
    notes: tuple[str, ...] = ()

    @property
    def source(self) -> str:
        """What a tool loads the model from."""
        return self.hub_id or self.model
