"""Defines the options that only `gcbench check` has, each once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gcbench.cli.options import RUN, WORKLOAD

COMBINATIONS = "Combinations to check"
"""A panel of the help page."""

Strategies = Annotated[
    str | None,
    typer.Option(
        "--strategies",
        "--strategy",
        metavar="S[,S…]",
        rich_help_panel=COMBINATIONS,
        help="Strategies to check against off (default: per-layer, every:2, segment:2, first:1, selective:…, "
        "reentrant, compile).",
    ),
]
Precision = Annotated[
    str | None,
    typer.Option(
        "--precision",
        metavar="P[,P…]",
        rich_help_panel=COMBINATIONS,
        help="Precisions to check: fp32, bf16, bf16-mixed or fp16-mixed.",
    ),
]
Optim = Annotated[
    str | None,
    typer.Option(
        "--optim",
        "--optimizer",
        metavar="O[,O…]",
        rich_help_panel=COMBINATIONS,
        help="Optimizers to check, as for gcbench run.",
    ),
]
Attention = Annotated[
    str | None,
    typer.Option(
        "--attn-implementation",
        "--attention-implementation",
        metavar="A[,A…]",
        rich_help_panel=COMBINATIONS,
        help="Attention implementations to check: eager, sdpa, … or default for the model's own choice.",
    ),
]
BatchSize = Annotated[
    str | None,
    typer.Option(
        "--batch",
        "-b",
        "--batch-size",
        metavar="N",
        rich_help_panel=WORKLOAD,
        help="Sequences per training step (default: 2).",
    ),
]
SeqLen = Annotated[
    str | None,
    typer.Option(
        "--seq-len",
        "--sequence-length",
        metavar="N",
        rich_help_panel=WORKLOAD,
        help="Tokens per sequence (default: 32, at most the model's maximum).",
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        "--output-dir",
        "-o",
        rich_help_panel=RUN,
        help="Folder to write check.json and check.md to (default: write none).",
    ),
]
Train = Annotated[
    str | None,
    typer.Option(
        "--train",
        metavar="T[,T…]",
        rich_help_panel=COMBINATIONS,
        help="Kinds of training to check: full, lora or frozen-base.",
    ),
]
NoCompile = Annotated[
    bool,
    typer.Option(
        "--no-compile",
        rich_help_panel=COMBINATIONS,
        help="Skip torch.compile, which is slow to check (default: check it too).",
    ),
]
FullSize = Annotated[
    bool,
    typer.Option(
        "--full-size", rich_help_panel=COMBINATIONS, help="Check the model at its full size (default: scaled down)."
    ),
]
