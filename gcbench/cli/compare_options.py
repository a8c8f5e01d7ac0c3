"""Defines the options of `gcbench compare` that no other command has."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

A = Annotated[
    Path, typer.Argument(metavar="A", help="Folder of a run, prediction or plan, or its JSON file: the baseline.")
]
B = Annotated[Path, typer.Argument(metavar="B", help="The run, prediction or plan to compare with it.")]
FailOn = Annotated[
    list[str] | None,
    typer.Option(
        "--fail-on",
        metavar="memory:1%",
        help="Exit with 1 if B is worse by more than this in memory or time; repeatable.",
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Compare even if devices, precisions or model sizes differ.")]
