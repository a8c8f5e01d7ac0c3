"""Which layers of a model stand for which others, so that few need to be traced. No torch.

A layer's events depend on what it is, how it is treated, and how the layers beside it are treated (a boundary tensor is
held by one or the other). Layers that agree in all three are interchangeable.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

RADIUS = 1
"""How many neighbours on each side a layer's events depend on."""

_EDGE = object()
"""Beyond the first and the last layer."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A few layers that stand for all.

    Attributes:
        kept: numbers of the layers to trace, ascending; the first and the last are among them.
        stand_in: for each layer, the number of the kept layer that behaves as it does.
    """

    kept: tuple[int, ...]
    stand_in: tuple[int, ...]


def sample(labels: Sequence[Hashable], *, beside: Sequence[Hashable] | None = None, radius: int = RADIUS) -> Sample:
    """The layers to keep so that, run one after the other, they show every neighbourhood that `labels` has.

    `labels` tells of each layer all that it depends on by itself, `beside` what of it its neighbours depend on (the
    same if not given). Stretches whose beginning and end look alike, and in which nothing happens that does not happen
    elsewhere, are cut out.
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
    return Sample(kept=tuple(places), stand_in=tuple(by_view[view] for view in views))


def _views(labels: Sequence[Hashable], beside: Sequence[Hashable], radius: int) -> list[int]:
    """For each layer, the number of its neighbourhood: equal numbers for equal neighbourhoods."""
    padded = [*[_EDGE] * radius, *beside, *[_EDGE] * radius]
    numbers: dict[tuple[Hashable, ...], int] = {}
    return [
        numbers.setdefault((label, *padded[place : place + 2 * radius + 1]), len(numbers))
        for place, label in enumerate(labels)
    ]


def _last_return(views: Sequence[int], places: Sequence[int], start: int) -> int | None:
    """The furthest place that looks like `start`, such that all between them can go; None when there is none."""
    for end in range(len(places) - 1, start, -1):
        if views[places[end]] == views[places[start]]:
            cut = {views[place] for place in places[start:end]}
            rest = {views[place] for place in (*places[:start], *places[end:])}
            if cut <= rest:
                return end
    return None
