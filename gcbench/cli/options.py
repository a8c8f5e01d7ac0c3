"""Defines every command-line option once; a command has those that its signature names, as fields of `Settings`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated

import typer

WORKLOAD, MEASURING, RUN = "Workload", "Measuring", "Run"
"""The panels of the help page."""

Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="Model to train: catalogue name (gcbench models), Hub id, folder or config.json.",
        rich_help_panel=WORKLOAD,
    ),
]
BatchSize = Annotated[
    str | None,
    typer.Option(
        "--batch",
        "-b",
        "--batch-size",
        metavar="N[,N…]",
        rich_help_panel=WORKLOAD,
        help="Sequences per training step (micro-batch size).",
    ),
]
SeqLen = Annotated[
    str | None,
    typer.Option(
        "--seq-len",
        "--sequence-length",
        metavar="N[,N…]",
        rich_help_panel=WORKLOAD,
        help="Tokens per sequence (default: 1024 on a GPU, 64 on a CPU, at most the model's maximum).",
    ),
]
Strategies = Annotated[
    str | None,
    typer.Option(
        "--strategies",
        "--strategy",
        metavar="S[,S…]",
        rich_help_panel=WORKLOAD,
        help="Strategies to compare; gcbench strategies lists them (default: off, per-layer, every:2, every:4).",
    ),
]
Precision = Annotated[
    str | None,
    typer.Option(
        "--precision",
        rich_help_panel=WORKLOAD,
        help="Precision of weights and computation: fp32, bf16, bf16-mixed or fp16-mixed (default: fp32).",
    ),
]
Optim = Annotated[
    str | None,
    typer.Option(
        "--optim",
        "--optimizer",
        rich_help_panel=WORKLOAD,
        help="Optimizer: adamw_torch, adamw_torch_fused, sgd or adafactor (default: adamw_torch).",
    ),
]
AttnImplementation = Annotated[
    str | None,
    typer.Option(
        "--attn-implementation",
        "--attention-implementation",
        rich_help_panel=WORKLOAD,
        help="Attention implementation: eager, sdpa, flash_attention_2, … (default: the model's own choice).",
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        "--device", rich_help_panel=WORKLOAD, help="Device to train on: auto, cpu, cuda or cuda:N (default: auto)."
    ),
]
Emulate = Annotated[
    str | None,
    typer.Option(
        "--emulate",
        metavar="CARD",
        rich_help_panel=WORKLOAD,
        help="Run on an emulated card (gcbench devices), which need not be here and computes nothing (default: none).",
    ),
]
Layers = Annotated[
    str | None,
    typer.Option(
        "--layers",
        "--num-layers",
        metavar="N",
        rich_help_panel=WORKLOAD,
        help="Number of layers to build the model with (default: as in its config).",
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        rich_help_panel=WORKLOAD,
        help="Override a field of the model's config; repeatable.",
    ),
]
Pretrained = Annotated[
    bool | None,
    typer.Option(
        "--pretrained", rich_help_panel=WORKLOAD, help="Load the pretrained weights (default: random weights)."
    ),
]
FromCheckpoint = Annotated[
    bool | None,
    typer.Option(
        "--pretrained",
        rich_help_panel=WORKLOAD,
        help="Predict a run that loads a checkpoint and moves it to the card: its weights lie closer together. None is "
        "read here (default: weights made on the card, as run does).",
    ),
]
TrustRemoteCode = Annotated[
    bool | None,
    typer.Option(
        "--trust-remote-code",
        rich_help_panel=WORKLOAD,
        help="Run Python code from the model's repository (default: refuse it).",
    ),
]
LoraR = Annotated[
    str | None,
    typer.Option(
        "--lora-r",
        metavar="N",
        rich_help_panel=WORKLOAD,
        help="Train only LoRA adapters of this rank (default: train all parameters).",
    ),
]
LoraTargetModules = Annotated[
    str | None,
    typer.Option(
        "--lora-target-modules",
        metavar="M[,M…]",
        rich_help_panel=WORKLOAD,
        help="Modules that get a LoRA adapter, or all-linear (default: peft's choice for the model).",
    ),
]
MemoryLimit = Annotated[
    str | None,
    typer.Option(
        "--memory-limit", metavar="8GiB", rich_help_panel=WORKLOAD, help="Emulate a device with this much memory."
    ),
]
Seed = Annotated[
    str | None,
    typer.Option(
        "--seed",
        metavar="N",
        rich_help_panel=MEASURING,
        help="Random seed for weights, batch and dropout (default: 0).",
    ),
]
Timeout = Annotated[
    str | None,
    typer.Option(
        "--timeout",
        metavar="SECONDS",
        rich_help_panel=MEASURING,
        help="Time limit for one child process, or none for no limit (default: 3600).",
    ),
]
TargetDevice = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="NAME",
        rich_help_panel=WORKLOAD,
        help="Device to predict for: a card (gcbench devices), cpu, or auto for this machine's (default: auto).",
    ),
]
DeviceMemory = Annotated[
    str | None,
    typer.Option(
        "--device-memory",
        metavar="24GiB",
        rich_help_panel=WORKLOAD,
        help="Memory of the device (default: all that it has).",
    ),
]
DeviceFile = Annotated[
    Path | None,
    typer.Option(
        "--device-file", metavar="FILE.toml", rich_help_panel=WORKLOAD, help="File that describes additional cards."
    ),
]
ExpandableSegments = Annotated[
    bool,
    typer.Option(
        "--expandable-segments",
        rich_help_panel=WORKLOAD,
        help="Predict for expandable_segments:True in PYTORCH_ALLOC_CONF (default: without).",
    ),
]
Explain = Annotated[
    bool,
    typer.Option(
        "--explain", rich_help_panel=RUN, help="Explain the peak: what is allocated there and what would reduce it."
    ),
]
Exact = Annotated[
    bool,
    typer.Option(
        "--exact", rich_help_panel=RUN, help="Trace every layer, which is slower (default: a few represent the rest)."
    ),
]
DECISION = "Decision"
PlanBatch = Annotated[
    str | None,
    typer.Option(
        "--batch",
        "-b",
        "--batch-size",
        metavar="auto|N[,N…]",
        rich_help_panel=WORKLOAD,
        help="Batch sizes to choose from, or auto to search all useful sizes (default: auto).",
    ),
]
Reserve = Annotated[
    str | None,
    typer.Option(
        "--reserve",
        metavar="5%",
        rich_help_panel=WORKLOAD,
        help="Share of the device's memory to leave unused (default: 5% on a card, none on a CPU).",
    ),
]
Emit = Annotated[
    str | None,
    typer.Option(
        "--emit",
        metavar="TOOL",
        rich_help_panel=DECISION,
        help="Print the plan as settings for: trainer, trl, axolotl, llama-factory, accelerate-fsdp, torchtitan or "
        "python.",
    ),
]
MeasureFlag = Annotated[
    bool,
    typer.Option(
        "--measure",
        rich_help_panel=DECISION,
        help="Benchmark the leading candidates on this machine before choosing (default: estimate their times).",
    ),
]
EmulateFlag = Annotated[
    bool,
    typer.Option(
        "--emulate",
        rich_help_panel=DECISION,
        help="Run the choice on an emulated card of --device before showing it, and choose again where its memory "
        "runs out (default: predict only).",
    ),
]
FromRun = Annotated[
    Path | None,
    typer.Option(
        "--from",
        metavar="DIR",
        rich_help_panel=DECISION,
        help="Decide from the measurements of a stored run, or reuse a stored plan (default: predict).",
    ),
]
PlanStrategies = Annotated[
    str | None,
    typer.Option(
        "--strategies",
        "--strategy",
        metavar="S[,S…]",
        rich_help_panel=DECISION,
        help="Named strategies to compare the searched plans with (default: off, per-layer, every:2, "
        "every:4, selective:attention, selective:matmul).",
    ),
]
Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE.toml",
        rich_help_panel=RUN,
        help="Read settings from a file whose keys are these options; flags override it, and keys of other commands "
        "are ignored.",
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        "--output-dir",
        "-o",
        rich_help_panel=RUN,
        help="Folder to store the run in (default: results/MODEL-TIME).",
    ),
]
PredictOut = Annotated[
    Path | None,
    typer.Option(
        "--out", "--output-dir", "-o", rich_help_panel=RUN, help="Folder to store the results in (default: store none)."
    ),
]
PlanOut = Annotated[
    Path | None,
    typer.Option(
        "--out",
        "--output-dir",
        "-o",
        rich_help_panel=RUN,
        help="Folder to store the plan in (default: results/plan-MODEL-TIME).",
    ),
]
Snapshot = Annotated[
    Path | None,
    typer.Option(
        "--snapshot",
        metavar="FILE.pickle",
        rich_help_panel=RUN,
        help="File to write a memory snapshot to, for pytorch.org/memory_viz; of several cells each gets its own, with "
        "its strategy in the name (default: none).",
    ),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume", rich_help_panel=RUN, help="Finish the interrupted run in --out without measuring any round again."
    ),
]
Json = Annotated[bool, typer.Option("--json", rich_help_panel=RUN, help="Print one JSON document to standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", rich_help_panel=RUN, help="Print no progress and no notices.")]


def settings_passed(parameters: Mapping[str, object]) -> dict[str, object]:
    """Select, from all parameters of a command, the settings that the user passed as flags.

    A command calls it as `settings_passed(locals())` on its first line, where its local variables are exactly its
    parameters; a local variable that is bound earlier would be read as a flag.

    Args:
        parameters: parameter name -> value, None or [] where the flag is absent. Names are fields of `Settings`, with
            a trailing `_` where the bare name is a builtin; all others are ignored.

    Returns: field of `Settings` -> value.
    """
    from gcbench.job.settings import Settings

    named = {name.removesuffix("_"): value for name, value in parameters.items()}
    values = {field.name: named.get(field.name) for field in fields(Settings)}
    return {name: value for name, value in values.items() if value is not None and value != []}
