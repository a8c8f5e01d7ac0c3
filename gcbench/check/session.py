"""One check from settings to what is printed: combinations tried by children, verdicts shown."""

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
from gcbench.check.cases import FAILED, UNSUPPORTED, Check, Checked, Combination
from gcbench.check.task import CheckTask, ReferenceRun
from gcbench.core import model_changes, streams
from gcbench.core.errors import Interrupted, ThresholdBroken
from gcbench.core.files import write_text
from gcbench.core.interruption import ignore_more
from gcbench.core.json_codec import encode
from gcbench.core.records import Json, Machine, ModelFacts
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
    """What to check; None for what is tried by default."""

    model: str
    strategies: tuple[str, ...] | None = None
    precisions: tuple[str, ...] | None = None
    optims: tuple[str, ...] | None = None
    attentions: tuple[str, ...] | None = None
    tuned: tuple[str, ...] | None = None
    compiled: bool = True
    device: str = "auto"
    batch_size: int = 2
    seq_len: int | None = None
    layers: int | None = None
    overrides: dict[str, Json] | None = None
    full_size: bool = False
    trust_remote_code: bool = False
    seed: int = 0
    timeout_s: float | None = 3600.0


def check(wanted: CheckOptions, *, out: Path | None, command: str, as_json: bool, quiet: bool) -> None:
    """Check, show it, and keep it in `out` if given; raises what `raise_for` does."""
    source = preflight.examine(
        sources.resolve(wanted.model, trust_remote_code=wanted.trust_remote_code, overrides=wanted.overrides),
        preflight.Wanted(
            overrides=wanted.overrides or {},
            layers=wanted.layers,
            seq_lens=() if wanted.seq_len is None else (wanted.seq_len,),
            strategies=wanted.strategies or (),
            precision=wanted.precisions[0] if wanted.precisions and len(wanted.precisions) == 1 else None,
        ),
    )
    err = Console(stderr=True)
    with ExitStack() as stack:
        store = stack.enter_context(Store.create(out)) if out is not None else None
        try:
            with (
                ForkedChildren() as children,
                progress.choose(err, verb="checking", noun="combinations", quiet=quiet) as counter,
            ):
                done = run(wanted, source=source, children=children, command=command, on_result=counter.count)
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
            raise Interrupted(_kept(done, store))
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
    """Raise ThresholdBroken when a combination that counts is wrong, or when not all that ran was shown to be right."""
    if check.failures:
        raise ThresholdBroken(f"{_some(check.failures)} did not train as off does; the table says why")
    if check.open_questions:
        raise ThresholdBroken(
            f"{NOTHING_SHOWN} about {_some(check.open_questions)}; the table says how far it is from itself"
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


def _kept(done: Check, store: Store | None) -> str:
    """After an interruption: what there is."""
    if not done.results:
        return "interrupted before anything was checked"
    where = "kept nowhere, as there was no --out" if store is None else f"kept in {store.folder / 'check.md'}"
    return f"interrupted; {len(done.results)} of {len(done.combinations)} combinations were checked, and are {where}"


def run(
    wanted: CheckOptions,
    *,
    source: ModelSource,
    children: Children,
    command: str,
    on_result: Callable[[int, int], object] = lambda done, total: None,
) -> Check:
    """Try every combination in children, each of which goes on until something ends it.

    An interruption ends it with the results so far. `on_result` gets how many there are, of how many.
    """
    machine = _machine(wanted, children)
    asked = checks.combinations(
        chosen_strategies=wanted.strategies,
        precisions=wanted.precisions,
        optims=wanted.optims,
        attentions=wanted.attentions,
        tuned=wanted.tuned,
        compiled=wanted.compiled,
        on_cuda=machine.device != "cpu",
    )
    results: dict[int, Checked] = {}
    steps_s = 0.0

    def on_event(event: object) -> None:
        nonlocal steps_s
        if isinstance(event, ReferenceRun):
            steps_s += event.steps_s
        elif isinstance(event, Checked):
            results[event.number] = event
            steps_s += event.steps_s
            on_result(len(results), len(asked))

    begin = time.monotonic()
    facts: ModelFacts | None = None
    notices: dict[str, None] = {}
    is_own = False
    on_result(0, len(asked))
    try:
        while waiting := [(n, combination) for n, combination in enumerate(asked) if n not in results]:
            answer = children.run(_task(wanted, source, waiting), on_event=on_event, timeout_s=wanted.timeout_s)
            raise_refusal(Answer(refusal=answer.refusal))
            facts = answer.facts or facts
            notices |= dict.fromkeys(answer.notices)
            if facts is not None and facts.only_own is not None and wanted.strategies is None and not is_own:
                is_own = True
                asked, results = _with_own(wanted, asked, results)
                continue
            lost = [n for n, _ in waiting if n not in results]
            if lost:  # the child ended at the first of them
                why = answer.failure.message if answer.failure else "the process ended without a word"
                results[lost[0]] = Checked(number=lost[0], verdict=FAILED, message=why)
        facts = facts or _facts(wanted, source, children)
    except KeyboardInterrupt:
        ignore_more()
    wall_s = time.monotonic() - begin
    return Check(
        model=wanted.model,
        command=command,
        device=machine.device_name if machine.device == "cpu" else f"{machine.device_name} ({machine.device})",
        versions={name: machine.versions[name] for name in _VERSIONS if name in machine.versions},
        scaled=None if wanted.full_size else "scaled down",
        num_params=facts.num_params if facts else None,
        num_layers=facts.num_layers if facts else None,
        combinations=asked,
        results=tuple(results[n] for n in sorted(results)),
        steps_s=steps_s,
        wall_s=wall_s,
        notices=tuple(notices),
        model_changes=model_changes.describe(wanted.layers, wanted.overrides),
    )


def _with_own(
    wanted: CheckOptions, asked: tuple[Combination, ...], results: dict[int, Checked]
) -> tuple[tuple[Combination, ...], dict[int, Checked]]:
    """The model's own way in place of the default strategies that it cannot have, and the results of the others."""
    settings = list(dict.fromkeys(combination.setting for combination in asked))
    own = tuple(Combination(setting=setting, strategy=OWN) for setting in settings)
    done = [result for result in results.values() if result.verdict != UNSUPPORTED]
    others = tuple(asked[result.number] for result in done)
    kept = {len(own) + place: replace(result, number=len(own) + place) for place, result in enumerate(done)}
    return (*own, *others), kept


def _machine(wanted: CheckOptions, children: Children) -> Machine:
    answer = children.run(
        DescribeTask(device=wanted.device, operators=operators(wanted.strategies or ())),
        on_event=lambda event: None,
        timeout_s=_DESCRIBE_TIMEOUT_S,
    )
    raise_refusal(answer)
    assert answer.machine is not None
    return answer.machine


def _facts(wanted: CheckOptions, source: ModelSource, children: Children) -> ModelFacts:
    """Of the model, where every child ended before it could say."""
    answer = children.run(
        replace(_task(wanted, source, []), combinations=()), on_event=lambda event: None, timeout_s=wanted.timeout_s
    )
    raise_refusal(answer)
    assert answer.facts is not None
    return answer.facts


def _task(wanted: CheckOptions, source: ModelSource, waiting: list[tuple[int, Combination]]) -> CheckTask:
    return CheckTask(
        source=source,
        layers=wanted.layers,
        overrides=wanted.overrides or {},
        device=wanted.device,
        full_size=wanted.full_size,
        combinations=tuple(waiting),
        batch_size=wanted.batch_size,
        seq_len=wanted.seq_len,
        seed=wanted.seed,
    )
