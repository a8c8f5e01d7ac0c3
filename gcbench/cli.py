"""The command line: parse, call one function, render."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from gcbench import __version__
from gcbench.errors import GcbenchError, Interrupted, UsageError

app = typer.Typer(
    name="gcbench",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={
        "help_option_names": ["-h", "--help"],
        # One rule for every long flag: underscores are hyphens.
        "token_normalize_func": lambda token: token.replace("_", "-"),
        # A flag that is unset rather than False makes Typer import pydantic, half of the time of a wrong flag.
        "default_map": {"help": False},
    },
    help="Which gradient (activation) checkpointing settings to use, measured on the real model.",
    epilog="Start with: gcbench run --model gpt2 --batch 16",
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")]
_WORKLOAD, _MEASURING, _RUN = "Workload", "Measuring", "Run"


def _version(wanted: bool) -> None:
    if wanted:
        print(f"gcbench {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Which gradient (activation) checkpointing settings to use, measured on the real model."""


@app.command()
def run(
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Catalogue name, Hub id, folder or config.json.", rich_help_panel=_WORKLOAD),
    ] = None,
    batch_size: Annotated[
        str | None,
        typer.Option("--batch", "-b", "--batch-size", metavar="N[,N…]", rich_help_panel=_WORKLOAD, help="Sequences."),
    ] = None,
    seq_len: Annotated[
        str | None,
        typer.Option(
            "--seq-len",
            "--sequence-length",
            metavar="N[,N…]",
            rich_help_panel=_WORKLOAD,
            help="Tokens in a sequence (1024 on a GPU, 64 on a CPU, at most the model's maximum).",
        ),
    ] = None,
    strategies: Annotated[
        str | None,
        typer.Option(
            "--strategies",
            "--strategy",
            metavar="S[,S…]",
            rich_help_panel=_WORKLOAD,
            help="What to compare (off,per-layer,every:2,every:4); see gcbench strategies.",
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option("--precision", rich_help_panel=_WORKLOAD, help="fp32 (default), bf16, bf16-mixed or fp16-mixed."),
    ] = None,
    optim: Annotated[
        str | None,
        typer.Option(
            "--optim",
            "--optimizer",
            rich_help_panel=_WORKLOAD,
            help="adamw_torch (default), adamw_torch_fused, sgd or adafactor.",
        ),
    ] = None,
    attn_implementation: Annotated[
        str | None,
        typer.Option(
            "--attn-implementation",
            "--attention-implementation",
            rich_help_panel=_WORKLOAD,
            help="eager, sdpa, flash_attention_2, … (the model's own choice).",
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option("--device", rich_help_panel=_WORKLOAD, help="auto (default), cpu, cuda or cuda:N.")
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            "--layers", "--num-layers", metavar="N", rich_help_panel=_WORKLOAD, help="Change the model's depth."
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", rich_help_panel=_WORKLOAD, help="Change a field of its config; repeatable."
        ),
    ] = None,
    pretrained: Annotated[
        bool | None,
        typer.Option("--pretrained", rich_help_panel=_WORKLOAD, help="Load real weights instead of random ones."),
    ] = None,
    trust_remote_code: Annotated[
        bool | None,
        typer.Option("--trust-remote-code", rich_help_panel=_WORKLOAD, help="Run code that the model brings."),
    ] = None,
    memory_limit: Annotated[
        str | None,
        typer.Option(
            "--memory-limit", metavar="8GiB", rich_help_panel=_WORKLOAD, help="Stand for a device of this size."
        ),
    ] = None,
    warmup: Annotated[
        str | None,
        typer.Option(
            "--warmup", "--warmup-steps", metavar="N", rich_help_panel=_MEASURING, help="Untimed steps (GPU 2, CPU 1)."
        ),
    ] = None,
    steps: Annotated[
        str | None,
        typer.Option(
            "--steps", metavar="N", rich_help_panel=_MEASURING, help="Timed steps a round (one second of them)."
        ),
    ] = None,
    rounds: Annotated[
        str | None,
        typer.Option(
            "--rounds", metavar="N", rich_help_panel=_MEASURING, help="Fresh processes for each cell, interleaved (3)."
        ),
    ] = None,
    seed: Annotated[
        str | None,
        typer.Option("--seed", metavar="N", rich_help_panel=_MEASURING, help="Of weights, batch and dropout (0)."),
    ] = None,
    timeout: Annotated[
        str | None,
        typer.Option(
            "--timeout", metavar="SECONDS", rich_help_panel=_MEASURING, help="For one round of a cell (3600); or none."
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config", metavar="FILE.toml", rich_help_panel=_RUN, help="The same settings from a file; flags win."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "--output-dir", "-o", rich_help_panel=_RUN, help="Folder (results/MODEL-TIME)."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", rich_help_panel=_RUN, help="Finish the run in --out; repeats nothing.")
    ] = False,
    json: Annotated[
        bool, typer.Option("--json", rich_help_panel=_RUN, help="Print one JSON document on standard output.")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", rich_help_panel=_RUN, help="No progress and no notices.")
    ] = False,
) -> None:
    """Measure a model with each checkpointing setting: real training steps, peak memory, time, proof.

    Every setting is measured in fresh processes, in interleaved rounds.

    Gradient checkpointing is also called activation checkpointing; the two mean the same here.
    """
    from gcbench import commands

    flags: dict[str, object] = {
        "model": model,
        "batch_size": batch_size,
        "seq_len": seq_len,
        "strategies": strategies,
        "precision": precision,
        "optim": optim,
        "attn_implementation": attn_implementation,
        "device": device,
        "layers": layers,
        "set": set_ or None,
        "pretrained": pretrained,
        "trust_remote_code": trust_remote_code,
        "memory_limit": memory_limit,
        "warmup": warmup,
        "steps": steps,
        "rounds": rounds,
        "seed": seed,
        "timeout": timeout,
    }
    commands.run(flags, config=config, out=out, resume=resume, as_json=json, quiet=quiet, argv=sys.argv[1:])


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="A run folder or report.json: the one before.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="The one after.")],
    fail_on: Annotated[
        list[str] | None,
        typer.Option(
            "--fail-on", metavar="memory:1%", help="Exit with 1 when memory or time got worse by more; repeatable."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Compare across devices and precisions.")] = False,
    json: Json = False,
) -> None:
    """Compare two runs cell by cell: better, worse, or no difference shown."""
    from gcbench import commands

    commands.compare(a, b, fail_on=fail_on or [], force=force, as_json=json)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A run folder or report.json.")],
    format: Annotated[str, typer.Option("--format", "-f", help="terminal, markdown, csv, json or png.")] = "terminal",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="File to write (for png: a folder); else standard output.")
    ] = None,
    json: Json = False,
) -> None:
    """Show a stored run again, in any format."""
    from gcbench import commands

    commands.report(folder, format="json" if json else format, out=out)


@app.command()
def models(json: Json = False) -> None:
    """List the built-in architectures."""
    from gcbench import commands

    commands.models(as_json=json)


@app.command()
def strategies(json: Json = False) -> None:
    """List the ways to checkpoint: what each keeps, what it recomputes, who else calls it what."""
    from gcbench import commands

    commands.strategies(as_json=json)


@app.command()
def env(
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")] = "auto", json: Json = False
) -> None:
    """Print what an issue report needs: versions, device, driver, allocator settings."""
    from gcbench import commands

    commands.env(device=device, as_json=json)


def main() -> NoReturn:
    """Run the command line; the one place where errors become sentences and exit codes."""
    try:
        sys.exit(_parse_and_run())
    except GcbenchError as err:
        _tell(err)
        sys.exit(err.exit_code)
    except KeyboardInterrupt:
        _tell(Interrupted("interrupted"))
        sys.exit(Interrupted.exit_code)
    except BrokenPipeError:  # the reader of our output has gone (gcbench … | head)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def _parse_and_run() -> int:
    """The exit code of a command that ended by itself; raises UsageError for a wrong flag or command."""
    try:
        # Not standalone: then a wrong flag is told like every other mistake, and at once (Typer's own panel takes
        # as long to import as everything else here together).
        code = app(prog_name="gcbench", standalone_mode=False)
    except Exception as err:
        # Whichever click Typer uses, its own or the package, its errors have these two.
        if not (hasattr(err, "format_message") and hasattr(err, "exit_code")):
            raise
        message = str(err.format_message()).strip().rstrip(".")
        if not message:  # help was shown in place of a missing command
            return int(err.exit_code)
        context = getattr(err, "ctx", None)
        command = context.command_path if context is not None else "gcbench"
        raise UsageError(f"{message[:1].lower()}{message[1:]}; see {command} --help") from None
    return code if isinstance(code, int) else 0


def _tell(err: GcbenchError) -> None:
    print(f"error: {err}" if "\n" not in str(err) else f"error:\n{err}", file=sys.stderr)
