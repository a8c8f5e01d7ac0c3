"""Chooses layers of a model that represent the others, so that few need to be traced. No torch.

A layer's events depend on its kind, its policy, and the policies of the layers beside it (a layer's input is held by
one or the other). Layers that agree in all three are interchangeable.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

RADIUS = 1
"""How many neighbours on each side a layer's events depend on."""

_EDGE = object()
"""What lies beyond the first and the last layer."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A few layers that represent all.

    Attributes:
        representatives: numbers of the layers to trace, ascending; the first and the last are among them.
        represented_by: for each layer, the number of the representative that behaves as it does.
    """

    representatives: tuple[int, ...]
    represented_by: tuple[int, ...]


def sample(labels: Sequence[Hashable], *, beside: Sequence[Hashable] | None = None, radius: int = RADIUS) -> Sample:
    """Choose layers that, run one after the other, show every neighbourhood that `labels` has.

    `labels` has for each layer all that its own events depend on, `beside` what its neighbours' events depend on (by
    default the same). Ranges whose beginning and end have the same neighbourhood, and which contain none that does not
    occur elsewhere, are cut out.
    """
    places = list(range(len(labels)))
    views = _views(labels, labels if beside is None else beside, radius)
    start = 0
    while start < len(places):
        end = _last_return(views, places, start)
        if end is None:
            start += 1
        else:
            del places[start:end]
            start = 0
    by_view = {views[place]: place for place in reversed(places)}
    return Sample(representatives=tuple(places), represented_by=tuple(by_view[view] for view in views))


def _views(labels: Sequence[Hashable], beside: Sequence[Hashable], radius: int) -> list[int]:
    """For each layer, the number of its neighbourhood: equal numbers for equal neighbourhoods."""
    padded = [*[_EDGE] * radius, *beside, *[_EDGE] * radius]
    numbers: dict[tuple[Hashable, ...], int] = {}
    return [
        numbers.setdefault((label, *padded[place : place + 2 * radius + 1]), len(numbers))
        for place, label in enumerate(labels)
    ]


def _last_return(views: Sequence[int], places: Sequence[int], start: int) -> int | None:
    """The furthest place with the neighbourhood of `start` such that all between can be cut out; None without one."""
    for end in range(len(places) - 1, start, -1):
        if views[places[end]] == views[places[start]]:
            cut = {views[place] for place in places[start:end]}
            rest = {views[place] for place in (*places[:start], *places[end:])}
            if cut <= rest:
                return end
    return None
