"""`axolotl`: write a config file of axolotl.

Read in axolotl 0.19.0, which brings transformers 5.16.1 (`utils/schemas/`, `utils/config/`, `loaders/model.py`,
`core/builders/base.py`, `monkeypatch/selective_checkpointing.py`, `monkeypatch/checkpoint_activation_offload.py`): the
kwargs go to transformers, and without kwargs checkpointing is reentrant. It has its own settings for saved operators,
matched by substrings of their names, and for offloaded inputs. With bf16 the weights are bf16 too, under autocast.
"""

from __future__ import annotations

from gcbench.core.records import ALL_LINEAR
from gcbench.export._base import (
    LORA_ALPHA,
    Capabilities,
    cannot_change,
    described,
    policy_of,
    qualified,
    stride_of,
    targets_of,
    yaml,
)
from gcbench.export._handover import Handover, Rival, Training
from gcbench.strategies import Plan
from gcbench.strategies.selective import MATMUL, NAMED

NAME = "axolotl"
TOOL = "axolotl"
CAPABILITIES = Capabilities(stride=True, keep=True, offload=True, reentrant=True)
_ATTENTION = (
    *("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flash_attention_torch"),
    *("flex_attention", "xformers", "sage", "fp8"),
)
"""Names that it accepts, besides kernels on the Hub, whose names have a slash."""


def refusal(training: Training) -> str | None:
    """Return why a workload cannot run, with the remedy; None when it can."""
    if training.model_changes is not None:
        return cannot_change(TOOL, training)
    if training.precision.endswith("-mixed"):
        return (
            f"axolotl has no {training.precision}: it stores the weights themselves in 16 bits; plan with --precision "
            "bf16, or use --emit python"
        )
    attention = training.attn_implementation
    if attention is not None and attention not in _ATTENTION and "/" not in attention:
        return f"axolotl does not know the attention {attention}; plan with one of {', '.join(_ATTENTION)}"
    if training.lora_r is not None and training.lora_target_modules is None:
        return (
            "axolotl has no default for LoRA's targets; plan with --lora-target-modules all-linear, or with "
            "names of modules"
        )
    return None


def why_not(plan: Plan, handover: Handover) -> str | None:
    """Return what of a plan cannot be expressed."""
    why = CAPABILITIES.why_not(plan)
    if why is not None:
        return why
    keep = [name.removeprefix("aten::") for name in policy_of(plan).keep]
    unsafe = [name for name in keep if name not in NAMED["matmul"]]
    if unsafe:
        return f"matches substrings of operators' names, so it cannot save {unsafe[0]} alone"
    if handover.lora_r is not None and any(name in MATMUL for name in keep):
        return "cannot save the outputs of matrix products with LoRA"
    return None


def render(rival: Rival, handover: Handover) -> str:
    """Return YAML for `axolotl train`."""
    settings: dict[str, object] = {
        "base_model": handover.source,
        "sequence_len": handover.seq_len,
        "micro_batch_size": rival.batch_size,
        "# Set your own; it does not change the peak.": "",
        "gradient_accumulation_steps": 1,
        "bf16": handover.precision == "bf16",
        "fp16": False,
        "optimizer": handover.optim,
    }
    if handover.attn_implementation is not None:
        settings["attn_implementation"] = handover.attn_implementation
    lines = [
        described(rival, handover),
        "# Written for axolotl 0.19, which pins transformers 5.16; add your datasets and learning rate.",
    ]
    if handover.precision == "bf16":
        lines.append("# bf16: true stores weights and optimizer states in bf16, as planned, and adds autocast.")
    return "\n".join(lines) + "\n" + yaml(settings | _lora(handover) | _checkpointing(rival.plan))


def _checkpointing(plan: Plan) -> dict[str, object]:
    policy = policy_of(plan)
    if not plan.groups:
        return {"gradient_checkpointing": False}
    kwargs: dict[str, object] = {"use_reentrant": policy.reentrant}
    if stride_of(plan) != 1:
        kwargs["every_n_layers"] = stride_of(plan)
    settings: dict[str, object] = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": kwargs}
    if policy.keep:
        settings["selective_checkpointing"] = {"save": qualified(policy.keep), "save_sliding_window": True}
    if policy.offload:
        settings["activation_offloading"] = "hidden_states"
    return settings


def _lora(handover: Handover) -> dict[str, object]:
    if handover.lora_r is None:
        return {}
    targets = targets_of(handover)
    where: dict[str, object] = (
        {"lora_target_linear": True} if targets == ALL_LINEAR else {"lora_target_modules": targets}
    )
    return {"adapter": "lora", "lora_r": handover.lora_r, "lora_alpha": LORA_ALPHA, "lora_dropout": 0.0, **where}
