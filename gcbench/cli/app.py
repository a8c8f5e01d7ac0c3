"""The command line: parse, call one function, render."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from gcbench.cli import options, usage
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
    help="Which gradient (activation) checkpointing settings to use, measured on the real model.",
    epilog="Start with: gcbench run --model gpt2 --batch 16",
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output.")]


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
    model: options.Model = None,
    batch_size: options.BatchSize = None,
    seq_len: options.SeqLen = None,
    strategies: options.Strategies = None,
    precision: options.Precision = None,
    optim: options.Optim = None,
    attn_implementation: options.AttnImplementation = None,
    device: options.Device = None,
    layers: options.Layers = None,
    set_: options.Set = None,
    pretrained: options.Pretrained = None,
    trust_remote_code: options.TrustRemoteCode = None,
    lora_r: options.LoraR = None,
    lora_target_modules: options.LoraTargetModules = None,
    memory_limit: options.MemoryLimit = None,
    warmup: options.Warmup = None,
    steps: options.Steps = None,
    rounds: options.Rounds = None,
    seed: options.Seed = None,
    timeout: options.Timeout = None,
    config: options.Config = None,
    out: options.Out = None,
    resume: options.Resume = False,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Measure a model with each checkpointing setting: real training steps, peak memory, time, proof.

    Every setting is measured in fresh processes, in interleaved rounds.

    Gradient checkpointing is also called activation checkpointing; the two mean the same here.
    """
    given = options.given(locals())
    from gcbench.measure import command as run_command

    run_command.run(given, config=config, out=out, resume=resume, as_json=json, quiet=quiet, argv=sys.argv[1:])


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
    pretrained: options.Pretrained = None,
    trust_remote_code: options.TrustRemoteCode = None,
    lora_r: options.LoraR = None,
    lora_target_modules: options.LoraTargetModules = None,
    memory_limit: options.MemoryLimit = None,
    timeout: options.Timeout = None,
    explain: options.Explain = False,
    exact: options.Exact = False,
    config: options.Config = None,
    out: options.Out = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Predict the peak memory of each setting on any card, without one: the real step on fake tensors.

    Nothing is computed. What the step allocates is replayed through the card's allocator.
    """
    given = options.given(locals())
    from gcbench.predict import command as predict_command

    predict_command.run(
        given,
        device_memory=device_memory,
        device_file=device_file,
        reserve=reserve,
        expandable_segments=expandable_segments,
        explain=explain,
        exact=exact,
        config=config,
        out=out,
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
    from_run: options.FromRun = None,
    emit: options.Emit = None,
    seed: options.Seed = None,
    timeout: options.Timeout = None,
    config: options.Config = None,
    out: options.Out = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Decide: the batch size and the checkpointing that give the most tokens per second within a device's memory.

    Memory is predicted, time is estimated from the device's figures. Beyond the named strategies, plans are found:
    which outputs each layer keeps, and how many layers keep how much.
    """
    given = options.given(locals())
    from gcbench.plan import command as plan_command

    plan_command.run(
        given,
        batch=batch_size,
        reserve=reserve,
        emit=emit,
        measure=measure,
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
    strategies: options.CheckStrategies = None,
    precision: options.CheckPrecision = None,
    optim: options.CheckOptim = None,
    attn_implementation: options.CheckAttention = None,
    train: options.Train = None,
    no_compile: options.NoCompile = False,
    full_size: options.FullSize = False,
    batch_size: options.CheckBatchSize = None,
    seq_len: options.CheckSeqLen = None,
    device: options.Device = None,
    layers: options.Layers = None,
    set_: options.Set = None,
    trust_remote_code: options.TrustRemoteCode = None,
    seed: options.Seed = None,
    timeout: options.Timeout = None,
    config: options.Config = None,
    out: options.CheckOut = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Check that checkpointing works for a model: gradients, recomputed layers, errors with their known causes.

    Small real training steps, each against those of off: strategies with precisions, optimizers, attention, LoRA and
    frozen layers, and torch.compile. The model is scaled down first, so that it takes seconds on a CPU.

    Without a choice, one thing differs from the plain setting at a time; what is chosen is combined with all else that
    is chosen.
    """
    tried = {"precision": precision, "optim": optim, "attn_implementation": attn_implementation}
    given = {name: value for name, value in options.given(locals()).items() if name not in tried}
    from gcbench.check import command as check_command

    check_command.run(
        given,
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


@app.command()
def compare(
    a: Annotated[
        Path, typer.Argument(metavar="A", help="A run, prediction or plan folder, or its JSON: the one before.")
    ],
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
    """Compare two runs, predictions or plans cell by cell: better, worse, or no difference shown."""
    from gcbench.cli import results

    results.compare(a, b, fail_on=fail_on or [], force=force, as_json=json)


@app.command()
def report(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A folder of a run, prediction, plan or check, or its JSON.")
    ],
    format: Annotated[str, typer.Option("--format", "-f", help="terminal, markdown, csv, json or png.")] = "terminal",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="File to write (for png: a folder); else standard output.")
    ] = None,
    json: Json = False,
) -> None:
    """Show a stored run, prediction, plan or check again, in any format."""
    from gcbench.cli import results

    results.report(folder, format="json" if json else format, out=out)


@app.command()
def models(json: Json = False) -> None:
    """List the architectures that --model knows by a short name: parameters, Hub id.

    They work offline. --model takes any other causal LM too: a Hub id, a folder or a config.json.
    """
    from gcbench.cli import listings as commands

    commands.models(as_json=json)


@app.command()
def strategies(json: Json = False) -> None:
    """List the ways to checkpoint: what each keeps, what it recomputes, who else calls it what."""
    from gcbench.cli import listings as commands

    commands.strategies(as_json=json)


@app.command()
def devices(
    device_file: options.DeviceFile = None,
    json: Json = False,
) -> None:
    """List the cards that predict and plan know by name: memory, capability, rates."""
    from gcbench.cli import listings as commands

    commands.devices(device_file, as_json=json)


@app.command()
def env(
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")] = "auto", json: Json = False
) -> None:
    """Print what an issue report needs: versions, device, driver, allocator settings."""
    from gcbench.cli import listings as commands

    commands.env(device=device, as_json=json)


def main() -> NoReturn:
    """Run the command line; the one place where errors become sentences and exit codes."""
    with streams.guarded(), interruptible():
        code = _code(_parse_and_run)
        # What was printed may still be on its way, and must not fail after the last word.
        code = _code(lambda: sys.stdout.flush()) or code
    sys.exit(code)


def _code(work: Callable[[], int | None]) -> int:
    """The exit code that `work` ends in; an error is told."""
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
    """The exit code of a command that ended by itself; raises UsageError for a wrong flag or command."""
    streams.require_output()
    try:
        # Not standalone: then a wrong flag is told like every other mistake, and at once (Typer's own panel takes
        # as long to import as everything else here together).
        code = app(prog_name="gcbench", standalone_mode=False)
    except Exception as err:
        if type(err).__name__ == "Abort":  # what some versions of Typer make of Ctrl-C
            raise KeyboardInterrupt from None
        # Whichever click Typer uses, its own or the package, its errors have these two.
        if not (hasattr(err, "format_message") and hasattr(err, "exit_code")):
            raise
        message = str(err.format_message()).strip().rstrip(".")
        if not message:  # help was shown in place of a missing command
            return int(err.exit_code)
        context = getattr(err, "ctx", None)
        command = context.command_path if context is not None else "gcbench"
        meant = usage.hint(message, command.rpartition(" ")[2], _options())
        if meant is not None:
            message = message.partition(" (Possible options")[0]
        told = [
            f"{message[:1].lower()}{message[1:]};",
            *([meant if meant.endswith("?") else f"{meant};"] if meant else []),
        ]
        raise UsageError(f"{' '.join(told)} see {command} --help") from None
    if code == Interrupted.exit_code:  # what others make of it
        raise KeyboardInterrupt
    return code if isinstance(code, int) else 0


def _options() -> dict[str, frozenset[str]]:
    """Command -> its long and short options."""
    commands = getattr(typer.main.get_command(app), "commands", {})
    return {
        name: frozenset(option for parameter in command.params for option in parameter.opts)
        for name, command in commands.items()
    }
