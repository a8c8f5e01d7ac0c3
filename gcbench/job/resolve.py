"""Resolves settings into a run: fills in defaults that depend on model and device, and lists the cells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from gcbench import strategies
from gcbench.core import model_changes
from gcbench.core.errors import UsageError
from gcbench.core.records import SCHEMA, Cell, Failure, Machine, ModelFacts, Outcome, Report, Source, Workload
from gcbench.core.units import format_bytes
from gcbench.core.version import __version__
from gcbench.devices.target import CPU, Target
from gcbench.job.preflight import beyond_positions
from gcbench.job.settings import DEFAULT_STRATEGIES, Settings, as_json
from gcbench.strategies import OFF, OWN, Plan
from gcbench.strategies._for_model import not_for, plan_of, unsupported

_SEQ_LEN = {"cpu": 64, "cuda": 1024}
_WARMUP = {"cpu": 1, "cuda": 2}
_LEAST_STEPS = {"cpu": 1, "cuda": 1}
LEAST_TIMED_S = {"cpu": 0.25, "cuda": 0.5}
"""A turn's timed steps go on until they have taken this long, unless `--steps` sets their number."""


@dataclass(frozen=True, kw_only=True)
class ResolvedRun:
    """A run with all its defaults resolved.

    Attributes:
        settings: the user's, with every default filled in.
        cells: in the order of the tables.
        plans: strategy -> plan.
        is_emulated: whether the device is emulated: one round of as few steps as possible, none of them timed.
        refusals: strategy -> why this model or device does not support it, for those that are not supported.
        plan_files: strategy -> the content of the file that it was read from.
        least_steps: the fewest timed steps of a round, where the settings do not set their number.
        notices: what was decided for the user, in sentences.
        model_notices: how the model differs from what its config says, in sentences.
    """

    settings: Settings
    cells: tuple[Cell, ...]
    plans: dict[str, Plan]
    refusals: dict[str, str]
    plan_files: dict[str, str]
    least_steps: int
    notices: tuple[str, ...]
    model_notices: tuple[str, ...] = ()
    is_emulated: bool = False

    @property
    def source(self) -> Source:
        """Where the figures of this run come from."""
        return "emulated" if self.is_emulated else "measured"


def resolve(
    requested: Settings,
    facts: ModelFacts,
    machine: Machine,
    target: Target | None = None,
    *,
    model_notices: tuple[str, ...] = (),
) -> ResolvedRun:
    """Fill in what `requested` leaves open; raises UsageError with every mistake that only the model shows.

    With `target`, resolve a prediction for that device, which `machine` then describes.
    """
    mistakes: list[str] = []
    kind = target.kind if target else machine.device.partition(":")[0]
    is_emulated = target is None and machine.emulated is not None
    notices = [target_notice(target, machine)] if target else _device_notices(requested, kind, machine)

    limit = facts.max_seq_len
    if requested.seq_len is None:
        seq_len: tuple[int, ...] = (min(_SEQ_LEN[kind], limit or _SEQ_LEN[kind]),)
        notices.append(f"Sequence length: {seq_len[0]} tokens, the default on this device.")
    else:
        seq_len = requested.seq_len
        mistakes += [
            beyond_positions(facts.model, length, limit) for length in seq_len if limit is not None and length > limit
        ]

    specs = requested.strategies or default_strategies(facts)
    if requested.strategies is None and facts.only_own is not None:
        notices.append(f"The default strategies are {' and '.join(specs)}: {facts.only_own}.")
    plans: dict[str, Plan] = {}
    plan_files: dict[str, str] = {}
    for spec in specs:
        try:
            strategy = strategies.parse(spec)
            plans[spec] = plan_of(strategy, facts)
            if strategy.content is not None:
                plan_files[spec] = strategy.content
        except ValueError as err:
            if facts.checkpointing_refusal is not None:
                plans[spec] = Plan(num_layers=facts.num_layers)
            elif requested.strategies is None:
                notices.append(f"Left out of the default strategies: {err}.")
            else:
                mistakes.append(f"--strategies: {err}")
    if mistakes:
        raise UsageError.of(mistakes)

    settings = replace(
        requested,
        device=machine.device,
        seq_len=seq_len,
        strategies=tuple(plans),
        warmup=requested.warmup or (1 if is_emulated else _WARMUP[kind]),
    )
    if is_emulated:
        settings = replace(settings, rounds=1, steps=None)
    if requested.memory_limit is not None:
        notices.append(f"Memory is limited to {format_bytes(requested.memory_limit)} to emulate a smaller device.")
    if not requested.pretrained and not target and not is_emulated:
        notices.append("Weights are random: memory and time do not depend on their values.")
    return ResolvedRun(
        settings=settings,
        cells=_cells(settings, facts),
        plans=plans,
        refusals={
            spec: why
            for spec, plan in plans.items()
            if (why := not_for(plan, facts) or unsupported(plan, kind, is_predicted=target is not None))
        },
        plan_files=plan_files,
        least_steps=0 if is_emulated else _LEAST_STEPS[kind],
        notices=tuple(notices),
        model_notices=model_notices,
        is_emulated=is_emulated,
    )


def default_strategies(facts: ModelFacts) -> tuple[str, ...]:
    """The strategies to compare where none is named."""
    return DEFAULT_STRATEGIES if facts.only_own is None else (OFF, OWN)


def _device_notices(requested: Settings, kind: str, machine: Machine) -> list[str]:
    if machine.emulated is not None:
        memory = format_bytes(machine.device_memory_bytes)
        here = "" if requested.emulate else " This process runs on that card."
        return [f"Emulated on {machine.device_name}, {memory}, which is not here.{here}"]
    if kind != "cpu":
        return [f"Measured on {machine.device_name} ({machine.device})."]
    subject = "No GPU was found, so these" if requested.device == "auto" else "These"
    return [f"{subject} are CPU figures ({machine.device_name}): they say nothing about a GPU's times."]


def target_notice(target: Target, machine: Machine) -> str:
    """Say which device a prediction is for; `machine` describes it."""
    name = "the CPU" if target.kind == "cpu" else machine.device_name
    memory = "" if target.memory_bytes is None else format_bytes(target.memory_bytes)
    memory = f", {memory}" if memory and memory not in name else ""  # a card without a name is named by its memory
    return f"Predicted for {name}{memory}; nothing was run there."


def _cells(settings: Settings, facts: ModelFacts) -> tuple[Cell, ...]:
    return tuple(
        Cell(
            workload=Workload(
                model=settings.model,
                device=settings.device,
                batch_size=batch_size,
                seq_len=seq_len,
                precision=settings.precision,
                optim=settings.optim,
                attn_implementation=facts.attn_implementation,
                lora_r=settings.lora_r,
                model_changes=model_changes.describe(settings.layers, settings.set),
            ),
            strategy=strategy,
        )
        for batch_size in settings.batch_size
        for seq_len in settings.seq_len or ()
        for strategy in settings.strategies or ()
    )


def begin(resolved: ResolvedRun, machine: Machine, facts: ModelFacts, command: str) -> Report:
    """Make the report of a run before anything is measured or predicted."""
    return Report(
        schema=SCHEMA,
        gcbench_version=__version__,
        command=command,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        settings=as_json(resolved.settings),
        machine=machine,
        model=facts,
        outcomes=tuple(_empty(cell, resolved, facts) for cell in resolved.cells),
        notices=resolved.notices,
        plan_files=resolved.plan_files,
        model_notices=resolved.model_notices,
        source=resolved.source,
    )


def _empty(cell: Cell, resolved: ResolvedRun, facts: ModelFacts) -> Outcome:
    if facts.checkpointing_refusal is not None and cell.strategy != OFF:
        return Outcome(
            cell=cell,
            layers_checkpointed=0,
            failure=Failure(kind="unsupported", message=f"{facts.checkpointing_refusal}; only off is possible"),
        )
    why = resolved.refusals.get(cell.strategy)
    return Outcome(
        cell=cell,
        layers_checkpointed=resolved.plans[cell.strategy].layers_checkpointed,
        failure=None if why is None else Failure(kind="unsupported", message=why),
    )


def described(machine: Machine, target: Target) -> Machine:
    """Describe the target as a report's machine, with this machine's versions, as its libraries make the prediction."""
    if target.kind == CPU or target.name == machine.device:
        return machine
    card = target.card
    name = card.title if card else f"a CUDA device of {format_bytes(target.memory_bytes)}"
    known: Mapping[str, str | None] = {
        "compute_capability": card.compute_capability if card else None,
        "predicted_on": machine.device_name,
    }
    return replace(
        machine,
        device=target.name,
        device_name=name,
        device_memory_bytes=target.memory_bytes,
        settings={key: value for key, value in known.items() if value is not None},
    )
