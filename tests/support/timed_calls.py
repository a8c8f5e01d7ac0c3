"""Calls with their times, made up, and the calls of real steps: what tests of calibrations share."""

from __future__ import annotations

import tiny

from gcbench import strategies
from gcbench.calibration.call_overhead import Overhead
from gcbench.calibration.op_times import GENERIC, Calibration, Point
from gcbench.models import build as models
from gcbench.models import sources
from gcbench.operators import call_text
from gcbench.simulate.costs import Work
from gcbench.simulate.predictor import Predictor

MACHINE = "cpu, a processor, torch 2.13.0"
US = 1e-6


def tensor(*sizes, dtype="float32", strides=None):
    return {"t": dtype, "s": list(sizes)} | ({} if strides is None else {"d": list(strides)})


def pointwise(count, seconds=None, *, op="silu", **changes):
    """A call that reads `count` numbers and writes as many: the point, or the work where no seconds are given."""
    values = {
        "op": op,
        "kind": "pointwise",
        "dtype": "fp32",
        "nbytes": 8 * count,
        "call": call_text.write(f"aten::{op}", [tensor(count)], {}),
    } | changes
    return Work(**values) if seconds is None else point(values, seconds)


def product(rows, columns, inner, seconds=None, **changes):
    values = {
        "op": "mm",
        "kind": "matmul",
        "dtype": "fp32",
        "nbytes": 4 * (rows * inner + inner * columns + rows * columns),
        "flops": 2 * rows * columns * inner,
        "dims": (1, rows, columns, inner),
        "call": call_text.write("aten::mm", [tensor(rows, inner), tensor(inner, columns)], {}),
    } | changes
    return Work(**values) if seconds is None else point(values, seconds)


def generic(count, seconds):
    call = call_text.write(GENERIC, [tensor(count), tensor(count)], {})
    return pointwise(count, seconds, op="mul", nbytes=12 * count, call=call)


def point(values, seconds):
    defaults = {"flops": 0, "dims": (), "is_causal": False, "cold": 0}
    return Point(**(defaults | values), seconds=seconds)


def overheads(**seconds):
    """Of each caller, the seconds of a call, or of a call and of one that leaves a cold cache."""
    pairs = {caller: each if isinstance(each, tuple) else (each, 0.0) for caller, each in seconds.items()}
    return tuple(Overhead(caller=caller, call_s=call, cold_s=cold) for caller, (call, cold) in pairs.items())


def calibration_of(*points, **changes):
    values = {"machine": MACHINE, "created": "2026-11-24T12:00:00+00:00", "points": points} | changes
    return Calibration(**values)


def step_of(tmp_path, family, strategy="off", *, precision="fp32", optim="adamw_torch", batch_size=2):
    """The calls of a tiny model's step, in order."""
    source = sources.resolve(
        str(tiny.write_model(tmp_path / family, family)), pretrained=False, trust_remote_code=False
    )
    meta = models.build_meta(models.build_config(source, layers=None, overrides={}))
    predictor = Predictor(meta, precision=precision, optim=optim)
    plan = strategies.parse(strategy).plan_for(tiny.NUM_LAYERS)
    step = predictor.step(plan, batch_size=batch_size, seq_len=16)
    return [work for _, part in step.works for work in part] + list(step.update.works)
