"""Places labels beside crowded points: plain geometry, in pixels."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

MARGIN = 2
"""Pixels that stay free on every side of a label."""
_FAR = 12
"""Beyond this distance in pixels a leader line connects a point with its label."""
_APART = 8
"""Other points must be so many pixels farther from a label than its own point."""


Point = tuple[float, float]


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels."""

    left: float
    bottom: float
    right: float
    top: float

    def moved(self, x: float, y: float) -> Box:
        """Return the box shifted by x and y."""
        return Box(self.left + x, self.bottom + y, self.right + x, self.top + y)

    def grown(self, by: float) -> Box:
        """Return the box enlarged by so much on every side."""
        return Box(self.left - by, self.bottom - by, self.right + by, self.top + by)

    def within(self, other: Box) -> bool:
        """Return whether no part lies outside the other."""
        return (
            other.left <= self.left
            and self.right <= other.right
            and other.bottom <= self.bottom
            and self.top <= other.top
        )

    def holds(self, point: Point) -> bool:
        """Return whether the point lies inside."""
        return self.left <= point[0] <= self.right and self.bottom <= point[1] <= self.top

    def distance(self, point: Point) -> float:
        """Return the distance from the point to the box; 0 inside."""
        return math.dist(point, self.nearest(point))

    def nearest(self, point: Point) -> Point:
        """Return the place in the box that is nearest to the point."""
        return min(max(point[0], self.left), self.right), min(max(point[1], self.bottom), self.top)

    def overlap(self, other: Box) -> float:
        """Return the shared area, in square pixels."""
        wide = min(self.right, other.right) - max(self.left, other.left)
        high = min(self.top, other.top) - max(self.bottom, other.bottom)
        return wide * high if wide > 0 and high > 0 else 0.0


@dataclass(frozen=True)
class Label:
    """The box of a label and points along its leader line, in pixels; no line when it is plainly near.

    Attributes:
        ambiguous: another point is about as near, so a reader could mistake which one is meant.
    """

    room: Box
    leader: tuple[Point, ...]
    ambiguous: bool

    @classmethod
    def of(cls, room: Box, point: Point, others: Sequence[Point]) -> Label:
        """Return the label of `point` in that box."""
        (x, y), (near_x, near_y), away = point, room.nearest(point), room.distance(point)
        ambiguous = any(room.distance(other) < away + _APART for other in others if other != point)
        steps = max(int(away // 4), 1)
        line = tuple((x + (near_x - x) * i / steps, y + (near_y - y) * i / steps) for i in range(steps + 1))
        return cls(room, line if ambiguous or away > _FAR else (), ambiguous)

    def crossings(self, other: Label) -> float:
        """Return how far the line of one crosses the text of the other, weighted like a shared area."""
        through = sum(other.room.holds(p) for p in self.leader) + sum(self.room.holds(p) for p in other.leader)
        return 20.0 * through


def place(
    size: Box, number: int, points: Sequence[Point], frame: Box, symbols: Sequence[Box], placed: Sequence[Label]
) -> Label:
    """Return the nearest free place for a label of this size beside one of the points, or the best if none is free.

    A free place touches no symbol, label or line, and no other point is as near. Overlapping another label has the
    largest weight, so labels stay apart even where lines must cross.
    """
    point = points[number]
    best, least = Label.of(size, point, points), math.inf
    for x, y in _places(size, point, frame):
        room = size.moved(x - size.left, y - size.bottom).grown(MARGIN)
        conflict = 1e9 * (not room.within(frame)) + 1e6 * any(room.overlap(other.room) for other in placed)
        conflict += sum(room.overlap(symbol) for symbol in symbols)
        if conflict >= least:
            continue
        label = Label.of(room, point, points)
        conflict += sum(label.crossings(other) for other in placed) + 40 * label.ambiguous
        if conflict < least:
            best, least = label, conflict
        if conflict == 0:
            break
    return best


def _places(size: Box, point: Point, frame: Box) -> Iterator[Point]:
    """Yield lower left corners to try: around the point, then all over the panel, the nearest first."""
    x, y = point
    wide, high = size.right - size.left, size.top - size.bottom
    yield x + 12, y - high / 2
    yield x - wide / 2, y + 13
    yield x - wide / 2, y - high - 13
    yield x - wide - 12, y - high / 2
    step = high / 2 + 2
    grid = [
        (frame.left + 4 + column * 3 * step, frame.bottom + 4 + line * step)
        for column in range(int((frame.right - frame.left) // (3 * step)) + 1)
        for line in range(int((frame.top - frame.bottom) // step) + 1)
    ]
    yield from sorted(grid, key=lambda corner: math.dist((corner[0] + wide / 2, corner[1] + high / 2), point))
