"""Which outputs inside a checkpointed layer are worth keeping: all the best trades of bytes for seconds.

A checkpointed layer is run a second time in the backward pass. What is kept of it need not be computed again, nor what
only led to it; what is not kept must be computed, and so must all that this reads, down to something kept. At a price
per byte the cheapest choice is a minimum cut (J.-C. Picard, Maximal closure of a graph, Management Science 22, 1976,
1268-1272; for recomputation: H. He and S. Yu, Transcending runtime-memory tradeoffs in checkpointing by being fusion
aware, MLSys 2023). Raising and lowering the price gives the corners of the lower convex hull, one after the other
(M. J. Eisner and D. G. Severance, Mathematical techniques for efficient record segmentation in large shared databases,
Journal of the ACM 23, 1976, 619-635).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

_UNITS_PER_S = 10**15
"""Seconds are counted in whole femtoseconds: sums and comparisons are exact, and 0.1 + 0.2 is 0.3."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Call:
    """One call of an operator in the forward pass of a layer; calls are numbered from 0 in the order in which they run.

    Attributes:
        name: `mm#3` is the fourth call of `mm` in the layer.
        seconds: what it takes to run it again.
        nbytes: what its outputs hold if they are kept; 0 where they are tiny, or share memory with what stays anyway.
        reads: numbers of earlier calls whose outputs it reads.
        needed: the backward pass reads its output.
        can_keep: False where its output may not be kept: it is changed in place later, or is random.
        must_run: it has to run again whatever is kept (it draws random numbers), so what it reads has to be there.
            That counts up to the last needed call only, for after it the recomputation stops.
    """

    name: str
    seconds: float
    nbytes: int
    reads: tuple[int, ...]
    needed: bool
    can_keep: bool
    must_run: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """One choice of what to keep, and what it costs.

    Attributes:
        keep: numbers of the calls whose outputs are kept, rising.
        skip: numbers of the calls that need not run again though a later one does, and that are not kept.
        kept_bytes: what the kept outputs hold.
        seconds: what it takes to run all other calls again, up to the last whose output is needed.
    """

    keep: tuple[int, ...]
    skip: tuple[int, ...]
    kept_bytes: int
    seconds: float


def frontier(calls: Sequence[Call]) -> tuple[Found, ...]:
    """The corners of the lower convex hull of (kept bytes, seconds), from the fewest bytes to the least seconds.

    They are all the choices that are best at some price of a byte. The first keeps no bytes and is the fastest that
    does so: it names outputs that hold nothing where that saves time. The last is the fastest of all, with the fewest
    bytes that this takes. No output is kept that could be left out at no cost in seconds.
    """
    layer = _Layer(calls)
    first = layer.cheapest(per_second=1, per_byte=layer.all_units + 1)
    last = layer.cheapest(per_second=layer.all_bytes + 1, per_byte=1)
    corners = [first] if first.kept_bytes == last.kept_bytes else [first, *_between(layer, first, last), last]
    return tuple(layer.found(corner) for corner in corners)


def fewer(corners: Sequence[Found], most: int) -> tuple[Found, ...]:
    """At most `most` of these corners, rising in bytes, chosen so that the rest is missed least; both ends are kept.

    Layers that differ reach every point on the lines between the corners that are chosen. The choice makes the area
    between those lines and the lines between all corners, in seconds times bytes, as small as it can be.

    Raises ValueError when `most` is less than 2.
    """
    if most < 2:
        raise ValueError(f"a choice has at least its two ends, not {most}; ask for 2 or more")
    if len(corners) <= most:
        return tuple(corners)
    # For each corner: the smallest area on a way there from the first, and the way; one step longer each time.
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, (0,))}
    for _ in range(most - 1):
        longer = dict(best)
        for end in range(1, len(corners)):
            ways = [
                (area + _area(corners[at], corners[end]), (*way, end)) for at, (area, way) in best.items() if at < end
            ]
            longer[end] = min([*ways, longer[end]] if end in longer else ways)
        best = longer
    return tuple(corners[number] for number in best[len(corners) - 1][1])


def _area(left: Found, right: Found) -> float:
    return (right.kept_bytes - left.kept_bytes) * (left.seconds + right.seconds) / 2


@dataclass(frozen=True, kw_only=True, slots=True)
class _Corner:
    """A choice in exact numbers: `units` are femtoseconds."""

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

    Node 2v stands for "the output of v has to be there", node 2v + 1 for "v runs again"; a node on the source's side is
    true. An arc from the first to the second costs what keeping v costs, one from the second to the sink what running v
    costs, and one without limit leads from "v runs again" to the output of each call that v reads. Where v is needed,
    the source itself stands for the first.
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

        The second and third wish are lower digits of the same whole number.
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

    def found(self, corner: _Corner) -> Found:
        again = self._run_again(corner.keep)
        return Found(
            keep=tuple(sorted(corner.keep)),
            skip=tuple(v for v in range(max(again, default=0)) if v not in again and v not in corner.keep),
            kept_bytes=corner.kept_bytes,
            seconds=corner.units / _UNITS_PER_S,
        )

    def _run_again(self, keep: frozenset[int]) -> set[int]:
        """The calls that have to run again with these outputs kept."""
        again: set[int] = set()
        waiting = self.forced + [v for v in self.needed if v not in keep]
        while waiting:
            v = waiting.pop()
            if v not in again:
                again.add(v)
                waiting += [u for u in self.calls[v].reads if u not in keep]
        return again


class _Network:
    """Directed arcs whose capacities come with each question; the last two nodes are source and sink.

    E. A. Dinic, Algorithm for solution of a problem of maximum flow in networks with power estimation, Soviet
    Mathematics Doklady 11, 1970, 1277-1280, in whole numbers. On these networks it is some 10 to 20 times as fast as
    the algorithms of networkx 3.6 (0.6 ms against 5 to 20 ms for 120 calls), and a hull asks about a hundred times.
    """

    def __init__(self, num_nodes: int) -> None:
        self.source, self.sink = num_nodes - 2, num_nodes - 1
        self.heads: list[int] = []
        self.arcs_of: list[list[int]] = [[] for _ in range(num_nodes)]

    @property
    def num_arcs(self) -> int:
        return len(self.heads)

    def add(self, tail: int, head: int) -> int:
        """The number of a new arc; the next number is its way back, with capacity 0."""
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
        """The fewest arcs with capacity left from each node to the sink; the number of nodes where there is no way."""
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
        """Send flow along shortest ways until each of them is blocked; changes both arguments."""
        heads, arcs_of, source, sink = self.heads, self.arcs_of, self.source, self.sink
        tried = [0] * len(arcs_of)
        way: list[int] = []
        node = source
        while True:
            if node == sink:
                flow = min(capacity[arc] for arc in way)
                for arc in way:
                    capacity[arc] -= flow
                    capacity[arc ^ 1] += flow
                full = next(place for place, arc in enumerate(way) if not capacity[arc])
                node = heads[way[full] ^ 1]
                del way[full:]
            arcs, nearer = arcs_of[node], steps[node] - 1
            at = tried[node]
            while at < len(arcs) and not (capacity[arcs[at]] and steps[heads[arcs[at]]] == nearer):
                at += 1
            tried[node] = at
            if at < len(arcs):
                way.append(arcs[at])
                node = heads[arcs[at]]
            elif way:
                steps[node] = len(arcs_of)
                node = heads[way.pop() ^ 1]
            else:
                return
