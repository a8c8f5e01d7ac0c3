"""Memory that a real run may allocate beyond the predicted peak of a decision. No torch."""

from __future__ import annotations

from gcbench.export._handover import SEARCHED
from gcbench.plan.decision import Decision
from gcbench.report.additions import Setting, kernels_sentence, sentence


def of_decision(decision: Decision) -> tuple[str, ...]:
    """What a real run may allocate beyond the choice's predicted peak, or less than it; a sentence each."""
    choice = decision.choice
    if choice is None:
        return ()
    name = "the plan" if choice.strategy == SEARCHED else choice.strategy
    chosen = Setting(name=name, fits=True, additions=decision.additions)
    added = sentence(chosen, (), usable_bytes=decision.usable_bytes)
    kernels = kernels_sentence(decision.fallback, name, choice.allocated_bytes)
    return tuple(text for text in (kernels, added) if text)
