"""The search behind `problem.solve`: a dynamic program from the last layer to the first, pruned by bounds.

A label is a choice for the layers from i on: `reach` is their peak above what the layers before i save, `time` their
time. Prepending an option of layer i - 1 gives reach = max(its own need, its saved bytes + reach) and time = its time +
time. A label is dominated, and dropped, when another has no higher reach and no longer time: both rules are monotone,
so the same holds after every option prepended. With all layers included the reach is the peak, so of equal times the
lowest peak is left.

The time of the layers before i is bounded from below by a relaxation (P. Sinha and A. A. Zoltners, The multiple-choice
knapsack problem, Operations Research 27, 1979, 503-515; H. Kellerer, U. Pferschy and D. Pisinger, Knapsack Problems,
Springer 2004, chapter 11). The search first runs with few labels per layer, which finds a good incumbent, and then with
more, pruned by that incumbent, until nothing that could beat it was left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import numpy as np
import numpy.typing as npt

Whole = npt.NDArray[np.int64]
Real = npt.NDArray[np.float64]
Scalar = TypeVar("Scalar", bound=np.generic)

_EXACT = 2**52
"""Integers up to twice this are exact in float64 too."""
_WIDTHS = (64, 512, 4096, 32768)
"""Labels per layer, pass by pass."""
_MOST_TRIED = 3_000_000
"""After a pass that tried more labels than this (half a second or so) no wider one follows."""
_PRICES, _FINER, _ROUNDS = 64, 8, 4
"""Initial prices of a byte, those added around the best one, and how often."""
_STEEPEST = 100
"""At the highest price, all available bytes cost this many times the total time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """The options of one layer: `needs` is the peak of its own passes if the layers before it saved nothing."""

    seconds: tuple[float, ...]
    kept_bytes: tuple[int, ...]
    needs_bytes: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Assignment:
    """An option for each layer: its time in the search's unit, its peak, and how much faster a better one could be."""

    choice: tuple[int, ...]
    time: int
    reach_bytes: int
    unproven_seconds: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class _Arrays:
    """A layer's options as integers: times in the search's unit, the rest in bytes."""

    times: Whole
    kept: Whole
    needs: Whole


@dataclass(frozen=True, kw_only=True, slots=True)
class _Bound:
    """A lower bound on the time of the layers before one, by the bytes available for what they save together.

    Attributes:
        least: fewest bytes that they can save.
        prices, values: the time is at least values[k] - prices[k] * room for each k; prices rise.
        turns: available bytes, rising, from which the next lower price gives the highest bound.
    """

    least: int
    prices: Real
    values: Real
    turns: Real

    def at(self, room: Whole) -> Real:
        best = len(self.prices) - 1 - np.searchsorted(self.turns, room)
        return self.values[best] - self.prices[best] * room


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pass:
    """The result of one pass: the best assignment, the lowest bound of those left out, and the labels tried."""

    best: Assignment
    left_out: float
    tried: int


class Search:
    """Finds the fastest assignment within a budget.

    `after_bytes` is the peak after the last layer's forward pass if no layer saved anything. Raises ValueError when a
    layer has no options.
    """

    def __init__(self, layers: Sequence[Layer], *, after_bytes: int) -> None:
        self.after = after_bytes
        slowest = sum(max(map(abs, layer.seconds)) for layer in layers)
        # Times are integers in the smallest decimal unit in which no sum exceeds _EXACT (down to 1 fs): sums do not
        # depend on their order, and 0.1 + 0.2 is 0.3.
        self.units_per_s = 10 ** max(digits for digits in range(16) if digits == 0 or slowest * 10**digits <= _EXACT)
        self.layers = [
            _Arrays(
                times=np.array([round(seconds * self.units_per_s) for seconds in layer.seconds], dtype=np.int64),
                kept=np.array(layer.kept_bytes, dtype=np.int64),
                needs=np.array(layer.needs_bytes, dtype=np.int64),
            )
            for layer in layers
        ]
        self.slowest = sum(int(np.abs(layer.times).max()) for layer in self.layers)
        kinds = {(layer.seconds, layer.kept_bytes): arrays for layer, arrays in zip(layers, self.layers, strict=True)}
        self.slopes = np.unique([slope for arrays in kinds.values() for slope in _slopes(arrays.times, arrays.kept)])

    def fastest(self, budget: int, *, start: Assignment | None = None) -> Assignment | None:
        """The fastest assignment with a peak within the budget, of equally fast ones the lowest; None when none is.

        `start` is a known assignment within the budget.
        """
        bounds = self._bounds(budget)
        if bounds is None:
            return None
        best, unproven = start, 0.0
        for width in _WIDTHS:
            done = self._pass(budget, bounds, best, width)
            best, unproven = done.best, max(0.0, done.best.time - done.left_out)
            if done.left_out > best.time + self._rounding or done.tried > _MOST_TRIED:
                break
        assert best is not None
        return Assignment(
            choice=best.choice,
            time=best.time,
            reach_bytes=best.reach_bytes,
            unproven_seconds=unproven / self.units_per_s,
        )

    @property
    def _rounding(self) -> float:
        """More than all rounding errors: few steps per layer, on numbers up to _STEEPEST + 1 times the total time."""
        return 1 + 8 * (len(self.layers) + 1) * 2.0**-53 * (_STEEPEST + 1) * self.slowest

    def _bounds(self, budget: int) -> list[_Bound] | None:
        """The bound on the layers before each layer, and on all layers; None when nothing fits.

        The prices are those at which some layer changes its best option, and then finer ones around the price with the
        best bound for all layers.
        """
        room = budget - self.after
        steepest = _STEEPEST * max(self.slowest, 1) / max(room, 1)
        slopes = self.slopes[self.slopes < steepest]
        prices = np.unique(np.concatenate([[0.0, steepest], _spread(slopes, _PRICES)]))
        relaxed = self._relaxed(budget, prices)
        for _ in range(_ROUNDS - 1):
            if relaxed is None:
                break
            best = int((relaxed[-1][1] - prices * room).argmax())
            low, high = prices[max(best - 1, 0)], prices[min(best + 1, len(prices) - 1)]
            inside = slopes[(slopes > low) & (slopes < high)]
            prices = np.unique(np.concatenate([prices, _spread(inside, _PRICES), np.linspace(low, high, _FINER)]))
            relaxed = self._relaxed(budget, prices)
        return None if relaxed is None else [_bound(least, prices, values) for least, values in relaxed]

    def _relaxed(self, budget: int, prices: Real) -> list[tuple[int, Real]] | None:
        """Fewest bytes and lowest costs at these prices of the first 0, 1, 2, ... layers; None if nothing fits.

        Let U(x) be the least time of the layers before i with at most x bytes saved by them together, and U* its lowest
        cost at a price: the minimum of U(x) + price x. An option of layer i that saves k bytes fits where those before
        it save at most c, and adds its time + U(min(x - k, c)). Its lowest cost is time + price k + the minimum of
        U(y) + price y over y <= c. U is relaxed to the highest of its lines U* - price y, which is convex and falls at
        rates among the prices. So that minimum is U* where the line that is highest at c has no higher price, and else
        the cost at c itself.
        """
        room = budget - self.after
        least, values = 0, np.zeros(len(prices))
        found = [(least, values)]
        at_price = np.arange(len(prices))[:, None]
        for layer in self.layers:
            limits = np.minimum(budget - layer.needs, room)
            fits = limits >= least
            if not fits.any():
                return None
            limits, kept, times = limits[fits], layer.kept[fits], layer.times[fits]
            costs = prices[:, None] * limits
            lines = values[:, None] - costs
            highest = lines.argmax(axis=0)
            there = lines[highest, np.arange(len(limits))] + costs
            values = np.min(
                np.where(at_price >= highest, values[:, None], there) + times + prices[:, None] * kept, axis=1
            )
            least += int(kept.min())
            found.append((least, values))
        return found if room >= least else None

    def _pass(self, budget: int, bounds: list[_Bound], best: Assignment | None, width: int) -> _Pass:
        """One pass over the layers with at most `width` labels for each, none of them worse than `best`."""
        reach, time = np.array([self.after], dtype=np.int64), np.zeros(1, dtype=np.int64)
        most = np.inf if best is None else best.time + self._rounding
        left_out, tried = np.inf, 0
        trail: list[tuple[Whole, Whole]] = []
        for layer, bound in zip(reversed(self.layers), reversed(bounds[:-1]), strict=True):
            reach = np.maximum(layer.needs, reach[:, None] + layer.kept).ravel()
            time = (time[:, None] + layer.times).ravel()
            came = np.flatnonzero(reach <= budget - bound.least)
            tried += len(reach)
            total = time[came] + bound.at(budget - reach[came])
            good = total <= most
            came, total = came[good], total[good]
            order = np.lexsort((time[came], reach[came]))
            came, total = came[order], total[order]
            quickest = np.minimum.accumulate(time[came])
            good = np.append(True, quickest[1:] < quickest[:-1])[: len(came)]
            came, total = came[good], total[good]
            if len(came) > width:
                chosen = _selected(total, width)
                left_out = min(left_out, float(np.delete(total, chosen).min()))
                came = came[chosen]
            reach, time = reach[came], time[came]
            trail.append((came // len(layer.times), came % len(layer.times)))
        if len(time) and (best is None or (int(time[-1]), int(reach[-1])) < (best.time, best.reach_bytes)):
            best = Assignment(choice=_followed(trail), time=int(time[-1]), reach_bytes=int(reach[-1]))
        assert best is not None
        return _Pass(best=best, left_out=left_out, tried=tried)


def _followed(trail: list[tuple[Whole, Whole]]) -> tuple[int, ...]:
    """The options on the trail to the last label of the first layer."""
    choice, label = [], -1
    for parents, options in reversed(trail):
        choice.append(int(options[label]))
        label = int(parents[label])
    return tuple(choice)


def _selected(totals: Real, width: int) -> Whole:
    """Indices of `width` labels, rising: the most promising half, and a half spread evenly over the rest."""
    order = np.argpartition(totals, width // 2)
    rest = np.sort(order[width // 2 :])
    return np.sort(np.concatenate([order[: width // 2], _spread(rest, width - width // 2)]))


def _spread(values: npt.NDArray[Scalar], most: int) -> npt.NDArray[Scalar]:
    """At most `most` of the values, evenly spread."""
    if len(values) <= most:
        return values
    return values[np.linspace(0, len(values) - 1, most).astype(np.int64)]


def _bound(least: int, prices: Real, values: Real) -> _Bound:
    # Lines k and k + 1 meet where values[k] - prices[k] room = values[k + 1] - prices[k + 1] room. If rounding
    # swaps two turns, another line is used, which is a bound too.
    turns = (np.diff(values) / np.diff(prices))[::-1]
    return _Bound(least=least, prices=prices, values=values, turns=np.maximum.accumulate(turns))


def _not_below(first: tuple[int, int], middle: tuple[int, int], last: tuple[int, int]) -> bool:
    """Whether the middle one of three points lies on the line through the others or above it."""
    return (middle[0] - first[0]) * (last[1] - first[1]) <= (middle[1] - first[1]) * (last[0] - first[0])


def _slopes(times: Whole, kept: Whole) -> list[float]:
    """Time saved per byte along the lower convex hull of (kept, time), where more bytes take less time.

    Corners by A. M. Andrew's scan (Information Processing Letters 9, 1979, 216-219).
    """
    hull: list[tuple[int, int]] = []
    for x, y in sorted(zip(kept.tolist(), times.tolist(), strict=True)):
        while len(hull) > 1 and _not_below(hull[-2], hull[-1], (x, y)):
            hull.pop()
        hull.append((x, y))
    return [(a[1] - b[1]) / (b[0] - a[0]) for a, b in pairwise(hull) if b[0] > a[0] and b[1] < a[1]]
