"""`trainer`: write a program for transformers' Trainer.

Read in transformers 5.23.0 (`training_args.py`, `trainer.py`, `modeling_utils.py`): `every_n_layers` and `offload` in
the kwargs go to the model's own method, all else to `torch.utils.checkpoint.checkpoint`. It cannot express other
choices than every k-th layer, nor a policy that differs between layers.
"""

from __future__ import annotations

from gcbench.export import _program
from gcbench.export._base import Capabilities
from gcbench.export._handover import Handover, Rival, Training
from gcbench.export._program import Code
from gcbench.strategies import Plan

NAME = "trainer"
TOOL = "transformers' Trainer"
CAPABILITIES = Capabilities(stride=True, keep=True, offload=True, reentrant=True)


def refusal(training: Training) -> str | None:
    """Return None: every workload can run."""
    return None


def why_not(plan: Plan, handover: Handover) -> str | None:
    """Return what of a plan cannot be expressed."""
    return CAPABILITIES.why_not(plan)


def render(rival: Rival, handover: Handover) -> str:
    """Return a program that ends in the trainer, without the data, which the user adds."""
    lora = _program.lora(handover)
    return _program.program(
        _program.head(
            rival,
            handover,
            peft="LoraConfig, get_peft_model",
            imports=(f"from transformers import {_program.auto_classes(handover)}, Trainer, TrainingArguments",),
        ),
        _program.model(handover),
        lora and f"model = get_peft_model(model, {lora})",
        _program.selective(rival.plan).rstrip(),
        _program.call("args = TrainingArguments", **_program.arguments(rival, handover)),
        f"# Use sequences of {handover.seq_len} tokens; TrainingArguments has no setting for their length.",
        _program.call("trainer = Trainer", model=Code("model"), args=Code("args"), train_dataset=Code("dataset")),
    )
