"""Chooses the outputs to save inside a checkpointed layer: the trade-off curve of saved bytes and recompute seconds.

A checkpointed layer runs a second time in the backward pass. A saved output need not be recomputed, nor what only led
to it; what is not saved must be recomputed with all that it reads, down to a saved output. At a price per byte the
cheapest choice is a minimum cut (J.-C. Picard, Maximal closure of a graph, Management Science 22, 1976,
1268-1272; for recomputation: H. He and S. Yu, Transcending runtime-memory tradeoffs in checkpointing by being fusion
aware, MLSys 2023). Raising and lowering the price gives the corners of the lower convex hull, one after the other
(M. J. Eisner and D. G. Severance, Mathematical techniques for efficient record segmentation in large shared databases,
Journal of the ACM 23, 1976, 619-635).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_UNITS_PER_S = 10**15
"""Seconds are counted in integer femtoseconds: sums and comparisons are exact, and 0.1 + 0.2 is 0.3."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """One call of an operator in the forward pass of a layer; calls are numbered from 0 in the order in which they run.

    Attributes:
        name: `mm#3` is the fourth call of `mm` in the layer.
        seconds: time to run it again.
        nbytes: bytes to save its outputs; 0 where they are tiny, or share memory with what stays allocated anyway.
        reads: numbers of earlier calls whose outputs it reads.
        needed: the backward pass reads its output.
        can_keep: False where its output cannot be saved: it is changed in place later, or is random.
        must_run: it runs again whatever is saved (it draws random numbers), and so needs what it reads. Only up to the
            last needed call, after which the recomputation stops.
    """

    name: str
    seconds: float
    nbytes: int
    reads: tuple[int, ...]
    needed: bool
    can_keep: bool
    must_run: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """One choice of outputs to save, and its cost.

    Attributes:
        keep: numbers of the calls whose outputs are saved, rising.
        skip: numbers of the calls that are not saved and need not run again, though a later one does.
        kept_bytes: bytes of the saved outputs.
        seconds: time to run all other calls again, up to the last whose output is needed.
    """

    keep: tuple[int, ...]
    skip: tuple[int, ...]
    kept_bytes: int
    seconds: float


def frontier(calls: Sequence[Call]) -> tuple[Selection, ...]:
    """The corners of the lower convex hull of (saved bytes, seconds), from the fewest bytes to the least seconds.

    They are all the choices that are best at some price of a byte. The first is the fastest that saves no bytes: it
    names outputs without memory of their own where that saves time. The last is the fastest of all, with as few bytes
    as possible. No output is saved that could be left out at no cost in seconds.
    """
    layer = _Layer(calls)
    first = layer.cheapest(per_second=1, per_byte=layer.all_units + 1)
    last = layer.cheapest(per_second=layer.all_bytes + 1, per_byte=1)
    corners = [first] if first.kept_bytes == last.kept_bytes else [first, *_between(layer, first, last), last]
    return tuple(layer.found(corner) for corner in corners)


def fewer(corners: Sequence[Selection], most: int) -> tuple[Selection, ...]:
    """At most `most` of these corners, rising in bytes, with the least area between the two hulls; both ends stay.

    Mixing layers reaches every point on the lines between the chosen corners, so the area between those lines and the
    lines between all corners, in seconds times bytes, is what is lost.

    Raises ValueError when `most` is less than 2.
    """
    if most < 2:
        raise ValueError(f"a choice has at least its two ends, not {most}; ask for 2 or more")
    if len(corners) <= most:
        return tuple(corners)
    # For each corner: the smallest area on a path there from the first, and the path; one step longer each time.
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, (0,))}
    for _ in range(most - 1):
        longer = dict(best)
        for end in range(1, len(corners)):
            paths = [
                (area + _area(corners[at], corners[end]), (*path, end)) for at, (area, path) in best.items() if at < end
            ]
            longer[end] = min([*paths, longer[end]] if end in longer else paths)
        best = longer
    return tuple(corners[number] for number in best[len(corners) - 1][1])


def _area(left: Selection, right: Selection) -> float:
    return (right.kept_bytes - left.kept_bytes) * (left.seconds + right.seconds) / 2


@dataclass(frozen=True, kw_only=True, slots=True)
class _Corner:
    """A choice in integers: `units` are femtoseconds."""

    keep: frozenset[int]
    kept_bytes: int
    units: int


def _between(layer: _Layer, left: _Corner, right: _Corner) -> Iterator[_Corner]:
    """The corners strictly between two, by rising bytes: the cheapest at the price where these two cost the same."""
    per_second, per_byte = right.kept_bytes - left.kept_bytes, left.units - right.units
    corner = layer.cheapest(per_second=per_second, per_byte=per_byte)
    if per_second * (corner.units - left.units) + per_byte * (corner.kept_bytes - left.kept_bytes) < 0:
        yield from _between(layer, left, corner)
        yield corner
        yield from _between(layer, corner, right)


class _Layer:
    """A layer's calls as a network whose minimum cuts are the best choices.

    Node 2v represents "the output of v is available", node 2v + 1 "v runs again"; a node on the source's side is true.
    The arc from the first to the second costs what saving v costs, the one from the second to the sink what running v
    costs, and an unlimited one leads from "v runs again" to the output of each call that v reads. Where v is needed,
    the source itself is the first node.
    """

    def __init__(self, calls: Sequence[Call]) -> None:
        self.calls = calls
        self.units = [round(call.seconds * _UNITS_PER_S) for call in calls]
        self.all_units = sum(self.units)
        self.all_bytes = sum(call.nbytes for call in calls)
        self.needed = [v for v, call in enumerate(calls) if call.needed]
        self.forced = [v for v, call in enumerate(calls[: max(self.needed, default=-1) + 1]) if call.must_run]
        source, sink = 2 * len(calls), 2 * len(calls) + 1
        self.network = _Network(sink + 1)
        self.there = [source if call.needed else 2 * v for v, call in enumerate(calls)]
        self.keep_arcs = [self.network.add(self.there[v], 2 * v + 1) for v in range(len(calls))]
        self.run_arcs = [self.network.add(2 * v + 1, sink) for v in range(len(calls))]
        self.unlimited = [self.network.add(source, 2 * v + 1) for v in self.forced]
        for v, call in enumerate(calls):
            self.unlimited += [self.network.add(2 * v + 1, self.there[u]) for u in call.reads if not calls[u].needed]

    def cheapest(self, *, per_second: int, per_byte: int) -> _Corner:
        """The choice of least per_second x seconds + per_byte x bytes; of equals the one of fewest bytes, then outputs.

        The second and third criterion are lower digits of the same integer.
        """
        outputs = len(self.calls) + 1
        whole = outputs * (self.all_bytes + 1)
        never = whole * (per_second * self.all_units + per_byte * self.all_bytes + 1)
        capacity = [0] * self.network.num_arcs
        for v, call in enumerate(self.calls):
            kept = (whole * per_byte + outputs) * call.nbytes + 1
            capacity[self.keep_arcs[v]] = kept if call.can_keep else never
            capacity[self.run_arcs[v]] = whole * per_second * self.units[v]
        for arc in self.unlimited:
            capacity[arc] = never
        side = self.network.cut(capacity)
        keep = frozenset(v for v in range(len(self.calls)) if side[self.there[v]] and not side[2 * v + 1])
        return _Corner(
            keep=keep,
            kept_bytes=sum(self.calls[v].nbytes for v in keep),
            units=sum(self.units[v] for v in self._run_again(keep)),
        )

    def found(self, corner: _Corner) -> Selection:
        again = self._run_again(corner.keep)
        return Selection(
            keep=tuple(sorted(corner.keep)),
            skip=tuple(v for v in range(max(again, default=0)) if v not in again and v not in corner.keep),
            kept_bytes=corner.kept_bytes,
            seconds=corner.units / _UNITS_PER_S,
        )

    def _run_again(self, keep: frozenset[int]) -> set[int]:
        """The calls that have to run again with these outputs saved."""
        again: set[int] = set()
        waiting = self.forced + [v for v in self.needed if v not in keep]
        while waiting:
            v = waiting.pop()
            if v not in again:
                again.add(v)
                waiting += [u for u in self.calls[v].reads if u not in keep]
        return again


class _Network:
    """Directed arcs whose capacities are passed to each cut; the last two nodes are source and sink.

    E. A. Dinic, Algorithm for solution of a problem of maximum flow in networks with power estimation, Soviet
    Mathematics Doklady 11, 1970, 1277-1280, in integers. On these networks it is some 10 to 20 times as fast as
    the algorithms of networkx 3.6 (0.6 ms against 5 to 20 ms for 120 calls), and a hull needs about a hundred cuts.
    """

    def __init__(self, num_nodes: int) -> None:
        self.source, self.sink = num_nodes - 2, num_nodes - 1
        self.heads: list[int] = []
        self.arcs_of: list[list[int]] = [[] for _ in range(num_nodes)]

    @property
    def num_arcs(self) -> int:
        return len(self.heads)

    def add(self, tail: int, head: int) -> int:
        """The number of a new arc; the next number is its reverse arc, with capacity 0."""
        arc = len(self.heads)
        self.heads += [head, tail]
        self.arcs_of[tail].append(arc)
        self.arcs_of[head].append(arc + 1)
        return arc

    def cut(self, capacity: list[int]) -> list[bool]:
        """Which nodes lie on the source's side of a minimum cut, the smallest such side; uses `capacity` up."""
        while True:
            to_sink = self._steps_to_sink(capacity)
            if to_sink[self.source] == len(self.arcs_of):
                break
            self._block(capacity, to_sink)
        side = [False] * len(self.arcs_of)
        side[self.source] = True
        reached = [self.source]
        for node in reached:
            for arc in self.arcs_of[node]:
                if capacity[arc] and not side[self.heads[arc]]:
                    side[self.heads[arc]] = True
                    reached.append(self.heads[arc])
        return side

    def _steps_to_sink(self, capacity: list[int]) -> list[int]:
        """The fewest arcs with capacity left from each node to the sink; the number of nodes where there is no path."""
        heads, nowhere = self.heads, len(self.arcs_of)
        steps = [nowhere] * nowhere
        steps[self.sink] = 0
        reached = [self.sink]
        for node in reached:
            for arc in self.arcs_of[node]:
                if capacity[arc ^ 1] and steps[heads[arc]] == nowhere:
                    steps[heads[arc]] = steps[node] + 1
                    reached.append(heads[arc])
        return steps

    def _block(self, capacity: list[int], steps: list[int]) -> None:
        """Send flow along shortest paths until each of them is blocked; changes both arguments."""
        heads, arcs_of, source, sink = self.heads, self.arcs_of, self.source, self.sink
        tried = [0] * len(arcs_of)
        path: list[int] = []
        node = source
        while True:
            if node == sink:
                flow = min(capacity[arc] for arc in path)
                for arc in path:
                    capacity[arc] -= flow
                    capacity[arc ^ 1] += flow
                full = next(place for place, arc in enumerate(path) if not capacity[arc])
                node = heads[path[full] ^ 1]
                del path[full:]
            arcs, nearer = arcs_of[node], steps[node] - 1
            at = tried[node]
            while at < len(arcs) and not (capacity[arcs[at]] and steps[heads[arcs[at]]] == nearer):
                at += 1
            tried[node] = at
            if at < len(arcs):
                path.append(arcs[at])
                node = heads[arcs[at]]
            elif path:
                steps[node] = len(arcs_of)
                node = heads[path.pop() ^ 1]
            else:
                return
