"""A calibration of this machine: what is stored, and what is timed where that is missing."""

from __future__ import annotations

import ctypes
import gc
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

import torch

from gcbench.calibration import op_times
from gcbench.calibration.op_times import GENERIC, Calibration, Overhead, Point, machine_key
from gcbench.calibration.timer import Timer
from gcbench.core.units import KIB, MIB
from gcbench.devices.backends import Device, cpu
from gcbench.operators import call_text
from gcbench.simulate.costs import Work
from gcbench.training.seeding import generators_restored

_GRID_BYTES = (4 * KIB, 32 * KIB, 256 * KIB, 2 * MIB, 16 * MIB, 128 * MIB)
"""Of each tensor: from what a core's own cache holds to what no cache does."""


_GRID_SIZES = (64, 256, 1024)
"""Rows and columns of products."""


_TORCH_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


_WITH_OVERHEADS_S = 2.0
"""Of a budget."""


_MATTERS = 0.01
"""Of the time of all calls."""


def calibrate_for(works: Iterable[Work], *, device: Device, budget_s: float, folder: Path | None = None) -> Calibration:
    """What is stored for this machine; where it lacks something for `works`, these measured in `budget_s` seconds.

    `works` names each call as often as the step makes it: what costs most comes first.
    """
    works = tuple(works)
    known = op_times.load(machine_key(device.describe()), folder)
    if known is not None and _is_complete(known, device) and not known.missing(works):
        return known
    measured = measure(works, device=device, budget_s=budget_s, known=known)
    op_times.save(measured, folder)
    return measured


def _is_complete(known: Calibration, device: Device) -> bool:
    return bool(known.points) and (bool(known.overheads) or device.name != cpu.TYPE)


def measure(works: Iterable[Work], *, device: Device, budget_s: float, known: Calibration | None) -> Calibration:
    """`known`, with what it lacks for `works` measured in `budget_s` seconds; what costs most comes first.

    If that is more than a hundredth of their time, all of `works` are measured anew.

    Where nothing is known, a generic grid comes before, in a quarter of the time, and what callers add, in seconds of
    its own (`calibration_host.LEAST_S`): without it a call made from Python would take what it takes alone, and keeping
    outputs next to nothing. A budget of less than `_WITH_OVERHEADS_S` is for the calls alone.
    """
    works = tuple(works)
    found = known or Calibration(machine=machine_key(device.describe()), created="")
    with _undisturbed(device):
        timer = Timer(device)
        start = time.monotonic()
        if not found.points:
            grid = tuple(_grid({work.dtype for work in works}))
            found = _with(found, timer.points(grid, expected=found.by_itself, until=start + budget_s / 4))
        from gcbench.calibration import (
            overheads as calibration_host,  # traces and trains a model, which is rarely called for
        )

        if not _is_complete(found, device) and budget_s >= _WITH_OVERHEADS_S:
            begun = time.monotonic()
            overheads, step_s = calibration_host.overheads(timer, until=begun + calibration_host.LEAST_S)
            found = _with(found, overheads=overheads, step_s=step_s)
            start += time.monotonic() - begun
        there = {(point.call, point.cold) for point in found.points}
        lacking = [work for work in found.missing(works) if (work.call, work.cold) not in there]
        counts = Counter(works)
        matters = sum(counts[work] * found.by_itself(work) for work in lacking)
        if matters > _MATTERS * sum(count * found.by_itself(work) for work, count in counts.items()):
            # All anew: at another hour the machine may be slower by more than what plans differ in.
            lacking = list(found.costliest(works))
        return _with(found, timer.points(lacking, expected=found.by_itself, until=start + budget_s))


def _with(
    known: Calibration, points: Iterable[Point] = (), *, overheads: tuple[Overhead, ...] = (), step_s: float = 0.0
) -> Calibration:
    created = datetime.now(UTC).isoformat(timespec="seconds")
    return known.merged(
        Calibration(machine=known.machine, created=created, points=tuple(points), overheads=overheads, step_s=step_s)
    )


def _grid(dtypes: Iterable[str]) -> Iterator[Work]:
    """Generic calls from which those that were not measured are interpolated."""
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


def _keep_memory() -> None:
    """Have the C library keep what is freed, where it is glibc: for this process, which measures and ends.

    Whether memory that a call takes is new to the process, and must be cleared page by page by the system, is chance:
    the largest block freed so far decides. In a step that has run before, most is not.
    """
    with suppress(OSError, AttributeError, ValueError):
        library = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_THRESHOLD, 32 * MIB)  # no more is possible; what is larger is always new
        library.mallopt(_M_TRIM_THRESHOLD, -1)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""glibc's malloc.h."""


@contextmanager
def _undisturbed(device: Device) -> Iterator[None]:
    """No garbage is looked for, and random numbers go on afterwards as if none had been drawn."""
    if device.name == cpu.TYPE:
        _keep_memory()
    was_enabled = gc.isenabled()
    cards = [] if device.name == cpu.TYPE else [device.name]
    with generators_restored(cards):
        gc.disable()
        try:
            yield
        finally:
            if was_enabled:
                gc.enable()
