"""`python`: write a plain training loop in which gcbench applies the plan. It can express every plan."""

from __future__ import annotations

from dataclasses import fields

from gcbench.export import _program
from gcbench.export._base import described
from gcbench.export._handover import SEARCHED, Handover, Rival, Training
from gcbench.export._program import Code, call, literal, program
from gcbench.strategies import Plan, Policy

NAME = "python"
TOOL = "Python"
_OPTIMIZERS = {
    "adamw_torch": "torch.optim.AdamW(model.parameters(), lr=5e-5)",
    "adamw_torch_fused": "torch.optim.AdamW(model.parameters(), lr=5e-5, fused=True)",
    "sgd": "torch.optim.SGD(model.parameters(), lr=5e-5)",
    "adafactor": "Adafactor(model.parameters(), lr=5e-5, scale_parameter=False, relative_step=False)",
}
_AUTOCAST = {"bf16-mixed": "torch.bfloat16", "fp16-mixed": "torch.float16"}


def refusal(training: Training) -> str | None:
    """Return None: every workload can run."""
    return None


def why_not(plan: Plan, handover: Handover) -> str | None:
    """Return None: every plan can be expressed."""
    return None


def render(rival: Rival, handover: Handover) -> str:
    """Return a program without the data, which the user adds."""
    lora = _program.lora(handover)
    dtype = _AUTOCAST.get(handover.precision)
    forward = "loss = model(**batch).loss"
    scaled = handover.precision == "fp16-mixed"
    return program(
        described(rival, handover),
        "import torch",
        lora and "from peft import LoraConfig, get_peft_model",
        f"from transformers import {_program.auto_classes(handover)}",
        "from transformers.optimization import Adafactor" if handover.optim == "adafactor" else "",
        "\nimport gcbench",
        '\ndevice = "cuda" if torch.cuda.is_available() else "cpu"',
        _program.model(handover),
        lora and f"model = get_peft_model(model, {lora})",
        "model.to(device).train()",
        "# If you use a trainer instead of the loop below, leave its own checkpointing off.",
        _plan(rival, handover),
        "# Set your own learning rate.",
        f"optimizer = {_OPTIMIZERS[handover.optim]}",
        "scaler = torch.amp.GradScaler(device)" if scaled else "",
        f"for batch in batches:  # your data: input_ids and labels, shape ({rival.batch_size}, {handover.seq_len})",
        f"    with torch.autocast(device, {dtype}):\n        {forward}" if dtype else f"    {forward}",
        f"    {'scaler.scale(loss)' if scaled else 'loss'}.backward()",
        "    scaler.step(optimizer)\n    scaler.update()" if scaled else "    optimizer.step()",
        "    optimizer.zero_grad()",
    )


def _plan(rival: Rival, handover: Handover) -> str:
    """Return the call that applies the plan: by its spec, its file, or the whole plan."""
    spec = f"plan:{handover.plan_file}" if rival.strategy == SEARCHED and handover.plan_file else rival.strategy
    if spec != SEARCHED:
        return f"gcbench.apply(model, {literal(spec)})"
    named = {field.name: getattr(rival.plan, field.name) for field in fields(rival.plan)}
    policies = [Code(f"\n        {_policy(policy)}") for policy in named.pop("policies")]
    default = Plan(num_layers=rival.plan.num_layers)
    arguments = {
        name: value for name, value in named.items() if name == "num_layers" or value != getattr(default, name)
    }
    if policies:
        arguments["policies"] = Code("(" + ",".join(policies) + ",\n    )")
    return f"{call('plan = gcbench.Plan', **arguments)}\ngcbench.apply(model, plan)"


def _policy(policy: Policy) -> str:
    values = {field.name: getattr(policy, field.name) for field in fields(policy)}
    changed = ", ".join(
        f"{name}={literal(value)}" for name, value in values.items() if value != getattr(Policy(), name)
    )
    return f"gcbench.Policy({changed})"
