"""Write the lines that programs using transformers have in common."""

from __future__ import annotations

import json
from collections.abc import Mapping

from gcbench.export._base import described, policy_of, qualified, stride_of, targets_of
from gcbench.export._handover import Handover, Rival
from gcbench.strategies import Plan, Policy


def program(*parts: str) -> str:
    """Join the parts that are not empty, each ending in a newline."""
    return "".join(f"{part}\n" for part in parts if part)


def call(function: str, *positional: str, **named: object) -> str:
    """Return a call with one argument per line and values as Python literals."""
    arguments = [*positional, *(f"{name}={literal(value)}" for name, value in named.items())]
    return f"{function}(\n" + "".join(f"    {argument},\n" for argument in arguments) + ")"


class Code(str):
    """An expression, written without quotes."""


def literal(value: object) -> str:
    """Return a value as a Python literal, strings in double quotes."""
    if isinstance(value, Code):
        return value
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{literal(key)}: {literal(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(literal, value)) + "]"
    if isinstance(value, tuple):
        return "(" + ", ".join(map(literal, value)) + ("," if len(value) == 1 else "") + ")"
    return repr(value)


def config(handover: Handover) -> list[str]:
    """Return lines that make the config of a changed model; none for the unchanged model."""
    if handover.config is None:
        return []
    loaded = f"config = AutoConfig.from_pretrained({literal(handover.source)})"
    return [loaded, *(f"config.{name} = {_field(value)}" for name, value in handover.config.fields.items())]


def _field(value: object) -> str:
    """Return a literal; a list of equal entries, one per layer, is written as a multiplication."""
    if isinstance(value, list) and len(value) > 1 and all(item == value[0] for item in value):
        return f"[{literal(value[0])}] * {len(value)}"
    return literal(value)


def auto_classes(handover: Handover) -> str:
    """Return the classes of transformers that loading the model imports."""
    return "AutoModelForCausalLM" if handover.config is None else "AutoConfig, AutoModelForCausalLM"


def model(handover: Handover) -> str:
    """Return lines that load the model in the weights' dtype of the precision, not in the checkpoint's dtype."""
    loading = _loading(handover)
    if handover.config is None:
        return loading
    weights = (
        "# Weights that fit this config are loaded; the others are initialised randomly."
        if handover.config.keeps_weights
        else "# The published weights have other shapes, so the model is initialised randomly."
    )
    return "\n".join([*config(handover), weights, loading])


def _loading(handover: Handover) -> str:
    named: dict[str, object] = {"dtype": Code("torch.bfloat16" if handover.precision == "bf16" else "torch.float32")}
    if handover.attn_implementation is not None:
        named["attn_implementation"] = handover.attn_implementation
    if handover.config is None:
        return call("model = AutoModelForCausalLM.from_pretrained", literal(handover.source), **named)
    if not handover.config.keeps_weights:
        return call("model = AutoModelForCausalLM.from_config", "config", **named)
    arguments = {"config": Code("config"), **named}
    return call("model = AutoModelForCausalLM.from_pretrained", literal(handover.source), **arguments)


def lora(handover: Handover) -> str:
    """Return peft's config of the adapters; empty without LoRA."""
    if handover.lora_r is None:
        return ""
    targets = targets_of(handover)
    named = "" if targets is None else f"target_modules={literal(targets)}, "
    return f'LoraConfig(r={handover.lora_r}, {named}task_type="CAUSAL_LM")'


def head(rival: Rival, handover: Handover, *, peft: str, imports: tuple[str, ...]) -> str:
    """Return comments and imports of a program for a trainer; `peft` lists the names that LoRA imports."""
    saves = bool(policy_of(rival.plan).keep)
    needs = [] if stride_of(rival.plan) in (None, 1) else ["; every_n_layers needs 5.16"]
    needs += ["; offload needs 5.17"] if policy_of(rival.plan).offload else []
    return program(
        described(rival, handover),
        "# Written for transformers 5.23. Before, write gradient_checkpointing wherever this says",
        f"# activation_checkpointing{''.join(needs)}.",
        "from functools import partial\n" if saves else "",
        "import torch",
        f"from peft import {peft}" if handover.lora_r is not None else "",
        "from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts" if saves else "",
        *imports,
    )


_ATTENTION_DROPOUT = (
    "# With attention dropout on CUDA, use gcbench.apply: torch does not repeat a saved operator's draws "
    "(wrong gradients)."
)


def selective(plan: Plan) -> str:
    """Return lines that checkpoint layers and save some operators' outputs; empty for a plan that saves none."""
    policy = policy_of(plan)
    if not policy.keep:
        return ""
    extra: dict[str, object] = {}
    if stride_of(plan) != 1:
        extra["every_n_layers"] = stride_of(plan)
    if policy.offload:
        extra["offload"] = True
    kwargs = '{"use_reentrant": False, "context_fn": partial(create_selective_checkpoint_contexts, policy)}'
    return program(
        _ATTENTION_DROPOUT if _saves_attention(policy) else "",
        "SAVED = {\n" + "".join(f"    {literal(name)},\n" for name in qualified(policy.keep)) + "}",
        "\n\ndef policy(context, op, *args, **kwargs):",
        '    saved = op.name().partition(".")[0] in SAVED',
        "    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE",
        "\n\n# Set on the model: a function among a trainer's arguments stops the run when these are first stored.",
        call("model.activation_checkpointing_enable", kwargs, **extra),
    )


def _saves_attention(policy: Policy) -> bool:
    return any("attention" in name or "attn" in name for name in policy.keep)


def arguments(rival: Rival, handover: Handover) -> dict[str, object]:
    """Return arguments of `TrainingArguments`, all explicit, because trainers based on it have other defaults."""
    plan, policy = rival.plan, policy_of(rival.plan)
    named: dict[str, object] = {"activation_checkpointing": bool(plan.groups) and not policy.keep}
    if named["activation_checkpointing"]:
        # Always explicit: kwargs without this one make checkpointing reentrant.
        kwargs: dict[str, object] = {"use_reentrant": policy.reentrant}
        if stride_of(plan) != 1:
            kwargs["every_n_layers"] = stride_of(plan)
        if policy.offload:
            kwargs["offload"] = True
        named["activation_checkpointing_kwargs"] = kwargs
    return named | {
        "per_device_train_batch_size": rival.batch_size,
        "bf16": handover.precision == "bf16-mixed",
        "fp16": handover.precision == "fp16-mixed",
        "optim": handover.optim,
    }
