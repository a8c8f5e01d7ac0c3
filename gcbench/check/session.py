"""Runs a check from its options to its output: child processes test the combinations, and verdicts are shown."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.console import Console

from gcbench.check import cases as checks
from gcbench.check import view
from gcbench.check.cases import FAILED, UNSUPPORTED, Check, CheckResult, Combination
from gcbench.check.task import CheckTask, ReferenceRun
from gcbench.core import model_changes, streams
from gcbench.core.errors import Interrupted, ThresholdBroken
from gcbench.core.files import write_text
from gcbench.core.interruption import ignore_more
from gcbench.core.json_codec import encode
from gcbench.core.records import Json, Machine, ModelFacts
from gcbench.devices import cards
from gcbench.emulate import environment
from gcbench.job import preflight
from gcbench.job.describe import DescribeTask, operators
from gcbench.models import sources
from gcbench.models.sources import ModelSource
from gcbench.processes import progress
from gcbench.processes.children import Children, ForkedChildren
from gcbench.processes.messages import Answer, raise_refusal
from gcbench.report.formats.json_rows import document
from gcbench.report.rows import NOTHING_SHOWN
from gcbench.report.run_folder import Store
from gcbench.strategies import OWN

_VERSIONS = ("gcbench", "torch", "transformers", "peft")
_DESCRIBE_TIMEOUT_S = 600.0


@dataclass(frozen=True, kw_only=True)
class CheckOptions:
    """What to check; None for the default choice."""

    model: str
    strategies: tuple[str, ...] | None = None
    precisions: tuple[str, ...] | None = None
    optims: tuple[str, ...] | None = None
    attentions: tuple[str, ...] | None = None
    tuned: tuple[str, ...] | None = None
    compiled: bool = True
    device: str = "auto"
    emulate: str | None = None
    batch_size: int = 2
    seq_len: int | None = None
    layers: int | None = None
    overrides: dict[str, Json] | None = None
    full_size: bool = False
    trust_remote_code: bool = False
    seed: int = 0
    timeout_s: float | None = 3600.0


def check(options: CheckOptions, *, out: Path | None, command: str, as_json: bool, quiet: bool) -> None:
    """Run a check, show it, and store it in the folder `out` if there is one; raises what `raise_for` does."""
    source = preflight.examine(
        sources.resolve(options.model, trust_remote_code=options.trust_remote_code, overrides=options.overrides),
        preflight.Requested(
            overrides=options.overrides or {},
            layers=options.layers,
            seq_lens=() if options.seq_len is None else (options.seq_len,),
            strategies=options.strategies or (),
            precision=options.precisions[0] if options.precisions and len(options.precisions) == 1 else None,
        ),
    )
    card = None if options.emulate is None else cards.find_to_emulate(options.emulate)
    added = None if card is None else environment.environment(card)
    err = Console(stderr=True)
    with ExitStack() as stack:
        store = stack.enter_context(Store.create(out)) if out is not None else None
        try:
            with (
                ForkedChildren(environment=added) as children,
                progress.choose(err, verb="checking", noun="combinations", quiet=quiet) as counter,
            ):
                done = run(options, source=source, children=children, command=command, on_result=counter.count)
        except KeyboardInterrupt:
            ignore_more()
            raise Interrupted("interrupted before anything was checked") from None
        done = replace(done, notices=(*source.notices, *done.notices))
        is_partial = len(done.results) < len(done.combinations)
        if store is not None and done.results:
            with store.attempt():
                write_text(store.folder / "check.json", json.dumps(encode(done), indent=1) + "\n")
                write_text(store.folder / "check.md", view.markdown(done))
        if is_partial:
            raise Interrupted(_interrupted(done, store))
        try:
            with streams.stored_in(store.folder) if store is not None else nullcontext():
                if as_json:
                    streams.print_json(document(asdict(row) for row in checks.rows(done)))
                else:
                    view.show(done)
        finally:
            if store is not None:
                store.close()
        if store is not None and not quiet:
            err.print(f"Everything is in {store.folder}", markup=False, highlight=False, soft_wrap=True)
    raise_for(done)


def raise_for(check: Check) -> None:
    """Raise ThresholdBroken when a combination that counts is wrong or without a verdict, or when none was tested."""
    if check.failures:
        raise ThresholdBroken(f"{_some(check.failures)} did not train as off does; see the reasons in the table")
    if check.open_questions:
        raise ThresholdBroken(
            f"{NOTHING_SHOWN} about {_some(check.open_questions)}; see in the table how much its runs differ"
        )
    if check.is_empty:
        reasons = dict.fromkeys((result.cause or result.message or "").rstrip(".") for result in check.results)
        why, *others = reasons
        more = f" (the table has {len(others)} more)" if others else ""
        remedy = "" if ";" in why else "; choose another model or setting"
        raise ThresholdBroken(f"nothing was tested, so nothing is shown: {why}{more}{remedy}")


def _some(combinations: tuple[Combination, ...]) -> str:
    first, *others = combinations
    return f"{first.strategy} with {first.setting.label}" + (f" and {len(others)} more" if others else "")


def _interrupted(done: Check, store: Store | None) -> str:
    """The message after an interruption: how much was checked, and where it is stored."""
    if not done.results:
        return "interrupted before anything was checked"
    where = "not stored, as there was no --out" if store is None else f"stored in {store.folder / 'check.md'}"
    return f"interrupted; {len(done.results)} of {len(done.combinations)} combinations were checked, and are {where}"


def run(
    options: CheckOptions,
    *,
    source: ModelSource,
    children: Children,
    command: str,
    on_result: Callable[[int, int], object] = lambda done, total: None,
) -> Check:
    """Test every combination in child processes: where one dies, the next goes on with the remaining combinations.

    An interruption returns the results so far. `on_result` gets the number of results and of combinations.
    """
    machine = _machine(options, children)
    combinations = checks.combinations(
        chosen_strategies=options.strategies,
        precisions=options.precisions,
        optims=options.optims,
        attentions=options.attentions,
        tuned=options.tuned,
        compiled=options.compiled,
        on_cuda=machine.device != "cpu",
    )
    results: dict[int, CheckResult] = {}
    steps_s = 0.0

    def on_event(event: object) -> None:
        nonlocal steps_s
        if isinstance(event, ReferenceRun):
            steps_s += event.steps_s
        elif isinstance(event, CheckResult):
            results[event.number] = event
            steps_s += event.steps_s
            on_result(len(results), len(combinations))

    begin = time.monotonic()
    facts: ModelFacts | None = None
    notices: dict[str, None] = {}
    is_own = False
    on_result(0, len(combinations))
    try:
        while waiting := [(n, combination) for n, combination in enumerate(combinations) if n not in results]:
            answer = children.run(_task(options, source, waiting), on_event=on_event, timeout_s=options.timeout_s)
            raise_refusal(Answer(refusal=answer.refusal))
            facts = answer.facts or facts
            notices |= dict.fromkeys(answer.notices)
            if facts is not None and facts.only_own is not None and options.strategies is None and not is_own:
                is_own = True
                combinations, results = _with_own(options, combinations, results)
                continue
            lost = [n for n, _ in waiting if n not in results]
            if lost:  # the child died at the first of them
                why = answer.failure.message if answer.failure else "the process ended without a message"
                results[lost[0]] = CheckResult(number=lost[0], verdict=FAILED, message=why)
        facts = facts or _facts(options, source, children)
    except KeyboardInterrupt:
        ignore_more()
    wall_s = time.monotonic() - begin
    return Check(
        model=options.model,
        command=command,
        device=_device(machine),
        is_emulated=machine.emulated is not None,
        versions={name: machine.versions[name] for name in _VERSIONS if name in machine.versions},
        scaled=None if options.full_size else "scaled down",
        num_params=facts.num_params if facts else None,
        num_layers=facts.num_layers if facts else None,
        combinations=combinations,
        results=tuple(results[n] for n in sorted(results)),
        steps_s=steps_s,
        wall_s=wall_s,
        notices=tuple(notices),
        model_changes=model_changes.describe(options.layers, options.overrides),
    )


def _device(machine: Machine) -> str:
    if machine.emulated is not None:
        return f"{machine.device_name} (emulated)"
    return machine.device_name if machine.device == "cpu" else f"{machine.device_name} ({machine.device})"


def _with_own(
    options: CheckOptions, combinations: tuple[Combination, ...], results: dict[int, CheckResult]
) -> tuple[tuple[Combination, ...], dict[int, CheckResult]]:
    """Replace unsupported default strategies by the model's own checkpointing; keep the results of the others."""
    settings = list(dict.fromkeys(combination.setting for combination in combinations))
    own = tuple(Combination(setting=setting, strategy=OWN) for setting in settings)
    done = [result for result in results.values() if result.verdict != UNSUPPORTED]
    others = tuple(combinations[result.number] for result in done)
    kept = {len(own) + place: replace(result, number=len(own) + place) for place, result in enumerate(done)}
    return (*own, *others), kept


def _machine(options: CheckOptions, children: Children) -> Machine:
    answer = children.run(
        DescribeTask(device=options.device, operators=operators(options.strategies or ())),
        on_event=lambda event: None,
        timeout_s=_DESCRIBE_TIMEOUT_S,
    )
    raise_refusal(answer)
    assert answer.machine is not None
    return answer.machine


def _facts(options: CheckOptions, source: ModelSource, children: Children) -> ModelFacts:
    """Describe the model in one more child, where every child died before it could."""
    answer = children.run(
        replace(_task(options, source, []), combinations=()), on_event=lambda event: None, timeout_s=options.timeout_s
    )
    raise_refusal(answer)
    assert answer.facts is not None
    return answer.facts


def _task(options: CheckOptions, source: ModelSource, waiting: list[tuple[int, Combination]]) -> CheckTask:
    return CheckTask(
        source=source,
        layers=options.layers,
        overrides=options.overrides or {},
        device=options.device,
        full_size=options.full_size,
        combinations=tuple(waiting),
        batch_size=options.batch_size,
        seq_len=options.seq_len,
        seed=options.seed,
    )
