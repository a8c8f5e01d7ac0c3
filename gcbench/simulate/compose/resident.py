"""Memory that stays resident: a model's tensors, the batch and libraries' workspaces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gcbench.core.records import Phase
from gcbench.simulate.compose.block_kinds import Kind
from gcbench.simulate.compose.passes import Passes
from gcbench.simulate.events import Trace


@dataclass(frozen=True, kw_only=True)
class ResidentMemory:
    """One block that is never freed: allocated before the first step or, as a workspace, within it."""

    name: str
    nbytes: int
    kind: Kind
    requested_at: Phase | None = None
    """The phase of the first step that requests it; None if it is allocated before that step."""
    requested_by: tuple[str, ...] = ()
    """Operators, the first of which requests it, after allocating its own result."""


def request_positions(resident: Sequence[ResidentMemory], passes: Passes) -> tuple[int | None, ...]:
    """For each resident block, the number of the passes' events before its allocation; None if it is never requested.

    Blocks allocated before the first step have 0.
    """
    known: dict[tuple[Phase | None, tuple[str, ...]], int | None] = {}
    for term in resident:
        key = (term.requested_at, term.requested_by)
        if key not in known:
            backward = term.requested_at not in (None, "forward")
            begins = passes.backward_at if backward else 0
            known[key] = passes.first(term.requested_by, backward=backward) if term.requested_by else begins
    return tuple(known[term.requested_at, term.requested_by] for term in resident)


def positions_in_trace(resident: Sequence[ResidentMemory], trace: Trace) -> tuple[int | None, ...]:
    """The same in a step traced in full: numbers of the trace's events before each allocation."""
    found: list[int | None] = []
    for term in resident:
        backward = term.requested_at not in (None, "forward")
        begins = (trace.backward_at if backward else trace.forward_at) if term.requested_at else 0
        found.append(trace.first(term.requested_by, backward=backward) if term.requested_by else begins or 0)
    return tuple(found)
