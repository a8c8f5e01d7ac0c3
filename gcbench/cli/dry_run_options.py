"""Defines `gcbench dry-run`: its options, and the function that they are parameters of."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from gcbench.cli import options

Command = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="-- COMMAND…", help="The command to run, as in a shell: python train.py --lr 1e-5.", show_default=False
    ),
]
EmulatedDevice = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="NAME",
        rich_help_panel=options.WORKLOAD,
        help="Card to emulate; gcbench devices lists them.",
    ),
]
NumDevices = Annotated[
    str | None,
    typer.Option(
        "--num-devices", metavar="N", rich_help_panel=options.WORKLOAD, help="Number of cards to emulate (default: 1)."
    ),
]
Steps = Annotated[
    str | None,
    typer.Option(
        "--steps",
        metavar="N",
        rich_help_panel=options.RUN,
        help="End the script cleanly after N optimizer steps (default: let it run to its end).",
    ),
]
Snapshot = Annotated[
    Path | None,
    typer.Option(
        "--snapshot",
        metavar="FILE.pickle",
        rich_help_panel=options.RUN,
        help="Write PyTorch's memory snapshot, for pytorch.org/memory_viz, where memory runs out or at the end.",
    ),
]
PlanToo = Annotated[
    bool,
    typer.Option(
        "--plan",
        rich_help_panel=options.RUN,
        help="Ask gcbench plan for the best setting also where the script fits (default: only where it does not).",
    ),
]


def dry_run(
    command: Command = None,
    device: EmulatedDevice = None,
    device_memory: options.DeviceMemory = None,
    device_file: options.DeviceFile = None,
    num_devices: NumDevices = None,
    steps: Steps = None,
    snapshot: Snapshot = None,
    plan: PlanToo = False,
    out: options.PredictOut = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Run any training script, unmodified, on an emulated card: whether it fits, and where memory goes.

    PyTorch's own CUDA code and allocator run, and nothing is computed. The peaks of every phase are reported, and where
    memory runs out: the line, what was allocated, and the checkpointing with which gcbench plan predicts that it fits.

    Exit code: 0 it fits, 1 it does not, 3 it cannot be told; a script that fails by itself passes its own code on.
    """
    from gcbench.dry_run import command as dry_run_command

    dry_run_command.run(
        command or [],
        device=device,
        device_memory=device_memory,
        device_file=device_file,
        num_devices=num_devices,
        steps=steps,
        snapshot=snapshot,
        plans=plan,
        out=out,
        as_json=json,
        quiet=quiet,
        argv=sys.argv[1:],
    )
