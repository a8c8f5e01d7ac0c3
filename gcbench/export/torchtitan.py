"""`torchtitan`: write a command line for torchtitan.

Read in torchtitan 0.3.0 (`distributed/activation_checkpoint.py`, `config/`): all blocks are checkpointed (`full`), or
none, or each is compiled with a memory budget. `selective` saves every second matrix product and a list of
its own, which no strategy here does. The layer frequency of 0.2 (which chose layers k-1, 2k-1, …, not 0, k, …) is gone.
"""

from __future__ import annotations

import shlex

from gcbench.export._base import Capabilities, cannot_change, described
from gcbench.export._handover import Handover, Rival, Training
from gcbench.strategies import Plan

NAME = "torchtitan"
TOOL = "torchtitan"
CAPABILITIES = Capabilities(compiled=True)
_DTYPES = {"fp32": ("float32", "float32"), "bf16": ("bfloat16", "bfloat16"), "bf16-mixed": ("float32", "bfloat16")}
"""precision -> --training.dtype, --training.mixed_precision_param."""
_OPTIMIZERS = {"adamw_torch": "foreach", "adamw_torch_fused": "fused"}


def refusal(training: Training) -> str | None:
    """Return why a workload cannot run, with the remedy; None when it can."""
    if training.model_changes is not None:
        return cannot_change(TOOL, training)
    if training.lora_r is not None:
        return "torchtitan has LoRA only in its models' Python configs; use --emit trainer, trl, axolotl or python"
    if training.precision not in _DTYPES:
        precision = training.precision
        return f"torchtitan does not train in {precision}; plan with --precision bf16-mixed, or use --emit python"
    if training.optim not in _OPTIMIZERS:
        return f"torchtitan has no {training.optim}; plan with --optim adamw_torch, or use --emit python"
    return None


def why_not(plan: Plan, handover: Handover) -> str | None:
    """Return what of a plan cannot be expressed."""
    return "does not use a model's own checkpointing" if plan.own else CAPABILITIES.why_not(plan)


def render(rival: Rival, handover: Handover) -> str:
    """Return a shell command."""
    plan = rival.plan
    dtype, computed = _DTYPES[handover.precision]
    mode, old = ("full", "full") if plan.groups else ("none", "none")
    last = []
    if plan.memory_budget is not None:
        mode, old = "memory-budget", "memory_budget"
        last = [f"--activation_checkpoint.memory_budget {plan.memory_budget:g}"]
    parts = [
        "torchrun --nproc_per_node 1 -m torchtitan.train",
        "--module transformers_modeling_backend --config transformers_modeling_backend_full",
        f"--hf_model {shlex.quote(handover.source)}",
        f"--training.local_batch_size {rival.batch_size}",
        f"--training.seq_len {handover.seq_len}",
        f"--training.dtype {dtype}",
        f"--training.mixed_precision_param {computed}",
        f"--optimizer.implementation {_OPTIMIZERS[handover.optim]}",
        *(["--compile.enable", "--compile.components model"] if plan.compiled else []),
        f"activation-checkpoint:{mode}",
        *last,
    ]
    return (
        f"{described(rival, handover)}\n"
        f'# torchtitan 0.3; in the TOML file of 0.2: [activation_checkpoint] mode = "{old}".\n'
        "# Add --hf_assets_path, your data and learning rate.\n"
        "# Its backend for transformers' models replaces attention and unties weights, so its peak differs from the\n"
        "# plan's. For a model of torchtitan's own, use that model's --module and --config.\n"
        + " \\\n    ".join(parts)
        + "\n"
    )
