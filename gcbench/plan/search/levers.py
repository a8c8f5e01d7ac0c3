"""Changes other than checkpointing that would reduce the peak; each is replayed or traced, none is estimated."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from gcbench.core.records import Lora
from gcbench.plan.decision import Candidate, MemoryLever
from gcbench.plan.search.two_cores import Ahead
from gcbench.plan.task import PlanTask
from gcbench.predict.worker import CHUNKS, Session
from gcbench.simulate.compose.block_kinds import Ints, Kind
from gcbench.simulate.compose.whole_step import Assembly
from gcbench.simulate.explain import without_logits
from gcbench.simulate.predictor import Step
from gcbench.simulate.timeline import Timeline

_WORTH_NAMING = 0.005
"""As a fraction of the peak; smaller reductions are left out."""
_LORA_R = 16
_FUSED = "adamw_torch_fused"
_BLOCK = 256
"""Elements of an 8-bit optimizer's state that share one fp32 scale (bitsandbytes 0.50.2, `init_state` in
bitsandbytes/optim/optimizer.py)."""
_LEAST_QUANTISED = 4096
"""Elements; smaller states stay in fp32 (same source)."""


class Trial:
    """The changes of one candidate that need traces of their own; a forked process begins half of them at once.

    A context manager, which ends that process.
    """

    def __init__(self, task: PlanTask, candidate: Candidate) -> None:
        self.of = (candidate.plan, candidate.batch_size)
        self._changes = _changes(task, candidate)
        self._ahead: Ahead[Change, int | None] = Ahead(self._try, self._changes[0::2])

    def __enter__(self) -> Trial:
        return self

    def __exit__(self, *exc: object) -> None:
        self._ahead.__exit__(*exc)

    def _try(self, change: Change) -> int | None:
        return _traced(change[2], change[3])

    def peaks(self) -> list[tuple[str, str | None, int]]:
        """(name, flag, peak in bytes) of each change that can be traced."""
        other = [self._try(change) for change in self._changes[1::2]]
        ahead = self._ahead.results()
        if ahead is None:
            ahead = [self._try(change) for change in self._changes[0::2]]
        found = [ahead[place // 2] if place % 2 == 0 else other[place // 2] for place in range(len(self._changes))]
        return [
            (name, flag, peak)
            for (name, flag, _, _), peak in zip(self._changes, found, strict=True)
            if peak is not None
        ]


def levers(
    task: PlanTask, session: Session, candidate: Candidate, step: Step, trial: Trial, *, usable: int | None
) -> tuple[MemoryLever, ...]:
    """The changes that reduce the candidate's peak by more than `_WORTH_NAMING`, lowest peak first."""
    tried: list[tuple[str, str | None, int]] = []

    def note(name: str, flag: str | None, line: Timeline, by: Session = session) -> None:
        tried.append((name, flag, by.weighed(line)[0]))

    assembly = step.assembly
    sizes = without_logits(assembly, CHUNKS)
    note(f"a loss computed in {CHUNKS} chunks", None, replace(assembly.timeline, nbytes=sizes))
    if task.optim.startswith("adamw") and (eight_bit := _eight_bit(task, session, candidate, step)) is not None:
        note("an 8-bit AdamW", None, eight_bit)
    if task.target.kind == "cuda" and not task.target.expandable_segments:
        flexible = replace(task.target, expandable_segments=True)
        other = Session.on(session, flexible)
        note("expandable segments", "--expandable-segments", assembly.timeline, other)
    if task.optim == "adamw_torch":
        fused = session.predictor.with_optimizer(step, _FUSED, steps_on_device=True)
        if fused is not None:
            note("the fused optimizer", f"--optim {_FUSED}", fused)
    tried += trial.peaks()
    worth = [entry for entry in tried if candidate.peak_bytes - entry[2] > _WORTH_NAMING * candidate.peak_bytes]
    return tuple(
        MemoryLever(name=name, flag=flag, peak_bytes=peak, fits=usable is None or peak <= usable)
        for name, flag, peak in sorted(worth, key=lambda entry: entry[2])
    )


Change = tuple[str, str | None, PlanTask, Candidate]


def _changes(task: PlanTask, candidate: Candidate) -> list[Change]:
    """Changes of the workload, those that take longest to trace first, and of the policies of the same layers."""
    changes: list[Change] = []
    # A policy names calls of operators, which a changed model does not have: then its layers are recomputed fully.
    plan = candidate.plan
    whole = candidate if not plan.policies else replace(candidate, plan=replace(plan, policies=()))
    besides = "" if whole is candidate else ", the same layers fully recomputed"

    def change(name: str, flag: str, other: PlanTask) -> None:
        changes.append((name + besides, flag, other, whole))

    if task.lora is None:
        adapters = replace(task, lora=Lora(r=_LORA_R))
        change(f"LoRA adapters of rank {_LORA_R} instead of full fine-tuning", f"--lora-r {_LORA_R}", adapters)
    if task.attn_implementation == "eager":
        change("fused attention", "--attn-implementation sdpa", replace(task, attn_implementation="sdpa"))
    if task.precision == "fp32":
        change("mixed precision", "--precision bf16-mixed", replace(task, precision="bf16-mixed"))
    if task.precision in ("fp32", "bf16-mixed", "fp16-mixed"):
        change("weights in bf16", "--precision bf16", replace(task, precision="bf16"))
    if task.target.kind == "cuda" and plan.groups and whole is candidate and not (plan.compiled or plan.own):
        offloaded = replace(candidate, plan=plan.with_policies(offload=True))
        changes.append(
            ("layer inputs offloaded to host memory", f"--strategies {candidate.strategy}+offload", task, offloaded)
        )
    return changes


def _traced(task: PlanTask, candidate: Candidate) -> int | None:
    """The peak of another workload in bytes; None where its step cannot be traced."""
    try:
        session = Session(task.as_predictions())
        plan, batch = candidate.plan, candidate.batch_size
        return session.weighed(session.predictor.step(plan, batch_size=batch, seq_len=task.seq_len).timeline)[0]
    except Exception:  # a model's own code may raise anything; the change is then left out
        return None


def _eight_bit(task: PlanTask, session: Session, candidate: Candidate, step: Step) -> Timeline | None:
    """The step with AdamW's two states in 8 bits, whichever AdamW it was traced with; None where it cannot be traced.

    An 8-bit optimizer steps a parameter in one kernel, in place, and makes no lists of temporaries as `adamw_torch`
    does: it is the step of the fused optimizer, with smaller states.
    """

    def quantised(nbytes: Ints) -> Ints:
        return _quantised(nbytes, width=2 if task.precision == "bf16" else 4)

    line = session.predictor.with_optimizer(step, _FUSED, steps_on_device=True, state_bytes=quantised)
    if line is not None:
        return line
    assembly = step.assembly if task.optim == _FUSED else _traced_fused(task, candidate)
    if assembly is None:
        return None
    sizes = assembly.timeline.nbytes
    return replace(assembly.timeline, nbytes=np.where(assembly.kinds == Kind.OPTIMIZER, quantised(sizes), sizes))


def _traced_fused(task: PlanTask, candidate: Candidate) -> Assembly | None:
    """The step with the fused optimizer, for models traced in full; None where it cannot be traced."""
    try:
        predictor = Session(replace(task, optim=_FUSED).as_predictions()).predictor
        return predictor.step(candidate.plan, batch_size=candidate.batch_size, seq_len=task.seq_len).assembly
    except Exception:  # as in `_traced`
        return None


def _quantised(nbytes: Ints, *, width: int) -> Ints:
    """Bytes of states in 8 bits: one byte per element and one scale per block; small states keep their size.

    `width` is the size of an element now, in bytes.
    """
    small = nbytes // width + 4 * -(-nbytes // (width * _BLOCK))
    return np.where(nbytes >= width * _LEAST_QUANTISED, small, nbytes)
