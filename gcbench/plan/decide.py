"""Makes one decision: resolves target and model, then runs the search in a child process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from gcbench.core import headroom
from gcbench.core.errors import GcbenchError
from gcbench.devices.target import CPU, Target, TargetOptions, resolve_target
from gcbench.job.describe import describe
from gcbench.job.resolve import described, resolve
from gcbench.job.settings import Settings
from gcbench.models import sources
from gcbench.plan.decision import Decision
from gcbench.plan.named import named, own_plan, unconfirmed
from gcbench.plan.planned import PlanOptions, PlanResult
from gcbench.plan.task import Decided, Planning, PlanTask
from gcbench.processes.children import Children
from gcbench.processes.messages import Answer, raise_refusal

NAMED = ("off", "per-layer", "every:2", "every:4", "selective:attention", "selective:matmul")
"""The strategies that searched plans are compared with, unless `--strategies` names others."""


def decide(
    settings: Settings,
    target_options: TargetOptions,
    options: PlanOptions,
    target: Target | None,
    *,
    source: sources.ModelSource,
    children: Children,
    command: str,
    on_step: Callable[[int, int, str], object] = lambda done, total, doing: None,
) -> PlanResult:
    """The decision; `target` None means the device of this machine.

    `on_step` is called with (steps done, steps in all, what is done now). Raises GcbenchError.
    """
    here = target_options.device if target is None and target_options.device else "auto" if target is None else CPU
    machine, facts = describe(replace(settings, device=here), source, children, needs_order=True)
    is_here = (target is None and machine.emulated is None) or (
        target is not None and target.kind == CPU and machine.device == CPU
    )
    target = target or resolve_target(target_options, machine)
    assert target is not None
    if target.kind == CPU and target.memory_bytes is None:
        target = replace(target, memory_bytes=machine.device_memory_bytes)
    specs = settings.strategies or NAMED
    checked = replace(settings, strategies=specs if settings.strategies else ("off",))
    job = resolve(checked, facts, described(machine, target), target, model_notices=source.notices)
    assert job.settings.seq_len is not None
    seq_len = job.settings.seq_len[0]
    answered: list[Decision] = []

    def on_event(event: object) -> None:
        if isinstance(event, Decided):
            answered.append(event.decision)
        elif isinstance(event, Planning):
            on_step(event.done, event.total, event.doing)

    task = PlanTask(
        source=source,
        layers=settings.layers,
        overrides=settings.set or {},
        attn_implementation=settings.attn_implementation,
        lora=settings.lora,
        precision=settings.precision,
        optim=settings.optim,
        target=target,
        seq_len=seq_len,
        named=named(specs, facts, target, is_default=settings.strategies is None),
        batch_sizes=options.batch_sizes,
        reserve_frac=headroom.RESERVE_FRAC[target.kind] if options.reserve_frac is None else options.reserve_frac,
        layers_in_order=facts.layers_in_order,
        can_checkpoint=facts.checkpointing_refusal is None and facts.only_own is None,
        own=own_plan(facts),
        is_confirmed=options.measure,
        device_here=machine.device if is_here else None,
    )
    answer = children.run(task, on_event=on_event, timeout_s=settings.timeout)
    raise_refusal(Answer(refusal=answer.refusal))
    if not answered:
        why = answer.failure.message if answer.failure else "its process ended without an answer"
        raise GcbenchError(f"no decision could be made: {why}")
    return PlanResult(
        settings=settings,
        seq_len=seq_len,
        target=target,
        machine=machine,
        facts=facts,
        decision=replace(answered[0], notices=(*job.notices, *answered[0].notices, *unconfirmed(target, is_here))),
        command=command,
        created="",
        hub_id=None if Path(source.location).exists() else source.location,
        source=source,
        model_notices=job.model_notices,
    )
