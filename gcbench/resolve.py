"""From what the user asked for to what will be measured: defaults that depend on model and device, and cells."""

from __future__ import annotations

from dataclasses import dataclass, replace

from gcbench import changes, strategies
from gcbench.config import DEFAULT_STRATEGIES, Settings
from gcbench.errors import UsageError
from gcbench.preflight import beyond_positions
from gcbench.records import Cell, Machine, ModelFacts, Workload
from gcbench.simulate.target import Target
from gcbench.strategies import OFF, OWN, Plan, Strategy
from gcbench.units import format_bytes

_SEQ_LEN = {"cpu": 64, "cuda": 1024}
_WARMUP = {"cpu": 1, "cuda": 2}
_LEAST_STEPS = {"cpu": 1, "cuda": 5}
LEAST_TIMED_S = 1.0
"""Timed steps go on until they have taken this long in a round, unless their number is given."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run, fully decided.

    Attributes:
        settings: with every default filled in.
        cells: in the order of the tables.
        plans: strategy -> plan.
        refusals: strategy -> why it cannot be had on this device, for those that cannot.
        plan_files: strategy -> the content of the file that it was read from.
        least_steps: timed steps of a round, at least, where the settings do not give their number.
        notices: what was decided for the user, in sentences.
        model_notices: in what the model differs from what its config says, in sentences.
    """

    settings: Settings
    cells: tuple[Cell, ...]
    plans: dict[str, Plan]
    refusals: dict[str, str]
    plan_files: dict[str, str]
    least_steps: int
    notices: tuple[str, ...]
    model_notices: tuple[str, ...] = ()


def resolve(
    wanted: Settings,
    facts: ModelFacts,
    machine: Machine,
    target: Target | None = None,
    *,
    model_notices: tuple[str, ...] = (),
) -> Job:
    """Decide what `wanted` leaves open; raises UsageError with every mistake that only the model shows.

    With `target`, for a prediction of what it would do there; `machine` then describes it.
    """
    mistakes: list[str] = []
    kind = target.kind if target else machine.device.partition(":")[0]
    notices = [target_notice(target, machine)] if target else _device_notices(wanted, kind, machine)

    limit = facts.max_seq_len
    if wanted.seq_len is None:
        seq_len: tuple[int, ...] = (min(_SEQ_LEN[kind], limit or _SEQ_LEN[kind]),)
        notices.append(f"Sequence length not given: {seq_len[0]} tokens, the default on this device.")
    else:
        seq_len = wanted.seq_len
        mistakes += [
            beyond_positions(facts.model, length, limit) for length in seq_len if limit is not None and length > limit
        ]

    specs = wanted.strategies or default_strategies(facts)
    if wanted.strategies is None and facts.only_own is not None:
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
            elif wanted.strategies is None:
                notices.append(f"Left out of the default strategies: {err}.")
            else:
                mistakes.append(f"--strategies: {err}")
    if mistakes:
        raise UsageError.of(mistakes)

    settings = replace(
        wanted,
        device=machine.device,
        seq_len=seq_len,
        strategies=tuple(plans),
        warmup=wanted.warmup or _WARMUP[kind],
    )
    if wanted.memory_limit is not None:
        notices.append(f"Memory is limited to {format_bytes(wanted.memory_limit)} to stand for a smaller device.")
    if not wanted.pretrained and not target:
        notices.append("Weights are random: memory and time do not depend on their values.")
    return Job(
        settings=settings,
        cells=_cells(settings, facts),
        plans=plans,
        refusals={
            spec: why
            for spec, plan in plans.items()
            if (why := not_for(plan, facts) or unsupported(plan, kind, is_predicted=target is not None))
        },
        plan_files=plan_files,
        least_steps=_LEAST_STEPS[kind],
        notices=tuple(notices),
        model_notices=model_notices,
    )


def default_strategies(facts: ModelFacts) -> tuple[str, ...]:
    """What is compared where nothing is named."""
    return DEFAULT_STRATEGIES if facts.only_own is None else (OFF, OWN)


def plan_of(strategy: Strategy, facts: ModelFacts) -> Plan:
    """What a strategy becomes for a model; raises ValueError when it cannot be had for it."""
    if strategy.is_own and facts.own_groups is not None:
        return replace(strategy.plan_for(facts.num_layers), groups=facts.own_groups)
    order = facts.layers_in_order
    if not strategy.counts_run or order is None:
        return strategy.plan_for(facts.num_layers)
    return strategy.plan_for(len(order)).renumbered(order, facts.num_layers)


def not_for(plan: Plan, facts: ModelFacts) -> str | None:
    """Why a model cannot have a plan, with what to do; None when it can, or can have none at all."""
    if plan.groups and not plan.own:
        return facts.only_own
    if plan.own and not plan.groups and facts.num_layers:
        return "the model's own flag for checkpointing changes nothing: no layer runs again; take off"
    return None


def unsupported(plan: Plan, kind: str, *, is_predicted: bool = False) -> str | None:
    """Why a plan cannot be had on a kind of device, with what to do; None when it can."""
    if plan.any_policy("offload") and kind == "cpu":
        return "offload moves what layers keep to the host's memory, and on a CPU it is there already; leave it out"
    if is_predicted and plan.compiled:
        return "what a compiler keeps is known once it has compiled; measure it with gcbench run"
    return None


def _device_notices(wanted: Settings, kind: str, machine: Machine) -> list[str]:
    if kind != "cpu":
        return [f"Measured on {machine.device_name} ({machine.device})."]
    found = "No GPU was found, so these" if wanted.device == "auto" else "These"
    return [f"{found} are CPU figures ({machine.device_name}): they do not stand for a GPU's times."]


def target_notice(target: Target, machine: Machine) -> str:
    """What a prediction is for; `machine` describes the target."""
    name = "the CPU" if target.kind == "cpu" else machine.device_name
    memory = "" if target.memory_bytes is None else format_bytes(target.memory_bytes)
    memory = f", {memory}" if memory and memory not in name else ""  # a card without a name is told by its memory
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
                model_changes=changes.told(settings.layers, settings.set),
            ),
            strategy=strategy,
        )
        for batch_size in settings.batch_size
        for seq_len in settings.seq_len or ()
        for strategy in settings.strategies or ()
    )
