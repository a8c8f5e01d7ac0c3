"""`accelerate-fsdp`: write a config file of `accelerate launch` for FSDP.

Read in accelerate 1.15.0 (`utils/fsdp_utils.py: fsdp2_apply_ac`, `utils/launch.py`): every layer that FSDP wraps is
checkpointed, or none; `fsdp_activation_checkpointing_offload` is new in 1.15. It checkpoints with
`preserve_rng_state=False`, so layers with dropout get wrong gradients (seen in a run). Settings that the file has no
key for are written into it as comments.
"""

from __future__ import annotations

from gcbench.export import _program
from gcbench.export._base import Capabilities, described, policy_of, targets_of, yaml
from gcbench.export._handover import Handover, Rival, Training
from gcbench.strategies import Plan

NAME = "accelerate-fsdp"
TOOL = "accelerate's FSDP"
CAPABILITIES = Capabilities(offload=True)
_MIXED = {"bf16-mixed": "bf16", "fp16-mixed": "fp16"}


def refusal(training: Training) -> str | None:
    """Return None: every workload can run, because it launches the user's own program."""
    return None


def why_not(plan: Plan, handover: Handover) -> str | None:
    """Return what of a plan cannot be expressed."""
    return CAPABILITIES.why_not(plan)


def render(rival: Rival, handover: Handover) -> str:
    """Return YAML for `--config_file`."""
    checkpoints, offloads = bool(rival.plan.groups), policy_of(rival.plan).offload
    notes = ["# Planned for one GPU with the whole model; with FSDP on several GPUs, each one needs less memory."]
    notes += ["# Set these in your program, as this file has no keys for them:", *_program_s(rival, handover)]
    fsdp: dict[str, object] = {
        "fsdp_version": 2,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_reshard_after_forward": True,
        "fsdp_state_dict_type": "SHARDED_STATE_DICT",
    }
    if checkpoints:
        fsdp["# Layers with dropout get wrong gradients: accelerate draws new random numbers when it recomputes."] = ""
    fsdp["fsdp_activation_checkpointing"] = checkpoints
    if offloads:
        fsdp["# Needs accelerate 1.15; older versions ignore this key silently."] = ""
        fsdp["fsdp_activation_checkpointing_offload"] = True
    settings: dict[str, object] = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "FSDP",
        "num_machines": 1,
        "# Set your number of GPUs.": "",
        "num_processes": 1,
        "mixed_precision": _MIXED.get(handover.precision, "no"),
        "fsdp_config": fsdp,
    }
    return "\n".join([described(rival, handover), *notes]) + "\n" + yaml(settings)


def _program_s(rival: Rival, handover: Handover) -> list[str]:
    """Return, as comments, the settings that the launched program has to make."""
    dtype = "torch.bfloat16" if handover.precision == "bf16" else "torch.float32"
    attention = handover.attn_implementation
    lines = _program.config(handover)
    config = "config=config, " if lines else ""
    name = "from_config" if handover.config is not None and not handover.config.keeps_weights else "from_pretrained"
    lines += [
        f"batches of {rival.batch_size} sequences of {handover.seq_len} tokens on each GPU",
        f"{name}(…, {config}dtype={dtype}" + (f', attn_implementation="{attention}")' if attention else ")"),
        f'the optimizer that TrainingArguments calls optim="{handover.optim}"',
        "activation_checkpointing off in TrainingArguments (gradient_checkpointing before transformers 5.23)",
    ]
    if handover.lora_r is not None:
        targets = targets_of(handover)
        lines.append(f"LoRA of rank {handover.lora_r}" + (f" on {targets}" if targets else ""))
    return [f"#   {line}" for line in lines]
