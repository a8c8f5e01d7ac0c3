"""The lines that programs with transformers have in common."""

from __future__ import annotations

import json
from collections.abc import Mapping

from gcbench.export._base import described, policy_of, qualified, stride_of, targets_of
from gcbench.export._handover import Handover, Rival
from gcbench.strategies import Plan


def program(*parts: str) -> str:
    """The parts that are not empty, one line at least each."""
    return "".join(f"{part}\n" for part in parts if part)


def call(function: str, *given: str, **named: object) -> str:
    """A call, one argument a line; values are written as Python has them."""
    arguments = [*given, *(f"{name}={literal(value)}" for name, value in named.items())]
    return f"{function}(\n" + "".join(f"    {argument},\n" for argument in arguments) + ")"


class Code(str):
    """An expression, to be written as it is."""


def literal(value: object) -> str:
    """A value in Python's words, with the double quotes that programs use."""
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
    """Lines that make the config of a model that was changed; none for the model itself."""
    if handover.config is None:
        return []
    made = f"config = AutoConfig.from_pretrained({literal(handover.source)})"
    return [made, *(f"config.{name} = {_field(value)}" for name, value in handover.config.fields.items())]


def _field(value: object) -> str:
    """A value; a list with an equal entry for every layer is written as one."""
    if isinstance(value, list) and len(value) > 1 and all(item == value[0] for item in value):
        return f"[{literal(value[0])}] * {len(value)}"
    return literal(value)


def auto_classes(handover: Handover) -> str:
    """What loading the model takes of transformers, for an import."""
    return "AutoModelForCausalLM" if handover.config is None else "AutoConfig, AutoModelForCausalLM"


def model(handover: Handover) -> str:
    """Loads the model with the weights' dtype of the precision; transformers' own default is the checkpoint's."""
    loading = _loading(handover)
    if handover.config is None:
        return loading
    weights = (
        "# Of the model's own weights, those that this config has a place for; others begin at random."
        if handover.config.keeps_weights
        else "# The model's own weights have other shapes, so that it begins with random ones."
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
    given = {"config": Code("config"), **named}
    return call("model = AutoModelForCausalLM.from_pretrained", literal(handover.source), **given)


def lora(handover: Handover) -> str:
    """peft's config of the adapters; empty without any."""
    if handover.lora_r is None:
        return ""
    targets = targets_of(handover)
    named = "" if targets is None else f"target_modules={literal(targets)}, "
    return f'LoraConfig(r={handover.lora_r}, {named}task_type="CAUSAL_LM")'


def head(rival: Rival, handover: Handover, *, peft: str, imports: tuple[str, ...]) -> str:
    """Comments and imports of a program for a trainer; `peft` names what LoRA needs of it."""
    keeps = bool(policy_of(rival.plan).keep)
    needs = [] if stride_of(rival.plan) in (None, 1) else ["; every_n_layers needs 5.16"]
    needs += ["; offload needs 5.17"] if policy_of(rival.plan).offload else []
    return program(
        described(rival, handover),
        "# As transformers 5.23 spells it. Before, write gradient_checkpointing wherever this says",
        f"# activation_checkpointing{''.join(needs)}.",
        "from functools import partial\n" if keeps else "",
        "import torch",
        f"from peft import {peft}" if handover.lora_r is not None else "",
        "from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts" if keeps else "",
        *imports,
    )


def keeping(plan: Plan) -> str:
    """Checkpoints a model's layers and keeps the outputs of some operators; empty for a plan that keeps none."""
    policy = policy_of(plan)
    if not policy.keep:
        return ""
    extra: dict[str, object] = {}
    if stride_of(plan) != 1:
        extra["every_n_layers"] = stride_of(plan)
    if policy.offload:
        extra["offload"] = True
    kwargs = '{"use_reentrant": False, "context_fn": partial(create_selective_checkpoint_contexts, keep)}'
    return program(
        "KEPT = {\n" + "".join(f"    {literal(name)},\n" for name in qualified(policy.keep)) + "}",
        "\n\ndef keep(context, op, *args, **kwargs):",
        '    kept = op.name().partition(".")[0] in KEPT',
        "    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE",
        "\n\n# On the model: among a trainer's arguments, a function would stop the run when these are first saved.",
        call("model.activation_checkpointing_enable", kwargs, **extra),
    )


def arguments(rival: Rival, handover: Handover) -> dict[str, object]:
    """Those of `TrainingArguments`, all stated, since trainers that build on it have other defaults."""
    plan, policy = rival.plan, policy_of(rival.plan)
    named: dict[str, object] = {"activation_checkpointing": bool(plan.groups) and not policy.keep}
    if named["activation_checkpointing"]:
        # Stated always: with any kwargs but this one, checkpointing is reentrant.
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
