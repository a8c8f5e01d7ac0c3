"""What `gcbench plan` reports where nothing fits: the smallest peak, and what would make something fit."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from gcbench.core import headroom
from gcbench.core.units import format_bytes
from gcbench.devices import cards
from gcbench.export._handover import SEARCHED
from gcbench.plan.decision import Decision, choose, described

if TYPE_CHECKING:
    from gcbench.plan.planned import PlanResult


def _usable(decision: Decision) -> str:
    if decision.limit_bytes is None:
        return format_bytes(decision.usable_bytes)
    return headroom.held_back(decision.limit_bytes, decision.reserve_frac)


def lines(planned: PlanResult) -> list[tuple[str, str]]:
    """The answer as (name, text) lines."""
    decision = planned.decision
    smallest = decision.smallest
    found = [("answer", f"nothing fits into {_usable(decision)}")]
    if only_the_reserve(decision) is not None:
        found.append(("why", "only the reserve stands in the way"))
    if smallest is not None:
        at = f"{described(smallest)} at batch {smallest.batch_size}"
        found.append(("smallest peak", f"{format_bytes(smallest.peak_bytes)}: {at}"))
    if decision.peak_words:
        found.append(("peak", f"in the {decision.peak_words}"))
    if changes := remedies(planned):
        found.append(("would fit with", "; ".join(changes)))
    if smallest is not None:
        found.append(("or on", _larger_device(decision)))
    return found


def remedies(planned: PlanResult) -> list[str]:
    """Changes that would each make something fit, in words."""
    decision = planned.decision
    reserve = only_the_reserve(decision)
    found = [] if reserve is None else [reserve]
    found += [lever.name for lever in decision.levers if lever.fits]
    if decision.longest_seq_len is not None:
        found.append(f"sequences of {decision.longest_seq_len} tokens")
    return found


def only_the_reserve(decision: Decision) -> str | None:
    """`--reserve 2%, with which per-layer at batch 1 fits`; None where a smaller reserve is not enough."""
    limit, smallest = decision.limit_bytes, decision.smallest
    if limit is None or smallest is None or decision.choice is not None:
        return None
    smaller = headroom.smaller_reserve(smallest.peak_bytes, limit_bytes=limit, reserve_frac=decision.reserve_frac)
    if smaller is None:
        return None
    usable = headroom.usable_bytes(limit, smaller)
    known = [each for each in (*decision.candidates, smallest) if not each.is_lower_bound]
    then = choose([replace(each, fits=each.peak_bytes <= usable) for each in known])
    assert then is not None
    what = "a searched plan" if then.strategy == SEARCHED else then.strategy
    return f"{headroom.reserve_flag(smaller)}, with which {what} at batch {then.batch_size} fits"


def needed_bytes(decision: Decision) -> int | None:
    """The memory of a device on which the smallest peak fits, with the reserve."""
    return None if decision.smallest is None else int(decision.smallest.peak_bytes / (1 - decision.reserve_frac))


def _larger_device(decision: Decision) -> str:
    """The devices on which the smallest peak fits; where no card is large enough, how many would have to share it."""
    needed, limit = needed_bytes(decision), decision.limit_bytes
    devices = cards.among(needed, limit) if needed is not None and limit else None
    if devices is None:
        return f"a device of {format_bytes(needed)}"
    return (
        f"{devices} or more such devices that share the model (no card has {format_bytes(needed)}; FSDP or ZeRO-3 in "
        "the trainer divide it, and gcbench plans for one device)"
    )


def nothing_fits(planned: PlanResult) -> str:
    """The error message where nothing fits."""
    decision = planned.decision
    text = f"nothing fits into {_usable(decision)}"
    if decision.smallest is not None:
        text += f", the smallest peak is {format_bytes(decision.smallest.peak_bytes)}"
    if only_the_reserve(decision) is not None:
        text += ", so that only the reserve stands in the way"
    changes = [*remedies(planned)[:2], _larger_device(decision)]
    return f"{text}; take {', or '.join(changes)}"
