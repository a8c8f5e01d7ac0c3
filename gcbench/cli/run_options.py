"""Defines the options that only `gcbench run` has, each once: how long and how often to measure."""

from __future__ import annotations

from typing import Annotated

import typer

from gcbench.cli.options import MEASURING

Warmup = Annotated[
    str | None,
    typer.Option(
        "--warmup",
        "--warmup-steps",
        metavar="N",
        rich_help_panel=MEASURING,
        help="Untimed steps per process (default: 2 on a GPU, 1 on a CPU).",
    ),
]
Steps = Annotated[
    str | None,
    typer.Option(
        "--steps",
        metavar="N",
        rich_help_panel=MEASURING,
        help="Timed steps per round (default: as many as fit in 0.5 s on a GPU, 0.25 s on a CPU).",
    ),
]
Rounds = Annotated[
    str | None,
    typer.Option(
        "--rounds",
        metavar="N",
        rich_help_panel=MEASURING,
        help="Rounds, in each of which every cell has a turn (default: until --target-interval or --max-time).",
    ),
]
TargetInterval = Annotated[
    str | None,
    typer.Option(
        "--target-interval",
        metavar="POINTS",
        rich_help_panel=MEASURING,
        help="Measure until each time overhead is known to within this many percentage points (default: 5).",
    ),
]
MaxTime = Annotated[
    str | None,
    typer.Option(
        "--max-time",
        metavar="SECONDS",
        rich_help_panel=MEASURING,
        help="Time for each batch size and sequence length, or none; at least 3 rounds are run (default: 165).",
    ),
]
