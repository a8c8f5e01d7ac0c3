"""The flags of `run`, each once; a command takes one by naming it in its signature, under its name in `Settings`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated

import typer

WORKLOAD, MEASURING, RUN = "Workload", "Measuring", "Run"
"""The panels of the help."""

Model = Annotated[
    str | None,
    typer.Option("--model", "-m", help="Catalogue name, Hub id, folder or config.json.", rich_help_panel=WORKLOAD),
]
BatchSize = Annotated[
    str | None,
    typer.Option("--batch", "-b", "--batch-size", metavar="N[,N…]", rich_help_panel=WORKLOAD, help="Sequences."),
]
SeqLen = Annotated[
    str | None,
    typer.Option(
        "--seq-len",
        "--sequence-length",
        metavar="N[,N…]",
        rich_help_panel=WORKLOAD,
        help="Tokens in a sequence (1024 on a GPU, 64 on a CPU, at most the model's maximum).",
    ),
]
Strategies = Annotated[
    str | None,
    typer.Option(
        "--strategies",
        "--strategy",
        metavar="S[,S…]",
        rich_help_panel=WORKLOAD,
        help="What to compare (off,per-layer,every:2,every:4); see gcbench strategies.",
    ),
]
Precision = Annotated[
    str | None,
    typer.Option("--precision", rich_help_panel=WORKLOAD, help="fp32 (default), bf16, bf16-mixed or fp16-mixed."),
]
Optim = Annotated[
    str | None,
    typer.Option(
        "--optim",
        "--optimizer",
        rich_help_panel=WORKLOAD,
        help="adamw_torch (default), adamw_torch_fused, sgd or adafactor.",
    ),
]
AttnImplementation = Annotated[
    str | None,
    typer.Option(
        "--attn-implementation",
        "--attention-implementation",
        rich_help_panel=WORKLOAD,
        help="eager, sdpa, flash_attention_2, … (the model's own choice).",
    ),
]
Device = Annotated[
    str | None, typer.Option("--device", rich_help_panel=WORKLOAD, help="auto (default), cpu, cuda or cuda:N.")
]
Layers = Annotated[
    str | None,
    typer.Option("--layers", "--num-layers", metavar="N", rich_help_panel=WORKLOAD, help="Change the model's depth."),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", rich_help_panel=WORKLOAD, help="Change a field of its config; repeatable."
    ),
]
Pretrained = Annotated[
    bool | None,
    typer.Option("--pretrained", rich_help_panel=WORKLOAD, help="Load real weights instead of random ones."),
]
TrustRemoteCode = Annotated[
    bool | None,
    typer.Option("--trust-remote-code", rich_help_panel=WORKLOAD, help="Run code that the model brings."),
]
LoraR = Annotated[
    str | None,
    typer.Option(
        "--lora-r", metavar="N", rich_help_panel=WORKLOAD, help="Train LoRA adapters of this rank, and nothing else."
    ),
]
LoraTargetModules = Annotated[
    str | None,
    typer.Option(
        "--lora-target-modules",
        metavar="M[,M…]",
        rich_help_panel=WORKLOAD,
        help="Modules that get one, or all-linear (peft's choice for the model).",
    ),
]
MemoryLimit = Annotated[
    str | None,
    typer.Option("--memory-limit", metavar="8GiB", rich_help_panel=WORKLOAD, help="Stand for a device of this size."),
]
Warmup = Annotated[
    str | None,
    typer.Option(
        "--warmup", "--warmup-steps", metavar="N", rich_help_panel=MEASURING, help="Untimed steps (GPU 2, CPU 1)."
    ),
]
Steps = Annotated[
    str | None,
    typer.Option("--steps", metavar="N", rich_help_panel=MEASURING, help="Timed steps a round (one second of them)."),
]
Rounds = Annotated[
    str | None,
    typer.Option(
        "--rounds", metavar="N", rich_help_panel=MEASURING, help="Fresh processes for each cell, interleaved (3)."
    ),
]
Seed = Annotated[
    str | None,
    typer.Option("--seed", metavar="N", rich_help_panel=MEASURING, help="Of weights, batch and dropout (0)."),
]
Timeout = Annotated[
    str | None,
    typer.Option(
        "--timeout", metavar="SECONDS", rich_help_panel=MEASURING, help="For one round of a cell (3600); or none."
    ),
]
TargetDevice = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="NAME",
        rich_help_panel=WORKLOAD,
        help="A card (gcbench devices lists them), cpu, or auto: what this machine has.",
    ),
]
DeviceMemory = Annotated[
    str | None,
    typer.Option(
        "--device-memory", metavar="24GiB", rich_help_panel=WORKLOAD, help="Memory of the device, if not all of it."
    ),
]
DeviceFile = Annotated[
    Path | None,
    typer.Option("--device-file", metavar="FILE.toml", rich_help_panel=WORKLOAD, help="Cards of your own."),
]
ExpandableSegments = Annotated[
    bool,
    typer.Option(
        "--expandable-segments", rich_help_panel=WORKLOAD, help="As with PYTORCH_ALLOC_CONF=expandable_segments:True."
    ),
]
Explain = Annotated[
    bool, typer.Option("--explain", rich_help_panel=RUN, help="Say what is alive at the peak and what would move it.")
]
Exact = Annotated[
    bool,
    typer.Option("--exact", rich_help_panel=RUN, help="Trace every layer, not a few for all (slower)."),
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
        help="Batch sizes to choose from (auto: all that may pay).",
    ),
]
Reserve = Annotated[
    str | None,
    typer.Option(
        "--reserve",
        metavar="5%",
        rich_help_panel=WORKLOAD,
        help="Part of the memory that is held back (5% on a card, none on a CPU).",
    ),
]
Emit = Annotated[
    str | None,
    typer.Option(
        "--emit",
        metavar="TOOL",
        rich_help_panel=DECISION,
        help="Print the settings for trainer, trl, axolotl, llama-factory, accelerate-fsdp, torchtitan or python.",
    ),
]
MeasureFlag = Annotated[
    bool,
    typer.Option(
        "--measure", rich_help_panel=DECISION, help="Run the few that could be the best, on this machine, and decide."
    ),
]
FromRun = Annotated[
    Path | None,
    typer.Option(
        "--from",
        metavar="DIR",
        rich_help_panel=DECISION,
        help="Decide from a stored run in place of predicting, or take a stored plan.",
    ),
]
PlanStrategies = Annotated[
    str | None,
    typer.Option(
        "--strategies",
        "--strategy",
        metavar="S[,S…]",
        rich_help_panel=DECISION,
        help="Named strategies to weigh against what is found.",
    ),
]
CHECK = "What to try"
CheckStrategies = Annotated[
    str | None,
    typer.Option(
        "--strategies",
        "--strategy",
        metavar="S[,S…]",
        rich_help_panel=CHECK,
        help="Each against off (per-layer, every:2, segment:2, first:1, selective:…, reentrant, compile).",
    ),
]
CheckPrecision = Annotated[
    str | None,
    typer.Option("--precision", metavar="P[,P…]", rich_help_panel=CHECK, help="Of fp32, bf16, bf16-mixed, …"),
]
CheckOptim = Annotated[
    str | None, typer.Option("--optim", "--optimizer", metavar="O[,O…]", rich_help_panel=CHECK, help="Optimizers.")
]
CheckAttention = Annotated[
    str | None,
    typer.Option(
        "--attn-implementation",
        "--attention-implementation",
        metavar="A[,A…]",
        rich_help_panel=CHECK,
        help="default (the model's own choice), eager, sdpa, …",
    ),
]
CheckBatchSize = Annotated[
    str | None,
    typer.Option("--batch", "-b", "--batch-size", metavar="N", rich_help_panel=WORKLOAD, help="Sequences (2)."),
]
CheckSeqLen = Annotated[
    str | None,
    typer.Option(
        "--seq-len",
        "--sequence-length",
        metavar="N",
        rich_help_panel=WORKLOAD,
        help="Tokens in a sequence (32, or all positions).",
    ),
]
CheckOut = Annotated[
    Path | None,
    typer.Option("--out", "--output-dir", "-o", rich_help_panel=RUN, help="Folder for check.json, check.md."),
]
Train = Annotated[
    str | None,
    typer.Option("--train", metavar="T[,T…]", rich_help_panel=CHECK, help="Of full, lora and frozen-base."),
]
NoCompile = Annotated[
    bool, typer.Option("--no-compile", rich_help_panel=CHECK, help="Leave torch.compile out, which takes its time.")
]
FullSize = Annotated[
    bool, typer.Option("--full-size", rich_help_panel=CHECK, help="The model as it is, not scaled down.")
]
Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="FILE.toml",
        rich_help_panel=RUN,
        help="Settings from a file, keys as the options here; flags win, and keys of other commands are left out.",
    ),
]
Out = Annotated[
    Path | None,
    typer.Option("--out", "--output-dir", "-o", rich_help_panel=RUN, help="Folder (results/MODEL-TIME)."),
]
Resume = Annotated[
    bool, typer.Option("--resume", rich_help_panel=RUN, help="Finish the run in --out; repeats nothing.")
]
Json = Annotated[bool, typer.Option("--json", rich_help_panel=RUN, help="Print one JSON document on standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", rich_help_panel=RUN, help="No progress and no notices.")]


def given(parameters: Mapping[str, object]) -> dict[str, object]:
    """Of a command's parameters, as `locals()` has them on its first line, those that are settings and were given.

    Their keys are the names in `Settings`; a parameter that Python would not let have its name ends in `_`.
    """
    from gcbench.job.settings import Settings

    named = {name.removesuffix("_"): value for name, value in parameters.items()}
    values = {field.name: named.get(field.name) for field in fields(Settings)}
    return {name: value for name, value in values.items() if value is not None and value != []}
