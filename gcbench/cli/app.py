"""Defines the commands of gcbench: each parses its flags and calls one function of its package."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from gcbench.cli import check_options, compare_options, dry_run_options, options, run_options, usage
from gcbench.core import streams
from gcbench.core.errors import GcbenchError, Interrupted, ReaderGone, UsageError
from gcbench.core.interruption import ignore_more, interruptible
from gcbench.core.version import __version__

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
    help="Measure, predict and plan gradient (activation) checkpointing for a model.",
    epilog="Start with: gcbench run --model gpt2 --batch 16",
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document to standard output.")]


def _version(is_passed: bool) -> None:
    if is_passed:
        print(f"gcbench {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Measure, predict and plan gradient (activation) checkpointing for a model."""


@app.command()
def run(
    model: options.Model = None,
    batch_size: options.BatchSize = None,
    seq_len: options.SeqLen = None,
    strategies: options.Strategies = None,
    precision: options.Precision = None,
    optim: options.Optim = None,
    attn_implementation: options.AttnImplementation = None,
    device: options.Device = None,
    emulate: options.Emulate = None,
    layers: options.Layers = None,
    set_: options.Set = None,
    pretrained: options.Pretrained = None,
    trust_remote_code: options.TrustRemoteCode = None,
    lora_r: options.LoraR = None,
    lora_target_modules: options.LoraTargetModules = None,
    memory_limit: options.MemoryLimit = None,
    warmup: run_options.Warmup = None,
    steps: run_options.Steps = None,
    rounds: run_options.Rounds = None,
    target_interval: run_options.TargetInterval = None,
    max_time: run_options.MaxTime = None,
    seed: options.Seed = None,
    timeout: options.Timeout = None,
    config: options.Config = None,
    out: options.Out = None,
    resume: options.Resume = False,
    snapshot: options.Snapshot = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure peak memory and step time of real training steps under each strategy, and verify their gradients.

    Every strategy is measured in a process of its own. The processes take turns, step by step, until each time overhead
    is known well enough. Gradient checkpointing is also known as activation checkpointing.
    """
    flags = options.settings_passed(locals())
    from gcbench.measure import command as run_command

    run_command.run(
        flags, config=config, out=out, resume=resume, snapshot=snapshot, as_json=json, quiet=quiet, argv=sys.argv[1:]
    )


@app.command()
def predict(
    model: options.Model = None,
    batch_size: options.BatchSize = None,
    seq_len: options.SeqLen = None,
    strategies: options.Strategies = None,
    precision: options.Precision = None,
    optim: options.Optim = None,
    attn_implementation: options.AttnImplementation = None,
    device: options.TargetDevice = None,
    device_memory: options.DeviceMemory = None,
    device_file: options.DeviceFile = None,
    reserve: options.Reserve = None,
    expandable_segments: options.ExpandableSegments = False,
    layers: options.Layers = None,
    set_: options.Set = None,
    pretrained: options.FromCheckpoint = None,
    trust_remote_code: options.TrustRemoteCode = None,
    lora_r: options.LoraR = None,
    lora_target_modules: options.LoraTargetModules = None,
    memory_limit: options.MemoryLimit = None,
    timeout: options.Timeout = None,
    explain: options.Explain = False,
    exact: options.Exact = False,
    config: options.Config = None,
    out: options.PredictOut = None,
    snapshot: options.Snapshot = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Predict the peak memory and the step time of each strategy on a card that need not be here.

    The training step runs on fake tensors (shapes and dtypes, no data), and its allocations are replayed through a
    simulation of the card's allocator. Times are estimated from the card's rates, with a band.
    """
    flags = options.settings_passed(locals())
    from gcbench.predict import command as predict_command

    predict_command.run(
        flags,
        device_memory=device_memory,
        device_file=device_file,
        reserve=reserve,
        expandable_segments=expandable_segments,
        explain=explain,
        exact=exact,
        config=config,
        out=out,
        snapshot=snapshot,
        as_json=json,
        quiet=quiet,
        argv=sys.argv[1:],
    )


@app.command()
def plan(
    model: options.Model = None,
    batch_size: options.PlanBatch = None,
    seq_len: options.SeqLen = None,
    precision: options.Precision = None,
    optim: options.Optim = None,
    attn_implementation: options.AttnImplementation = None,
    device: options.TargetDevice = None,
    device_memory: options.DeviceMemory = None,
    device_file: options.DeviceFile = None,
    expandable_segments: options.ExpandableSegments = False,
    layers: options.Layers = None,
    set_: options.Set = None,
    trust_remote_code: options.TrustRemoteCode = None,
    lora_r: options.LoraR = None,
    lora_target_modules: options.LoraTargetModules = None,
    strategies: options.PlanStrategies = None,
    reserve: options.Reserve = None,
    measure: options.MeasureFlag = False,
    emulate: options.EmulateFlag = False,
    from_run: options.FromRun = None,
    emit: options.Emit = None,
    seed: options.Seed = None,
    timeout: options.Timeout = None,
    config: options.Config = None,
    out: options.PlanOut = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Choose the batch size and the checkpointing with the most tokens per second within a device's memory.

    Memory is predicted and time is estimated from the device's figures. Besides named strategies, gcbench searches
    plans of its own: which operator outputs each layer saves.
    """
    flags = options.settings_passed(locals())
    from gcbench.plan import command as plan_command

    plan_command.run(
        flags,
        batch=batch_size,
        reserve=reserve,
        emit=emit,
        measure=measure,
        emulate=emulate,
        from_run=from_run,
        device_memory=device_memory,
        device_file=device_file,
        expandable_segments=expandable_segments,
        config=config,
        out=out,
        as_json=json,
        quiet=quiet,
        argv=sys.argv[1:],
    )


@app.command()
def check(
    model: options.Model = None,
    strategies: check_options.Strategies = None,
    precision: check_options.Precision = None,
    optim: check_options.Optim = None,
    attn_implementation: check_options.Attention = None,
    train: check_options.Train = None,
    no_compile: check_options.NoCompile = False,
    full_size: check_options.FullSize = False,
    batch_size: check_options.BatchSize = None,
    seq_len: check_options.SeqLen = None,
    device: options.Device = None,
    emulate: options.Emulate = None,
    layers: options.Layers = None,
    set_: options.Set = None,
    trust_remote_code: options.TrustRemoteCode = None,
    seed: options.Seed = None,
    timeout: options.Timeout = None,
    config: options.Config = None,
    out: check_options.Out = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Check that checkpointing works for a model: gradients, recomputed layers, errors with their known causes.

    Short training steps of the scaled-down model under each strategy are compared with those of off, for several
    precisions, optimizers, attention implementations, LoRA, frozen layers and torch.compile: seconds on a CPU.

    Without further flags, one option at a time differs from its default. The values passed for --precision, --optim,
    --attn-implementation and --train are checked in all combinations.
    """
    flags = options.settings_passed(locals())
    tried = {"precision": precision, "optim": optim, "attn_implementation": attn_implementation}
    flags = {name: value for name, value in flags.items() if name not in tried}
    from gcbench.check import command as check_command

    check_command.run(
        flags,
        **tried,
        tuned=train,
        compiled=not no_compile,
        full_size=full_size,
        config=config,
        out=out,
        as_json=json,
        quiet=quiet,
        argv=sys.argv[1:],
    )


dry_run = app.command("dry-run", context_settings={"allow_interspersed_args": False})(dry_run_options.dry_run)


@app.command()
def compare(
    a: compare_options.A,
    b: compare_options.B,
    fail_on: compare_options.FailOn = None,
    force: compare_options.Force = False,
    json: Json = False,
) -> None:
    """Compare two runs, predictions or plans cell by cell: better, worse or no significant difference."""
    from gcbench.cli import results

    results.compare(a, b, fail_on=fail_on or [], force=force, as_json=json)


@app.command()
def report(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder of a run, prediction, plan or check, or its JSON file.")
    ],
    format: Annotated[
        str,
        typer.Option("--format", "-f", help="Output format: terminal, markdown, csv, json or png (default: terminal)."),
    ] = "terminal",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="File to write, or for png a folder (default: standard output).")
    ] = None,
    json: Json = False,
) -> None:
    """Render a stored run, prediction, plan or check in any format."""
    from gcbench.cli import results

    results.report(folder, format="json" if json else format, out=out)


@app.command()
def models(json: Json = False) -> None:
    """List the built-in model architectures, which work offline: name, parameters, Hub id.

    --model also accepts the Hub id, folder or config.json of any other causal LM.
    """
    from gcbench.cli import listings as commands

    commands.models(as_json=json)


@app.command()
def strategies(json: Json = False) -> None:
    """List the strategies: what each saves, what it recomputes, and its names in other tools."""
    from gcbench.cli import listings as commands

    commands.strategies(as_json=json)


@app.command()
def devices(
    device_file: options.DeviceFile = None,
    json: Json = False,
) -> None:
    """List the cards that predict and plan know by name: memory, compute capability, peak rates."""
    from gcbench.cli import listings as commands

    commands.devices(device_file, as_json=json)


@app.command()
def env(
    device: Annotated[
        str, typer.Option("--device", help="Device to describe: auto, cpu, cuda or cuda:N (default: auto).")
    ] = "auto",
    json: Json = False,
) -> None:
    """Print the environment for a bug report: versions, device, driver, allocator settings."""
    from gcbench.cli import listings as commands

    commands.env(device=device, as_json=json)


def main() -> NoReturn:
    """Run the command line; the one place where errors become sentences and exit codes."""
    with streams.guarded(), interruptible():
        code = _code(_parse_and_run)
        # Printed text may still be buffered; a failure to write it must not surface at exit.
        code = _code(lambda: sys.stdout.flush()) or code
    sys.exit(code)


def _code(work: Callable[[], int | None]) -> int:
    """Return the exit code of `work`, after printing its error."""
    try:
        return work() or 0
    except GcbenchError as err:
        ended = err
    except KeyboardInterrupt:
        ended = Interrupted("interrupted")
    if isinstance(ended, Interrupted):
        ignore_more()
    with suppress(ReaderGone):  # of standard error
        if not isinstance(ended, ReaderGone):
            streams.print_error(ended)
    return ended.exit_code


def _parse_and_run() -> int:
    """Return the exit code of the command; raises UsageError for a wrong flag or command."""
    streams.require_output()
    try:
        # Not standalone, so that a wrong flag is reported like any other mistake, and quickly: Typer's own panel takes
        # as long to import as everything else here together.
        code = app(prog_name="gcbench", standalone_mode=False)
    except Exception as err:
        if type(err).__name__ == "Abort":  # what some versions of Typer make of Ctrl-C
            raise KeyboardInterrupt from None
        # Whichever click Typer uses, its own or the package, its errors have these two.
        if not (hasattr(err, "format_message") and hasattr(err, "exit_code")):
            raise
        message = str(err.format_message()).strip().rstrip(".")
        if not message:  # a missing command, for which the help was printed
            return int(err.exit_code)
        context = getattr(err, "ctx", None)
        command = context.command_path if context is not None else "gcbench"
        raise UsageError(usage.sentence(message, command, _options())) from None
    if code == Interrupted.exit_code:  # how some versions of Typer report Ctrl-C
        raise KeyboardInterrupt
    return code if isinstance(code, int) else 0


def _options() -> dict[str, frozenset[str]]:
    """Return the long and short options of each command."""
    commands = getattr(typer.main.get_command(app), "commands", {})
    return {
        name: frozenset(option for parameter in command.params for option in parameter.opts)
        for name, command in commands.items()
    }
