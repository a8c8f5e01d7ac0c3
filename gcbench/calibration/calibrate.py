"""The calibration of this machine: loaded from its file, with missing calls timed."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import torch

from gcbench.calibration import op_times
from gcbench.calibration.op_times import GENERIC, Calibration, Point, machine_key
from gcbench.calibration.timer import Timer
from gcbench.core.units import KIB, MIB
from gcbench.devices.backends import Device, cpu
from gcbench.operators import call_text
from gcbench.simulate.costs import Work
from gcbench.training.seeding import generators_restored

_GRID_BYTES = (4 * KIB, 32 * KIB, 256 * KIB, 2 * MIB, 16 * MIB, 128 * MIB)
"""Bytes of each tensor: from less than a core's own cache to more than any cache."""
_GRID_SIZES = (64, 256, 1024)
"""Rows and columns of matrix products."""
_TORCH_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_WITH_OVERHEADS_S = 2.0
"""With a smaller budget, overheads are not measured."""
_MATTERS = 0.01
"""As a fraction of the time of all calls: if missing calls take more, all calls are timed again."""


def calibrate_for(works: Iterable[Work], *, device: Device, budget_s: float, folder: Path | None = None) -> Calibration:
    """The stored calibration of this machine; calls of `works` that it lacks are timed first, in `budget_s` seconds.

    `works` has each call as often as the step makes it; the costliest are timed first.
    """
    works = tuple(works)
    known = op_times.load(machine_key(device.describe()), folder)
    if known is not None and _is_complete(known, device) and not known.missing(works):
        return known
    if known is not None and device.name == cpu.TYPE and not known.has_processor_times:
        known = None
    measured = measure(works, device=device, budget_s=budget_s, known=known)
    op_times.save(measured, folder)
    return measured


def _is_complete(known: Calibration, device: Device) -> bool:
    if device.name != cpu.TYPE:
        return bool(known.points)
    return bool(known.points and known.has_processor_times and known.overheads and known.processor_overheads)


def measure(works: Iterable[Work], *, device: Device, budget_s: float, known: Calibration | None) -> Calibration:
    """`known` with the calls of `works` that it lacks, timed in `budget_s` seconds, the costliest first.

    If these are more than `_MATTERS` of the time, all of `works` are timed again. Without points, a generic grid is
    timed first, in a quarter of the budget. Without overheads these are measured too, in `overheads.LEAST_S` of their
    own, unless the budget is below `_WITH_OVERHEADS_S`: without them the cost of saving outputs is underestimated.
    """
    works = tuple(works)
    found = known or Calibration(machine=machine_key(device.describe()), created="")
    with _undisturbed(device):
        timer = Timer(device)
        start = timer.now()
        if not found.points:
            grid = tuple(_grid({work.dtype for work in works}))
            found = _with(found, timer.points(grid, expected=found.by_itself, until=start + budget_s / 4))
        if not _is_complete(found, device) and budget_s >= _WITH_OVERHEADS_S:
            from gcbench.calibration import overheads  # only now: it imports what traces and trains a model

            begun = timer.now()
            found = found.merged(overheads.overheads(timer, until=begun + overheads.LEAST_S).of(found.machine, _now()))
            start += timer.now() - begun
        there = {(point.call, point.cold) for point in found.points}
        lacking = [work for work in found.missing(works) if (work.call, work.cold) not in there]
        counts = Counter(works)
        matters = sum(counts[work] * found.by_itself(work) for work in lacking)
        if matters > _MATTERS * sum(count * found.by_itself(work) for work, count in counts.items()):
            # All of them: since the last time, the machine may have slowed by more than plans differ.
            lacking = list(found.costliest(works))
        return _with(found, timer.points(lacking, expected=found.by_itself, until=start + budget_s))


def _with(known: Calibration, points: Iterable[Point]) -> Calibration:
    return known.merged(Calibration(machine=known.machine, created=_now(), points=tuple(points)))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _grid(dtypes: Iterable[str]) -> Iterator[Work]:
    """Generic calls, from which calls that were not timed are interpolated."""
    for dtype in sorted({"fp32", *dtypes} & _TORCH_NAMES.keys()):
        name = _TORCH_NAMES[dtype]
        itemsize = getattr(torch, name).itemsize
        for nbytes in _GRID_BYTES:
            tensor = {"t": name, "s": [nbytes // itemsize]}
            call = call_text.write(GENERIC, [tensor, tensor], {})
            yield Work(op="mul", kind="pointwise", dtype=dtype, nbytes=3 * nbytes, call=call)
        for size in _GRID_SIZES:
            left, right = {"t": name, "s": [size, size]}, {"t": name, "s": [size, size], "d": [1, size]}
            yield Work(
                op="mm",
                kind="matmul",
                dtype=dtype,
                nbytes=3 * size * size * itemsize,
                flops=2 * size**3,
                dims=(1, size, size, size),
                call=call_text.write("aten::mm", [left, right], {}),
            )


@contextmanager
def _undisturbed(device: Device) -> Iterator[None]:
    """Without garbage collection; the states of random generators are restored afterwards."""
    if device.name == cpu.TYPE:
        device.keep_memory()
    was_enabled = gc.isenabled()
    cards = [] if device.name == cpu.TYPE else [device.name]
    with generators_restored(cards):
        gc.disable()
        try:
            yield
        finally:
            if was_enabled:
                gc.enable()
