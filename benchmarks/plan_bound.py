"""A lower bound on the time that any plan takes which keeps outputs of operators, for any peak."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from plan_ground import FULL, OFF, Ground

from gcbench.plan.policies.layer_calls import InnerCall
from gcbench.plan.policies.layer_policies import weighed
from gcbench.plan.policies.min_cut import frontier
from gcbench.simulate.costs import Figures


def lower_bound(ground: Ground) -> Callable[[int], float | None]:
    """Peak -> seconds that nothing which keeps outputs of operators can beat, by linear programming.

    Relaxed: any share of a layer may have any choice of outputs, and only the peaks of the head's forward and
    backward pass count. What is within both is within any mean of the two, and with one of them the program is a
    continuous knapsack over the slopes of each kind's lower convex hull.
    """
    calls, larger = ground.calls(), ground.calls(2 * ground.batch)
    bounds = [_bound(ground, calls, larger, share) for share in (0.0, 0.25, 0.5, 0.75, 1.0)]

    def at(peak_bytes: int) -> float | None:
        found = [bound(peak_bytes) for bound in bounds]
        known = [seconds for seconds in found if seconds is not None]
        return max(known) if len(known) == len(found) else None

    return at


def _bound(
    ground: Ground, calls: dict[Any, tuple[InnerCall, ...]], larger: dict[Any, tuple[InnerCall, ...]], share: float
) -> Callable[[int], float | None]:
    """The same of one mean of the two peaks; `share` is the weight of the backward pass's."""
    off = ground.uniform[OFF]
    corners = {}
    for kind, those in calls.items():
        # What does not grow with the batch is a cast weight, which autocast holds anyway until the loss is there.
        sizes = [
            round(share * one.nbytes) if one.nbytes == two.nbytes else one.nbytes
            for one, two in zip(those, larger[kind], strict=True)
        ]
        corners[kind] = _corners(those, sizes, ground.figures)

    def held(place: int, number: int) -> int:
        left = ground.uniform[number].profiles[place].left_bytes
        return round(share * ground.layered.through(place, number) + (1 - share) * left)

    least: float = off.standing_bytes + share * ground.layered.loss + (1 - share) * ground.layered.head
    most, pieces = 0.0, []
    for place, layer in enumerate(ground.layers):
        points = [(held(place, FULL) + kept, seconds) for kept, seconds in corners[ground.fake_model.kinds[layer]]]
        points += [
            (held(place, n), each.profiles[place].seconds - off.profiles[place].seconds)
            for n, each in enumerate(ground.uniform)
        ]
        hull = lower_hull(points)
        least += hull[0][0]
        most += hull[0][1]
        pieces += [((s0 - s1) / (b1 - b0), b1 - b0) for (b0, s0), (b1, s1) in pairwise(hull)]
    pieces.sort(reverse=True)

    def at(peak_bytes: int) -> float | None:
        room, seconds = peak_bytes - least, most
        if room < -1e6:  # a rounding
            return None
        for slope, width in pieces:
            taken = min(max(room, 0.0), width)
            seconds -= slope * taken
            room -= taken
        return max(seconds, 0.0)

    return at


def lower_hull(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """The lower convex hull of (bytes, seconds), as far as more bytes take less time."""
    hull: list[tuple[int, float]] = []
    for x, y in sorted(set(points)):
        if hull and y >= hull[-1][1]:
            continue
        while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (x - hull[-2][0]) >= (y - hull[-2][1]) * (
            hull[-1][0] - hull[-2][0]
        ):
            hull.pop()
        hull.append((x, y))
    return hull


def _corners(calls: Sequence[InnerCall], sizes: Sequence[int], figures: Figures) -> list[tuple[int, float]]:
    """(bytes kept, seconds to run the rest again) of the best choices of outputs in one layer."""
    those = [replace(call, nbytes=size) for call, size in zip(weighed(calls, figures), sizes, strict=True)]
    return [(found.kept_bytes, found.seconds) for found in frontier(those)]
