"""`gcbench plan --emulate`: runs the choice on an emulated card before it is shown; the next one where it does not fit.

Only memory is confirmed: the times of an emulated card do not exist, so they stay estimates.
"""

from __future__ import annotations

from dataclasses import replace

from gcbench.core import model_changes
from gcbench.core.errors import UsageError
from gcbench.core.memory_peaks import MemoryPeaks
from gcbench.core.records import Cell, Failure, Workload
from gcbench.core.units import format_bytes
from gcbench.devices.cards import Card
from gcbench.devices.target import Target
from gcbench.emulate.properties import capability_of
from gcbench.job.resolve import described, target_notice
from gcbench.job.settings import EMULATED_DEVICE
from gcbench.measure.progress import WARMING_UP, Progress
from gcbench.measure.task import MeasureTask
from gcbench.plan.confirm import with_details_of
from gcbench.plan.decision import Candidate, Decision, choose, ranked, why_not_faster
from gcbench.plan.decision import described as in_words
from gcbench.plan.planned import PlanResult
from gcbench.processes.children import Children
from gcbench.processes.messages import Answer, raise_refusal

_EXPANDABLE = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}


def card_of(target: Target | None) -> Card:
    """Return the card to emulate for a target; raises UsageError where it names none, UnavailableError where it cannot
    be emulated."""
    if target is None or target.card is None:
        raise UsageError("--emulate needs a card by its name (gcbench devices); add --device, like --device h100")
    capability_of(target.card)
    return replace(target.card, memory_bytes=target.memory_bytes or target.card.memory_bytes)


def variables(target: Target | None) -> dict[str, str]:
    """Return the environment variables that make PyTorch's allocator work as the target's is predicted to."""
    return dict(_EXPANDABLE) if target is not None and target.expandable_segments else {}


def confirm(planned: PlanResult, *, children: Children, progress: Progress) -> PlanResult:
    """Run the choice on the emulated card, and while one does not fit there, the best one with a lower peak.

    A candidate that ends for another reason than memory stays the choice, with a notice.
    """
    decision = planned.decision
    notices: list[str] = []
    with_card: dict[Candidate, Candidate] = {}
    choice = decision.choice
    progress.begin(num_rounds=1)
    while choice is not None:
        checked, notice = _checked(choice, planned, children, progress)
        with_card[choice] = checked
        notices += [notice] if notice else []
        if checked.fits:
            break
        lower = [each for each in decision.candidates if each.fits and each.peak_bytes < choice.peak_bytes]
        choice = choose([each for each in lower if each not in with_card])
    return replace(planned, decision=_settled(planned, with_card, notices)) if with_card else planned


def _checked(
    candidate: Candidate, planned: PlanResult, children: Children, progress: Progress
) -> tuple[Candidate, str | None]:
    """Run one candidate: itself with what it took, and a sentence where it did not end as predicted."""
    task = _task(candidate, planned)
    progress.enter(task.cell, doing=WARMING_UP)
    answer = children.run(task, on_event=progress.step, timeout_s=planned.settings.timeout)
    raise_refusal(Answer(refusal=answer.refusal))
    name = f"{in_words(candidate)} at batch {candidate.batch_size}"
    if answer.result is not None and answer.result.memory is not None:
        nbytes = _needed_bytes(answer.result.memory, planned.decision)
        usable = planned.decision.usable_bytes
        if usable is None or nbytes <= usable:
            return replace(candidate, emulated_bytes=nbytes), None
        return (
            replace(candidate, emulated_bytes=nbytes, peak_bytes=nbytes, fits=False),
            f"Emulated, {name} takes {format_bytes(nbytes)}, where {candidate.peak_text} were predicted.",
        )
    failure = answer.failure or Failure(kind="crash", message="its process ended without an answer")
    reason = failure.message.partition("; ")[0]
    if failure.kind != "oom":
        return candidate, f"Not confirmed: {name} could not be emulated ({reason}); its memory is as predicted."
    least = max(candidate.peak_bytes, planned.decision.limit_bytes or 0)
    return (
        replace(candidate, peak_bytes=least, is_lower_bound=True, fits=False),
        f"Emulated, {name} does not fit ({reason}), where {candidate.peak_text} were predicted.",
    )


def _task(candidate: Candidate, planned: PlanResult) -> MeasureTask:
    settings, limit = planned.settings, planned.target.memory_bytes
    workload = Workload(
        model=settings.model,
        device=EMULATED_DEVICE,
        batch_size=candidate.batch_size,
        seq_len=planned.seq_len,
        precision=settings.precision,
        optim=settings.optim,
        attn_implementation=planned.facts.attn_implementation,
        lora_r=settings.lora_r,
        model_changes=model_changes.describe(settings.layers, settings.set),
    )
    return MeasureTask(
        cell=Cell(workload=workload, strategy=candidate.strategy),
        round=0,
        source=planned.source_or_raise,
        layers=settings.layers,
        overrides=settings.set or {},
        attn_implementation=settings.attn_implementation,
        plan=candidate.plan,
        seed=settings.seed,
        warmup=1,
        steps=0,
        least_timed_s=0.0,
        with_memory=True,
        turn=0,
        # As predicted: what the process holds outside the allocator is not the allocator's to give.
        memory_limit_bytes=None if limit is None else limit - planned.decision.outside_bytes,
        lora=settings.lora,
    )


def _needed_bytes(memory: MemoryPeaks, decision: Decision) -> int:
    """Bytes of the process: what the allocator reserved, and the predicted rest outside it."""
    return (memory.reserved_bytes or 0) + decision.outside_bytes


def _settled(planned: PlanResult, with_card: dict[Candidate, Candidate], notices: list[str]) -> Decision:
    """The decision with what the card showed: the last one that ran is the choice, if it fits."""
    decision = planned.decision
    last, checked = list(with_card.items())[-1]
    candidates = tuple(with_card.get(each, each) for each in decision.candidates)
    is_confirmed = checked.emulated_bytes is not None
    obsolete = (target_notice(planned.target, described(planned.machine, planned.target)),)
    told = [*(each for each in decision.notices if each not in obsolete), *notices]
    if is_confirmed:
        told.insert(0, f"{obsolete[0].partition(';')[0]}; the choice was run on an emulated card, its memory alone.")
    else:
        told.insert(0, obsolete[0])
    if not checked.fits:
        smallest = min(with_card.values(), key=lambda each: each.peak_bytes)
        return replace(
            decision, choice=None, smallest=smallest, candidates=ranked(candidates), binding=None, notices=tuple(told)
        )
    if last != decision.choice:
        decision = replace(with_details_of(decision, last), binding=why_not_faster(candidates, checked))
    return replace(decision, choice=checked, candidates=ranked(candidates), notices=tuple(told))
