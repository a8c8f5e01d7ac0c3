"""One `gcbench plan` from checked settings to the printed answer: decide in a child process, store, show."""

from __future__ import annotations

import json
import shlex
import threading
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path

from rich.console import Console

from gcbench.core import model_changes, streams
from gcbench.core.errors import GcbenchError, Interrupted, ThresholdBroken, UsageError
from gcbench.core.files import write_text
from gcbench.core.interruption import ignore_more
from gcbench.devices.conditions import SLEEPING
from gcbench.devices.target import CPU, TargetOptions, resolve_target
from gcbench.emulate import environment
from gcbench.export._handover import Training
from gcbench.job import preflight
from gcbench.job.describe import changed_config
from gcbench.job.settings import Settings
from gcbench.models import flash_attention, sources
from gcbench.models.sources import slug
from gcbench.plan import from_run
from gcbench.plan.decide import decide
from gcbench.plan.named import in_run_order
from gcbench.plan.planned import PlanOptions, PlanResult
from gcbench.plan.stored import load_plan, save_plan
from gcbench.processes import progress as counting
from gcbench.processes.children import Children, ForkedChildren
from gcbench.report import report_file as reports
from gcbench.report import stored_kind
from gcbench.report.run_folder import Store
from gcbench.strategies.plan_file import as_json as plan_as_json


def check_emit(tool: str | None, settings: Settings) -> None:
    """Raise UsageError where the tool cannot run the workload with any plan."""
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
            model_changes=model_changes.describe(settings.layers, settings.set),
        ),
    )


def plan(
    settings: Settings,
    target_options: TargetOptions,
    options: PlanOptions,
    *,
    out: Path | None,
    command: str,
    as_json: bool,
    quiet: bool,
) -> None:
    """Decide, store and show; raises GcbenchError for what cannot be decided."""
    # Before anything slow is imported: a name that is not in the catalogue is an error.
    early = resolve_target(target_options, None)
    check_emit(options.emit, settings)
    flash_attention.check_plan(settings.attn_implementation, early)
    if options.measure and early is not None and early.kind != CPU:
        raise UsageError(_not_here(target_options, early.name))
    source = preflight.model_of(settings)
    added: dict[str, str] | None = None
    if options.emulate:
        from gcbench.plan import emulated

        # Before the search, so that nothing is planned in vain where a card cannot be emulated, and for the search too:
        # a CUDA build of torch without NVIDIA's libraries is imported in that environment alone.
        added = environment.environment(emulated.card_of(early)) | emulated.variables(early)
    created = datetime.now(UTC).isoformat(timespec="seconds")
    err = Console(stderr=True)
    with Store.create(out) if out else Store.new(f"plan-{sources.slug(settings.model)}", created) as store:
        try:
            with ExitStack() as stack:
                preload = (*sources.modules(source), "gcbench.plan.search.planner")
                children = stack.enter_context(ForkedChildren(preload=preload, environment=added, defaults=SLEEPING))
                # Importing matplotlib takes half a second, spent while the children work.
                threading.Thread(target=import_module, args=("matplotlib.backends.backend_agg",), daemon=True).start()
                with counting.choose(err, verb="planning", noun="steps", quiet=quiet) as counter:
                    planned = decide(
                        settings,
                        target_options,
                        options,
                        early,
                        source=source,
                        children=children,
                        command=command,
                        on_step=counter.count,
                    )
                planned = replace(planned, created=created, changed=changed_config(settings, source, children))
                if options.measure:
                    planned = _confirmed(planned, target_options, children=children, store=store, quiet=quiet, err=err)
                if added is not None and planned.decision.choice is not None:
                    planned = _emulated(planned, children=children, quiet=quiet, err=err)
        except KeyboardInterrupt:
            ignore_more()
            raise Interrupted(_after_interruption(store)) from None
        finish(planned, options, store, as_json=as_json, quiet=quiet, err=err)


def _after_interruption(store: Store) -> str:
    """The message after an interruption: what was saved, and how to use it."""
    try:
        done = sum(len(outcome.rounds) for outcome in reports.load(store.folder).outcomes)
    except GcbenchError:
        done = 0
    if not done:
        return "interrupted before a plan was made"
    folder = shlex.quote(str(store.folder))
    return (
        f"interrupted; {done} measured rounds are saved in {store.folder}; "
        f"decide from them with: gcbench plan --from {folder}"
    )


def _not_here(target_options: TargetOptions, target: str) -> str:
    """The error where --measure cannot confirm the plan on this machine, with the flag that would allow it."""
    if target_options.device is None:
        return (
            "--measure runs on this machine, and --device-memory alone means a CUDA device of that size; add "
            "--device cpu, or --device auto for the device of this machine, or leave out --measure"
        )
    return (
        f"--measure runs on this machine, and the plan is for {target}; leave out --device, or use --device auto, or "
        "leave out --measure"
    )


def _confirmed(
    planned: PlanResult, target_options: TargetOptions, *, children: Children, store: Store, quiet: bool, err: Console
) -> PlanResult:
    """The plan with its leading candidates measured on this machine."""
    from gcbench.measure import progress
    from gcbench.plan import confirm

    if planned.target.name != planned.machine.device:
        raise UsageError(_not_here(target_options, planned.target.name))
    with progress.choose(err, quiet=quiet) as display:
        return confirm.confirm(planned, children=children, store=store, progress=display)


def _emulated(planned: PlanResult, *, children: Children, quiet: bool, err: Console) -> PlanResult:
    """The plan with its choice run on the emulated card of the children."""
    from gcbench.measure import progress
    from gcbench.plan import emulated

    with progress.choose(err, quiet=quiet, verb="emulating") as display:
        return emulated.confirm(planned, children=children, progress=display)


def finish(
    planned: PlanResult, options: PlanOptions, store: Store | None, *, as_json: bool, quiet: bool, err: Console
) -> None:
    """Store the decision if there is a store, translate it for a tool if one was named, and show it.

    Raises ThresholdBroken where nothing fits.
    """
    from gcbench.plan import nothing_fits, view

    if store is not None:
        planned = publish(planned, store)
    emitted = None
    if options.emit is not None:
        from gcbench import export

        if planned.handover is not None:  # else nothing fits, which is raised below
            emitted = export.emit(options.emit, planned.handover)
    folder = None if store is None else store.folder
    try:
        with streams.stored_in(folder) if folder is not None else nullcontext():
            view.show(
                planned,
                emitted,
                as_json=as_json,
                quiet=quiet,
                err=err,
                folder=folder,
                emits=options.emit is not None,
            )
    finally:
        if store is not None:
            store.close()
    if planned.decision.choice is None:
        raise ThresholdBroken(nothing_fits.nothing_fits(planned))


def publish(planned: PlanResult, store: Store) -> PlanResult:
    """Write the plan of the choice, the decision and its plot into the store's folder."""
    from gcbench.plan import plot, view
    from gcbench.report import stored_kind

    folder, choice = store.folder, planned.decision.choice
    with store.attempt():
        if choice is not None:
            document = plan_as_json(in_run_order(choice.plan, planned.facts.layers_in_order))
            write_text(folder / stored_kind.PLAN_NAME, json.dumps(document, indent=1) + "\n")
            planned = replace(planned, plan_file=folder / stored_kind.PLAN_NAME)
        write_text(folder / "decision.json", view.document(planned, None))
        save_plan(planned, folder)
        write_text(folder / "plan.md", view.markdown(planned))
        write_text(folder / "plan.txt", view.text(planned, width=100))
        plot.draw(planned, folder / "plots")
    return planned


def plan_from_stored(
    folder: Path,
    settings: Settings,
    target_options: TargetOptions,
    options: PlanOptions,
    *,
    out: Path | None,
    command: str,
    as_json: bool,
    quiet: bool,
) -> None:
    """Decide from the run in `folder`, store and show; raises ResultsError where it lacks what a decision needs."""
    if stored_kind.kind_of(folder) == "plan" and _again(folder, settings, target_options, options):
        _shown_again(folder, options, out=out, as_json=as_json, quiet=quiet)
        return
    report = reports.load(folder)
    planned = from_run.decide(report, folder, settings, target_options, options, command=command)
    with Store.create(out) if out else Store.new(f"plan-{slug(report.model.model)}", planned.created) as store:
        finish(planned, options, store, as_json=as_json, quiet=quiet, err=Console(stderr=True))


def _again(folder: Path, settings: Settings, target_options: TargetOptions, options: PlanOptions) -> bool:
    """Whether the stored plan is shown unchanged; one that was measured can be decided anew from its run.

    Raises UsageError where a plan without a run should be decided anew.
    """
    anew = {
        "--batch": options.batch_sizes,
        "--seq-len": settings.seq_len,
        "--strategies": settings.strategies,
        "--reserve": options.reserve_frac,
        "--device": target_options.device,
        "--device-memory": target_options.device_memory,
    }
    passed = [flag for flag, value in anew.items() if value is not None]
    if passed and not (folder / reports.REPORT_NAME).exists():
        raise UsageError(
            f"{', '.join(passed)}: {folder} is a stored plan, which is taken as it is; leave the flag out, or plan "
            "anew without --from"
        )
    return not passed


def _shown_again(folder: Path, options: PlanOptions, *, out: Path | None, as_json: bool, quiet: bool) -> None:
    """Show a stored plan, with the settings for a tool if one is named; nothing is planned anew."""
    planned = load_plan(folder)
    check_emit(options.emit, planned.settings)
    err = Console(stderr=True)
    if out is None:
        finish(planned, options, None, as_json=as_json, quiet=quiet, err=err)
        return
    with Store.create(out) as store:
        finish(planned, options, store, as_json=as_json, quiet=quiet, err=err)
