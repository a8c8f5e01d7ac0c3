"""`trl`: write a program for TRL's SFTTrainer; its other trainers accept the same arguments.

Read in trl 1.16.0 (`trainer/base_config.py`, `trainer/sft_trainer.py`): the arguments are transformers' own, but
checkpointing and bf16 are on by default. Its own key `selective`, which saves attention's outputs, is not used: with
transformers 5.23 it is ignored for a model with LoRA (seen in a run: attention is recomputed).
"""

from __future__ import annotations

from gcbench.export import _program
from gcbench.export._handover import Handover, Rival, Training
from gcbench.export._program import Code
from gcbench.export.trainer import CAPABILITIES
from gcbench.strategies import Plan

NAME = "trl"
TOOL = "trl"


def refusal(training: Training) -> str | None:
    """Return None: every workload can run."""
    return None


def why_not(plan: Plan, handover: Handover) -> str | None:
    """Return what of a plan cannot be expressed: the same as for transformers' Trainer, its base class."""
    return CAPABILITIES.why_not(plan)


def render(rival: Rival, handover: Handover) -> str:
    """Return a program that ends in the trainer, without the data, which the user adds."""
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
        _program.selective(rival.plan).rstrip(),
        "# All explicit, because trl's defaults are checkpointing and bf16. SFTTrainer's loss never has all logits",
        "# in memory, so its peak can be lower. DPOConfig and the others accept the same arguments.",
        _program.call("args = SFTConfig", **_program.arguments(rival, handover), max_length=handover.seq_len),
        _program.call("trainer = SFTTrainer", **trained, **({"peft_config": Code(lora)} if lora else {})),
    )
