"""Times of operator calls on this machine: one file per machine, interpolated for calls not measured. No torch.

A measured call has its measured time. For any other, similar calls are interpolated: memory-bound ones by their bytes,
matrix products and attention by the rate of those with the nearest dimensions.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import median

from gcbench.calibration.call_overhead import Overhead
from gcbench.core.files import cache_folder, write_text
from gcbench.core.json_codec import decode, encode
from gcbench.core.records import Machine
from gcbench.operators.call_text import form
from gcbench.simulate import kernel_times
from gcbench.simulate.costs import Work, WorkKind

SCHEMA = 2
"""Schema of the file; a file with another schema is measured again."""
GENERIC = "aten::mul.Tensor"
"""Represents any operator that was not measured: it reads two tensors and writes a third."""
_GENERIC_FORM = re.compile(rf"{re.escape(GENERIC)}\((\w+):,\1:\)")
"""Its call on two contiguous tensors of one size and dtype."""
_CLOSE = math.log(1.15)
"""Log ratio of bytes within which a measured call counts as the same; only a cache's edge moves its time by more."""
_NEIGHBOURS = 4
"""Measured products from which the rate of another is interpolated: one on either side of two dimensions."""
_SETTINGS = (
    *("cpu_capability", "cpu_cores", "torch_threads", "float32_matmul_precision", "tf32_matmul"),
    "OMP_WAIT_POLICY",  # whether threads sleep or spin while they wait decides what a short call takes
)
_VERSIONS = ("torch", "transformers", "python", "cuda", "driver")
"""Facts about a machine on which operator times depend."""
_GUESSED_FLOPS, _GUESSED_BANDWIDTH, _GUESSED_CALL_S = 30e9, 8e9, 4e-6
"""One CPU core, to the order of magnitude: used where nothing at all was measured."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One measured call; fields as in `Work`.

    Attributes:
        seconds: wall time.
        processor_s: processor time of all threads of the process, user and system; None on a GPU.
    """

    op: str
    kind: WorkKind
    dtype: str
    nbytes: int
    flops: int
    dims: tuple[int, ...]
    is_causal: bool
    call: str
    cold: int
    seconds: float
    processor_s: float | None = None

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for calls that take the same time."""
        return _key(self)


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The operator times of one machine.

    Attributes:
        machine: its `machine_key`.
        created: when it was measured last; ISO 8601, UTC.
        points: each call once.
        overheads: each caller once.
        step_s: seconds that a step takes beyond its calls, whatever the number of layers.
        processor_overheads, processor_step_s: the same in processor time; empty and 0 on a GPU.
        is_by_processor: whether `seconds` are in proportion to processor time; not so in a file.
    """

    schema: int = SCHEMA
    machine: str
    created: str
    points: tuple[Point, ...] = ()
    overheads: tuple[Overhead, ...] = ()
    step_s: float = 0.0
    processor_overheads: tuple[Overhead, ...] = ()
    processor_step_s: float = 0.0
    is_by_processor: bool = False

    @property
    def source(self) -> str:
        """The origin of the times, in words."""
        by = ", by ratios of processor time" if self.is_by_processor else ""
        return f"a calibration of this machine, {self.created[:10]}{by}"

    def seconds(self, work: Work) -> float:
        """The estimated time of one call in a step; on a GPU, of its kernel alone."""
        if self.is_of_gpu and work.kind == "view":
            return 0.0
        known = self._known
        if work not in known:
            overhead = self._overhead.get(work.caller)
            known[work] = max(self.by_itself(work) + (overhead.seconds(work) if overhead else 0.0), 0.0)
        return known[work]

    def host_s(self, work: Work) -> float:
        """The seconds that the processor takes to launch a call; none where it computes the call itself.

        `seconds` then includes what Python takes around it.
        """
        return kernel_times.host_s(work.caller, is_view=work.kind == "view") if self.is_of_gpu else 0.0

    @property
    def is_of_gpu(self) -> bool:
        """Whether the calls were timed on a GPU, which computes while Python launches."""
        return self.machine.startswith("cuda,")

    def covers(self, work: Work) -> bool:
        """Whether a call of the same kind and dtype was measured, and of attention in the same direction."""
        return _family(work) in self._families

    def by_itself(self, work: Work | Point) -> float:
        """The estimated time of one call by itself, made in a loop."""
        index = self._index
        exact = index.exact.get(_key(work))
        if exact is not None:
            return exact
        if work.kind == "view":
            return index.view(work)
        return index.product(work) if work.flops else index.traffic(work)

    def missing(self, works: Iterable[Work]) -> tuple[Work, ...]:
        """Those that can be timed and are not close to any point, each once; the costliest first."""
        return tuple(work for work in self.costliest(works) if not self._index.is_close(work))

    def unmeasured_frac(self, works: Iterable[Work]) -> float:
        """The share of the time of all of them that is extrapolated from calls that are not close."""
        counts = Counter(works)
        seconds = {work: count * self.seconds(work) for work, count in counts.items()}
        unmeasured = sum(each for work, each in seconds.items() if not self._index.is_close(work))
        return unmeasured / (sum(seconds.values()) or 1.0)

    def costliest(self, works: Iterable[Work]) -> tuple[Work, ...]:
        """Those that can be timed, each once; the costliest first."""
        unique: dict[tuple[object, ...], Work] = {}
        costs: dict[tuple[object, ...], float] = defaultdict(float)
        for work, count in Counter(works).items():
            if work.call:
                key = _key(work)
                unique.setdefault(key, work)
                costs[key] += count * self.by_itself(work)
        return tuple(unique[key] for key in sorted(unique, key=lambda key: -costs[key]))

    def merged(self, newer: Calibration) -> Calibration:
        """Both calibrations; where both have a point, or overheads, the newer one's."""
        points = {point.key: point for point in (*self.points, *newer.points)}
        return replace(
            newer,
            points=tuple(points.values()),
            overheads=newer.overheads or self.overheads,
            step_s=newer.step_s if newer.overheads else self.step_s,
            processor_overheads=newer.processor_overheads or self.processor_overheads,
            processor_step_s=newer.processor_step_s if newer.overheads else self.processor_step_s,
        )

    @property
    def has_processor_times(self) -> bool:
        """Whether every point has its processor time."""
        return all(point.processor_s is not None for point in self.points)

    def by_processor_time(self, works: Iterable[Work]) -> Calibration:
        """The calibration whose seconds are in proportion to processor time; itself where that was not measured.

        What other processes take, which differs from call to call, is then in no ratio of two steps. All seconds are
        scaled by one factor, so that those of `works` together are their wall time.
        """
        if not self.points or not self.has_processor_times:
            return self
        works = tuple(works)
        unscaled = self._of_processor(1.0)
        wall_s, processor_s = (sum(map(each.seconds, works)) for each in (self, unscaled))
        return self._of_processor(wall_s / processor_s) if wall_s and processor_s else unscaled

    def _of_processor(self, scale: float) -> Calibration:
        return replace(
            self,
            points=tuple(replace(each, seconds=scale * (each.processor_s or 0.0)) for each in self.points),
            overheads=tuple(
                replace(each, call_s=scale * each.call_s, cold_s=scale * each.cold_s)
                for each in self.processor_overheads
            ),
            step_s=scale * self.processor_step_s,
            is_by_processor=True,
        )

    @cached_property
    def _families(self) -> frozenset[tuple[object, ...]]:
        return frozenset(map(_family, self.points))

    @cached_property
    def _index(self) -> _Index:
        return _Index(self.points)

    @cached_property
    def _overhead(self) -> dict[str, Overhead]:
        return {each.caller: each for each in self.overheads}

    @cached_property
    def _known(self) -> dict[Work, float]:
        return {}


def _family(work: Work | Point) -> tuple[object, ...]:
    return (work.kind, work.dtype, work.kind == "attention" and "backward" in work.op)


def _key(work: Work | Point) -> tuple[object, ...]:
    return (form(work.call) or work.op, work.dtype, work.nbytes, work.dims, work.is_causal, work.cold)


class _Index:
    """Finds points similar to a call."""

    def __init__(self, points: Sequence[Point]) -> None:
        self.exact = {point.key: point.seconds for point in points}
        self._groups: dict[tuple[object, ...], list[Point]] = defaultdict(list)
        for point in points:
            for group in _groups(point):
                self._groups[group].append(point)
        self._curves: dict[tuple[object, ...], _Curve] = {}
        generic: dict[str, list[Point]] = defaultdict(list)
        for point in points:
            if _GENERIC_FORM.fullmatch(form(point.call)) and not point.cold:
                generic[point.dtype].append(point)
        self._generic = {dtype: _Curve(found) for dtype, found in generic.items()}
        self._least = min((point.seconds for point in points if point.kind != "view"), default=_GUESSED_CALL_S)

    def is_close(self, work: Work) -> bool:
        """Whether there is a point of a similar call of about the same size."""
        groups = _groups(work)
        if work.kind == "view":
            return groups[-2] in self._groups
        if work.flops:
            return any(point.dims == work.dims for point in self._groups.get(groups[1], ()))
        similar = self._groups.get(groups[0], ())
        return any(abs(_log(point.nbytes) - _log(work.nbytes)) <= _CLOSE for point in similar)

    def view(self, work: Work | Point) -> float:
        """The time of a view, which does not depend on its size."""
        for group in _groups(work):
            if group in self._groups:
                return median(point.seconds for point in self._groups[group])
        return _GUESSED_CALL_S / 2

    def product(self, work: Work | Point) -> float:
        """The time of a matrix product, from the FLOP/s of those with the nearest dimensions, weighted by distance."""
        groups = ([p for p in self._groups.get(group, ()) if p.flops] for group in _groups(work))
        near = next((group for group in groups if group), [])
        if not near:
            return work.flops / _GUESSED_FLOPS + _GUESSED_CALL_S
        apart = sorted((_distance(point.dims, work.dims), place) for place, point in enumerate(near))
        weights, logs = 0.0, 0.0
        for distance, place in apart[:_NEIGHBOURS]:
            weight = 1.0 / max(distance, 1e-3) ** 2
            weights += weight
            logs += weight * math.log(near[place].flops / near[place].seconds)
        return max(work.flops / math.exp(logs / weights), self._least)

    def traffic(self, work: Work | Point) -> float:
        """The time of a memory-bound call, interpolated by bytes; beyond the points as the generic operator grows."""
        generic = self._generic.get(work.dtype) or next(iter(self._generic.values()), None)
        for group in _groups(work)[:-1]:
            if group in self._groups:
                if group not in self._curves:
                    self._curves[group] = _Curve(self._groups[group])
                return self._curves[group].seconds(work.nbytes, generic)
        if generic is not None:
            return generic.seconds(work.nbytes, None)
        return work.nbytes / _GUESSED_BANDWIDTH + _GUESSED_CALL_S


def _groups(work: Work | Point) -> tuple[tuple[object, ...], ...]:
    """The groups of similar calls that a call belongs to, the most similar first."""
    named = form(work.call) or work.op
    return (
        (named, work.dtype, work.is_causal, work.cold),
        (named, work.dtype, work.is_causal),
        (work.op, work.dtype, work.is_causal),
        (work.op, work.dtype),
        (work.op,),
        (work.kind,),
    )


class _Curve:
    """Seconds as a function of bytes, never falling."""

    def __init__(self, points: Sequence[Point]) -> None:
        by_size: dict[int, list[float]] = defaultdict(list)
        for point in points:
            by_size[point.nbytes].append(point.seconds)
        self._sizes = sorted(by_size)
        self._seconds: list[float] = []
        for size in self._sizes:
            least = self._seconds[-1] if self._seconds else 0.0
            self._seconds.append(max(median(by_size[size]), least))  # more bytes never take less

    def seconds(self, nbytes: int, generic: _Curve | None) -> float:
        """Log-linear between two points; beyond them as `generic` grows, or in proportion to the bytes."""
        sizes = self._sizes
        if nbytes <= sizes[0] or nbytes >= sizes[-1]:
            end = 0 if nbytes <= sizes[0] else -1
            if generic is not None and generic is not self:
                return self._seconds[end] * generic.seconds(nbytes, None) / generic.seconds(sizes[end], None)
            return self._seconds[end] * max(nbytes / max(sizes[end], 1), 1.0)
        place = next(place for place, size in enumerate(sizes) if size >= nbytes)
        low, high = _log(sizes[place - 1]), _log(sizes[place])
        share = (_log(nbytes) - low) / (high - low)
        return math.exp((1 - share) * math.log(self._seconds[place - 1]) + share * math.log(self._seconds[place]))


def _log(nbytes: int) -> float:
    return math.log(max(nbytes, 1))


def _distance(one: Sequence[int], two: Sequence[int]) -> float:
    return math.sqrt(sum((_log(a) - _log(b)) ** 2 for a, b in zip(one, two, strict=True)))


def machine_key(machine: Machine) -> str:
    """A text that differs between machines whose operator times differ."""
    settings = [f"{name} {machine.settings[name]}" for name in _SETTINGS if name in machine.settings]
    versions = [f"{name} {machine.versions[name]}" for name in _VERSIONS if name in machine.versions]
    return ", ".join([machine.device.partition(":")[0], machine.device_name, *settings, *versions])


def default_folder() -> Path:
    """The folder of calibrations, in the user's cache folder (XDG base directory specification)."""
    return cache_folder()


def path_for(machine: str, folder: Path | None = None) -> Path:
    """The file of the machine with that key."""
    digest = hashlib.sha256(machine.encode()).hexdigest()[:12]
    return (folder or default_folder()) / f"calibration-{digest}.json"


def load(machine: str, folder: Path | None = None) -> Calibration | None:
    """The calibration of that machine; None when there is no valid file."""
    try:
        document = json.loads(path_for(machine, folder).read_text(encoding="utf-8"))
        if not isinstance(document, dict) or document.get("schema") != SCHEMA:
            return None
        found = decode(Calibration, document)
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    return found if found.machine == machine and is_sound(found) else None


def is_sound(calibration: Calibration) -> bool:
    """Whether all seconds are finite numbers, and those of calls above 0."""
    of_calls = [point.seconds for point in calibration.points]
    of_calls += [point.processor_s for point in calibration.points if point.processor_s is not None]
    added = (*calibration.overheads, *calibration.processor_overheads)
    seconds = [calibration.step_s, calibration.processor_step_s, *of_calls]
    seconds += [value for each in added for value in (each.call_s, each.cold_s)]
    return all(isinstance(value, float) and math.isfinite(value) for value in seconds) and all(
        value > 0 for value in of_calls
    )


def save(calibration: Calibration, folder: Path | None = None) -> Path | None:
    """Replace the machine's file atomically and return its path; None where it cannot be written."""
    path = path_for(calibration.machine, folder)
    try:
        write_text(path, json.dumps(encode(calibration), separators=(",", ":")) + "\n")
    except OSError:
        return None
    return path
