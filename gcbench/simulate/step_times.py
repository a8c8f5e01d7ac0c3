"""Estimates how long a step takes on a device that computes while Python launches, from its operators. No torch.

Python launches kernels ahead of the card, in order. A section ends on the card when its kernels, after those of the
section before, have run, and not before Python has launched the last of them. With few or small kernels a step takes
as long as Python, otherwise as long as the card, and each part of a step decides for itself.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from gcbench.simulate.costs import Figures, Times, Work, times

_FORWARD = ("model", "checkpoint", "policy")


@dataclass(frozen=True, kw_only=True, slots=True)
class StepSeconds:
    """The estimated time of a step.

    Attributes:
        device_s: of it, seconds in which the device computes.
    """

    seconds: float
    device_s: float

    @property
    def waiting_frac(self) -> float:
        """The share of the step in which the device waits for Python, from 0 to 1."""
        return max(1.0 - self.device_s / self.seconds, 0.0) if self.seconds else 0.0


def step_seconds(
    sections: Iterable[tuple[tuple[str, int] | None, tuple[Work, ...]]],
    update: Iterable[tuple[Work, float]],
    figures: Figures,
) -> StepSeconds:
    """Estimate the time of a step.

    Args:
        sections: ((part, layer), works) in order; a single entry without a name for a step that was traced in full.
        update: the works of the optimizer phase, where it is not among the sections, and how often each is done.
    """
    device_s = host_s = finished_s = 0.0
    for section in (*_sections(sections, figures), _update(update, figures)):
        device_s += section.device_s
        host_s += section.host_s
        finished_s = max(finished_s + section.device_s, host_s)
    return StepSeconds(seconds=figures.step_s + finished_s, device_s=figures.step_s + device_s)


def _sections(sections: Iterable[tuple[tuple[str, int] | None, tuple[Work, ...]]], figures: Figures) -> Iterator[Times]:
    """Yield the times of each section; equal ones, as those of equal layers, are added up once."""
    known: dict[Hashable, Times] = {}
    decided: dict[int, bool] = {}
    with_policy: set[int] = set()
    for name, works in sections:
        if name is None:
            yield from (_times(part, figures, decided=_has_policy(works)) for part in _parts(works))
            continue
        if id(works) not in decided:
            decided[id(works)] = _has_policy(works)
        if decided[id(works)]:
            with_policy.add(name[1])
        key = (id(works), name[1] in with_policy)
        if key not in known:
            known[key] = _times(works, figures, decided=name[1] in with_policy)
        yield known[key]


def _has_policy(works: Sequence[Work]) -> bool:
    return any(work.caller == "policy" for work in works)


def _times(works: Sequence[Work], figures: Figures, *, decided: bool) -> Times:
    """The times of calls; where a policy `decided` what their layer saves, it decides in their recomputation too."""
    if not decided:
        return times(works, figures)
    return times((replace(work, caller="policy") if work.caller == "recompute" else work for work in works), figures)


def _parts(works: Sequence[Work]) -> Iterator[tuple[Work, ...]]:
    """Yield the forward pass, the backward pass, and the optimizer phase of a step that was traced in full."""

    def part(work: Work) -> str:
        return "forward" if work.caller in _FORWARD else work.caller if work.caller == "optimizer" else "backward"

    return (tuple(group) for _, group in groupby(works, part))


def _update(update: Iterable[tuple[Work, float]], figures: Figures) -> Times:
    device_s = host_s = 0.0
    for work, count in update:
        device_s += count * figures.seconds(work)
        host_s += count * figures.host_s(work)
    return Times(device_s=device_s, host_s=host_s)
