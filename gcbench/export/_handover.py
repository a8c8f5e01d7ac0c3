"""What `gcbench plan` passes to an exporter: the choice, all other settings that fit, and the training run."""

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
        plan: the plan of that spec for this model, over all its layers in `modules()` order.
        batch_size: sequences per step and device.
        tokens_per_s_frac: its tokens per second relative to the choice's; 1.0 is as fast.
    """

    strategy: str
    plan: Plan
    batch_size: int
    peak_bytes: int
    tokens_per_s_frac: float


@dataclass(frozen=True, kw_only=True)
class Training:
    """The training run, as far as it is known before planning.

    Attributes:
        model: as the user named it.
        model_changes: what `--layers` and `--set` changed, as `num_hidden_layers=6`; None for the unchanged model.
        precision: `fp32`, `bf16`, `bf16-mixed` or `fp16-mixed`.
        optim: a name in `gcbench.training.optimizers`, as in transformers' `TrainingArguments.optim`.
        attn_implementation: None when the model chooses.
        model_notices: sentences on how the planned model differs from its config.
        lora_target_modules: None when peft chooses; `("all-linear",)` for all linear layers.
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
    """A choice to be written as a tool's settings.

    Attributes:
        hub_id: the name for `from_pretrained`, when it differs from `model`.
        rivals: all other settings that fit, best first.
        plan_file: path of the JSON file with the choice's plan; None when it is not stored.
        config: the changes of the model's config; None for the unchanged model.
        notes: sentences on what a real run may add to the choice's peak.
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
        """The name or path that a tool loads the model from."""
        return self.hub_id or self.model
