"""`trl`: TRL's SFTTrainer; its other trainers take the same arguments.

Read in trl 1.16.0 (`trainer/base_config.py`, `trainer/sft_trainer.py`): the arguments are transformers' own, but
checkpointing and bf16 are on where nothing is said. Its own key `selective`, which keeps attention's outputs, is not
used: with transformers 5.23 it is passed over for a model with LoRA (seen in a run: attention is computed again).
"""

from __future__ import annotations

from gcbench.export import _program
from gcbench.export._handover import Handover, Rival, Training
from gcbench.export._program import Code
from gcbench.export.trainer import REACH
from gcbench.strategies import Plan

NAME = "trl"
TOOL = "trl"


def refusal(training: Training) -> str | None:
    """It runs every workload."""
    return None


def why_not(plan: Plan, handover: Handover) -> str | None:
    """What cannot be said of a plan: what transformers' Trainer cannot be told, which it is."""
    return REACH.why_not(plan)


def render(rival: Rival, handover: Handover) -> str:
    """A program up to the trainer, with the data left to the user."""
    lora = _program.lora(handover)
    trained = {"model": Code("model"), "args": Code("args"), "train_dataset": Code("dataset")}
    return _program.program(
        _program.head(
            rival,
            handover,
            peft="LoraConfig",
            imports=(
                f"from transformers import {_program.auto_classes(handover)}",
                "from trl import SFTConfig, SFTTrainer",
            ),
        ),
        _program.model(handover),
        _program.keeping(rival.plan).rstrip(),
        "# Stated, since trl's defaults are checkpointing and bf16. SFTTrainer computes its loss without all logits at",
        "# once, so that its peak can be lower. DPOConfig and the others take the same arguments.",
        _program.call("args = SFTConfig", **_program.arguments(rival, handover), max_length=handover.seq_len),
        _program.call("trainer = SFTTrainer", **trained, **({"peft_config": Code(lora)} if lora else {})),
    )
