"""`llama-factory`: write a config file of LLaMA-Factory.

Read in llamafactory 0.9.5, which needs transformers 5.6 or older (`model/model_utils/checkpointing.py`, `hparams/`,
`model/adapter.py`): all layers are checkpointed or none, by a function of its own, reentrant by default.
`use_unsloth_gc` offloads layer inputs to host memory, by an autograd function that does not restore the random state.
Trained weights are fp32 unless `pure_bf16` is set; frozen ones have the checkpoint's dtype.
"""

from __future__ import annotations

from gcbench.core.records import ALL_LINEAR
from gcbench.export._base import LORA_ALPHA, Capabilities, cannot_change, described, policy_of, targets_of, yaml
from gcbench.export._handover import Handover, Rival, Training
from gcbench.strategies import Plan

NAME = "llama-factory"
TOOL = "LLaMA-Factory"
CAPABILITIES = Capabilities(offload=True, reentrant=True)
_ATTENTION = {"eager": "disabled", "sdpa": "sdpa", "flash_attention_2": "fa2"}
_PRECISION = {"bf16": {"pure_bf16": True}, "bf16-mixed": {"bf16": True}, "fp16-mixed": {"fp16": True}, "fp32": {}}


def refusal(training: Training) -> str | None:
    """Return why a workload cannot run, with the remedy; None when it can."""
    if training.model_changes is not None:
        return cannot_change(TOOL, training)
    attention = training.attn_implementation
    if attention is not None and attention not in _ATTENTION:
        return f"LLaMA-Factory does not know the attention {attention}; plan with one of {', '.join(_ATTENTION)}"
    if training.lora_r is None:
        return None
    if training.precision != "bf16":
        return (
            f"LLaMA-Factory leaves frozen weights in the checkpoint's dtype, so it has no LoRA in "
            f"{training.precision}; plan with --precision bf16, or use --emit python"
        )
    if training.lora_target_modules is None:
        return "LLaMA-Factory's default for LoRA's targets differs from peft's; plan with --lora-target-modules"
    return None


def why_not(plan: Plan, handover: Handover) -> str | None:
    """Return what of a plan cannot be expressed."""
    return CAPABILITIES.why_not(plan)


def render(rival: Rival, handover: Handover) -> str:
    """Return YAML for `llamafactory-cli train`."""
    policy, checkpoints = policy_of(rival.plan), bool(rival.plan.groups)
    settings: dict[str, object] = {
        "model_name_or_path": handover.source,
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "full" if handover.lora_r is None else "lora",
        "cutoff_len": handover.seq_len,
        "per_device_train_batch_size": rival.batch_size,
        "# Explicit, because checkpointing is on by default, and reentrant.": "",
        "disable_gradient_checkpointing": not checkpoints,
    }
    if policy.offload:
        settings["# Leave dropout off: the random state is not restored when layers are recomputed."] = ""
        settings["use_unsloth_gc"] = True
    elif checkpoints:
        settings["use_reentrant_gc"] = policy.reentrant
    settings |= _PRECISION[handover.precision]
    settings["optim"] = handover.optim
    if handover.attn_implementation is not None:
        settings["flash_attn"] = _ATTENTION[handover.attn_implementation]
    if handover.lora_r is not None:
        targets = targets_of(handover)
        settings |= {"lora_rank": handover.lora_r, "lora_alpha": LORA_ALPHA}
        settings["lora_target"] = "all" if targets == ALL_LINEAR else ",".join(targets or ())
    notes = (
        "# Written for LLaMA-Factory 0.9.5; add your dataset, template and output_dir. Use a checkpoint in the planned "
        "precision."
    )
    return f"{described(rival, handover)}\n{notes}\n{yaml(settings)}"
