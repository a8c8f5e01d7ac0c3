"""One `gcbench plan` from settings to what is printed: target and model found, a child asked, the answer shown."""

from __future__ import annotations

import json
import shlex
import threading
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path

from rich.console import Console

from gcbench import changes, counting, flash, headroom, preflight, runner, sources, streams
from gcbench import report as reports
from gcbench.added import of_decision
from gcbench.changes import ChangedConfig
from gcbench.children import Children, ForkedChildren
from gcbench.config import Settings
from gcbench.decision import FOUND, Candidate, Decision
from gcbench.errors import GcbenchError, Interrupted, ThresholdBroken, UsageError
from gcbench.forecast import described
from gcbench.handover import Handover, Rival, Training
from gcbench.interruption import ignore_more
from gcbench.plan_named import in_run_order, named, own_plan, unconfirmed
from gcbench.records import Machine, ModelFacts
from gcbench.report import write_text
from gcbench.resolve import resolve
from gcbench.simulate.target import Target
from gcbench.store import Store
from gcbench.strategies.plan_file import as_json as plan_as_json
from gcbench.targets import CPU, Wish, target_of
from gcbench.tasks import Answer, Decided, Planning, PlanTask

NAMED = ("off", "per-layer", "every:2", "every:4", "selective:attention", "selective:matmul")
"""What is weighed against what is found, unless strategies are named."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What `plan` takes besides the workload and the device.

    Attributes:
        batch_sizes: None for all that may pay.
        reserve_frac: None for the default of the kind of device.
        emit: the tool to print settings for.
        measure: whether the best few are run before the answer.
    """

    batch_sizes: tuple[int, ...] | None
    reserve_frac: float | None
    emit: str | None
    measure: bool


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A decision with all that it was made for.

    Attributes:
        hub_id: under which the model is found on the Hub; None where that is not known.
        source: the model; None for a decision from a stored run.
        plan_file: where the plan of the choice is stored; None where nothing was chosen, or nothing stored.
        changed: what `--layers` and `--set` came to in the model's config; None for the model itself.
        stored_where: the device in words, of a plan that was stored; None for one that was just made.
        model_notices: in what the model differs from what its config says, in sentences.
    """

    settings: Settings
    seq_len: int
    target: Target
    machine: Machine
    facts: ModelFacts
    decision: Decision
    command: str
    created: str
    hub_id: str | None
    source: sources.ModelSource | None = None
    plan_file: Path | None = None
    changed: ChangedConfig | None = None
    stored_where: str | None = None
    model_notices: tuple[str, ...] = ()

    @property
    def source_or_raise(self) -> sources.ModelSource:
        """The model; a decision from a stored run has none to run again."""
        assert self.source is not None
        return self.source

    @property
    def changes(self) -> str | None:
        """What `--layers` and `--set` changed about the model, in words."""
        return changes.told(self.settings.layers, self.settings.set)

    @property
    def name(self) -> str:
        """The model, with what was changed about it."""
        return changes.named(self.settings.model, self.changes)

    @property
    def where(self) -> str:
        """What the plan is for; a card of which only the memory is known has no name."""
        card = self.target.card
        if self.stored_where is not None or card is not None:
            return self.stored_where or (card.title if card is not None else "")
        return self.machine.device_name if self.target.kind == CPU else "a CUDA device"

    @property
    def handover(self) -> Handover | None:
        """What a training tool is to be told; None where nothing fits."""
        choice = self.decision.choice
        if choice is None:
            return None

        def rival(candidate: Candidate) -> Rival:
            return Rival(
                strategy=candidate.strategy,
                plan=candidate.plan,
                batch_size=candidate.batch_size,
                peak_bytes=candidate.peak_bytes,
                tokens_per_s_frac=candidate.tokens_per_s / choice.tokens_per_s,
            )

        found = choice.strategy == FOUND and self.plan_file is not None
        chosen = replace(rival(choice), strategy=f"plan:{self.plan_file}" if found else choice.strategy)
        return Handover(
            model=self.settings.model,
            hub_id=self.hub_id,
            choice=chosen,
            rivals=tuple(rival(each) for each in self.decision.candidates if each.fits and each != choice),
            plan_file=str(self.plan_file) if self.plan_file else None,
            seq_len=self.seq_len,
            precision=self.settings.precision,
            optim=self.settings.optim,
            attn_implementation=self.settings.attn_implementation,
            lora_r=self.settings.lora_r,
            lora_target_modules=self.settings.lora_target_modules,
            model_changes=self.changes,
            config=self.changed,
            notes=of_decision(self.decision),
            model_notices=self.model_notices,
        )


def check_emit(tool: str | None, settings: Settings) -> None:
    """Raise UsageError where the tool cannot run the workload, whatever is planned for it."""
    if tool is None:
        return
    from gcbench import export

    export.check(
        tool,
        Training(
            model=settings.model,
            precision=settings.precision,
            optim=settings.optim,
            attn_implementation=settings.attn_implementation,
            lora_r=settings.lora_r,
            lora_target_modules=settings.lora_target_modules,
            model_changes=changes.told(settings.layers, settings.set),
        ),
    )


def plan(
    wanted: Settings, wish: Wish, asked: Asked, *, out: Path | None, command: str, as_json: bool, quiet: bool
) -> None:
    """Decide, store and show; raises GcbenchError for what cannot be decided."""
    early = target_of(wish, None)  # a name that is not in the catalogue is told before anything is imported
    check_emit(asked.emit, wanted)
    flash.check_plan(wanted.attn_implementation, early)
    if asked.measure and early is not None and early.kind != CPU:
        raise UsageError(_not_here(wish, early.name))
    source = preflight.model_of(wanted)
    created = datetime.now(UTC).isoformat(timespec="seconds")
    err = Console(stderr=True)
    with Store.create(out) if out else Store.new(f"plan-{sources.slug(wanted.model)}", created) as store:
        try:
            with ExitStack() as stack:
                preload = (*sources.modules(source), "gcbench.planner.search")
                children = stack.enter_context(ForkedChildren(preload=preload))
                # Half a second that the plot takes to begin with, spent while the children are at work.
                threading.Thread(target=import_module, args=("matplotlib.backends.backend_agg",), daemon=True).start()
                with counting.choose(err, verb="planning", noun="steps", quiet=quiet) as counter:
                    planned = decide(
                        wanted,
                        wish,
                        asked,
                        early,
                        source=source,
                        children=children,
                        command=command,
                        on_step=counter.count,
                    )
                planned = replace(planned, created=created, changed=runner.changed_config(wanted, source, children))
                if asked.measure:
                    planned = _confirmed(planned, wish, children=children, store=store, quiet=quiet, err=err)
        except KeyboardInterrupt:
            ignore_more()
            raise Interrupted(_kept(store)) from None
        finish(planned, asked, store, as_json=as_json, quiet=quiet, err=err)


def _kept(store: Store) -> str:
    """After an interruption: what there is, and what it is good for."""
    try:
        done = sum(len(outcome.rounds) for outcome in reports.load(store.folder).outcomes)
    except GcbenchError:
        done = 0
    if not done:
        return "interrupted before a plan was made"
    folder = shlex.quote(str(store.folder))
    return (
        f"interrupted; {done} measured rounds are kept in {store.folder}; "
        f"decide by them with: gcbench plan --from {folder}"
    )


def _not_here(wish: Wish, target: str) -> str:
    """Why --measure cannot confirm the plan, with the flag that would change it."""
    if wish.device is None:
        return (
            "--measure runs on this machine, and --device-memory alone stands for a CUDA device of that size; add "
            "--device cpu, or --device auto for what this machine has, or leave out --measure"
        )
    return (
        f"--measure runs on this machine, and the plan is for {target}; leave out --device, or take --device auto, or "
        "leave out --measure"
    )


def _confirmed(planned: Planned, wish: Wish, *, children: Children, store: Store, quiet: bool, err: Console) -> Planned:
    """The plan after its best candidates have run here."""
    from gcbench import plan_measure, progress

    if planned.target.name != planned.machine.device:
        raise UsageError(_not_here(wish, planned.target.name))
    with progress.choose(err, quiet=quiet) as display:
        return plan_measure.confirm(planned, children=children, store=store, progress=display)


def finish(planned: Planned, asked: Asked, store: Store | None, *, as_json: bool, quiet: bool, err: Console) -> None:
    """Store the decision if there is a place, translate it for a tool if one was named, and show it."""
    from gcbench import plan_nothing, plan_view

    if store is not None:
        planned = publish(planned, store)
    emitted = None
    if asked.emit is not None:
        from gcbench import export

        if planned.handover is not None:  # else the sentence that nothing fits is what there is to say
            emitted = export.emit(asked.emit, planned.handover)
    folder = None if store is None else store.folder
    try:
        with streams.kept_in(folder) if folder is not None else nullcontext():
            plan_view.show(
                planned,
                emitted,
                as_json=as_json,
                quiet=quiet,
                err=err,
                folder=folder,
                emits=asked.emit is not None,
            )
    finally:
        if store is not None:
            store.close()
    if planned.decision.choice is None:
        raise ThresholdBroken(plan_nothing.nothing_fits(planned))


def decide(
    wanted: Settings,
    wish: Wish,
    asked: Asked,
    target: Target | None,
    *,
    source: sources.ModelSource,
    children: Children,
    command: str,
    on_step: Callable[[int, int, str], object] = lambda done, total, doing: None,
) -> Planned:
    """The decision; `target` None is what this machine has.

    `on_step` gets what is done of how much, and what is next.
    """
    here = wish.device if target is None and wish.device else "auto" if target is None else CPU
    machine, facts = runner.describe(replace(wanted, device=here), source, children, needs_order=True)
    is_here = target is None or (target.kind == CPU and machine.device == CPU)
    target = target or target_of(wish, machine)
    assert target is not None
    if target.kind == CPU and target.memory_bytes is None:
        target = replace(target, memory_bytes=machine.device_memory_bytes)
    specs = wanted.strategies or NAMED
    checked = replace(wanted, strategies=specs if wanted.strategies else ("off",))
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
        layers=wanted.layers,
        overrides=wanted.set or {},
        attn_implementation=wanted.attn_implementation,
        lora=wanted.lora,
        precision=wanted.precision,
        optim=wanted.optim,
        target=target,
        seq_len=seq_len,
        named=named(specs, facts, target, is_default=wanted.strategies is None),
        batch_sizes=asked.batch_sizes,
        reserve_frac=headroom.RESERVE_FRAC[target.kind] if asked.reserve_frac is None else asked.reserve_frac,
        layers_in_order=facts.layers_in_order,
        can_checkpoint=facts.checkpointing_refusal is None and facts.only_own is None,
        own=own_plan(facts),
        is_confirmed=asked.measure,
        device_here=machine.device if is_here else None,
    )
    answer = children.run(task, on_event=on_event, timeout_s=wanted.timeout)
    runner.raise_refusal(Answer(refusal=answer.refusal))
    if not answered:
        why = answer.failure.message if answer.failure else "the process ended without a word"
        raise GcbenchError(f"no decision could be made: {why}")
    return Planned(
        settings=wanted,
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


def publish(planned: Planned, store: Store) -> Planned:
    """Write the plan of the choice, the decision and its picture into the store's folder."""
    from gcbench import plan_plot, plan_view, stored

    folder, choice = store.folder, planned.decision.choice
    with store.attempt():
        if choice is not None:
            document = plan_as_json(in_run_order(choice.plan, planned.facts.layers_in_order))
            write_text(folder / stored.PLAN_NAME, json.dumps(document, indent=1) + "\n")
            planned = replace(planned, plan_file=folder / stored.PLAN_NAME)
        write_text(folder / "decision.json", plan_view.document(planned, None))
        stored.save_plan(planned, folder)
        write_text(folder / "plan.md", plan_view.markdown(planned))
        write_text(folder / "plan.txt", plan_view.text(planned, width=100))
        plan_plot.draw(planned, folder / "plots")
    return planned
