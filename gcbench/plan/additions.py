"""What a real run may have that a decision's peak has not. No torch."""

from __future__ import annotations

from gcbench.plan.decision import FOUND, Decision
from gcbench.report.additions import Setting, kernels_sentence, sentence


def of_decision(decision: Decision) -> tuple[str, ...]:
    """What a real run may have that the choice's peak has not, and the other way round; a sentence each."""
    choice = decision.choice
    if choice is None:
        return ()
    name = "the plan" if choice.strategy == FOUND else choice.strategy
    chosen = Setting(name=name, fits=True, additions=decision.additions)
    added = sentence(chosen, (), usable_bytes=decision.usable_bytes)
    kernels = kernels_sentence(decision.fallback, name, choice.allocated_bytes)
    return tuple(text for text in (kernels, added) if text)
