"""Synthetic grids of batch sizes and lengths: memory that grows with both, on a card that not every cell fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
from fixtures_predicted import CARD, cell, predicted_report, prediction
from fixtures_report import OUT_OF_MEMORY, outcome, peaks, report, steady, workload

from gcbench.core.records import EMULATED, Outcome, Report
from gcbench.core.units import MIB
from gcbench.report import rows as tables
from gcbench.report import sweep

CARD_MIB = 24 * 1024
SLOPES = {"off": 2600, "per-layer": 900, "every:2": 1700}
"""MiB that a sequence of 512 tokens adds to the peak."""
SPEED = {"off": 1.0, "per-layer": 1.3, "every:2": 1.15}
"""Seconds of a sequence, relative to off; a fixed cost per step makes larger batches pay."""
NAMES = ("off", "per-layer", *(f"every:{k}" for k in range(2, 7)), *(f"segment:{k}" for k in range(2, 7)))
LONG = ("off", *(f"segment:{k}+offload:boundaries+pinned" for k in range(1, 12)))


def peak_mib(strategy: str, batch: int, seq: int) -> float:
    return 4000 + SLOPES.get(strategy, 1000 + 40 * len(strategy)) * batch * seq / 512


def step_s(strategy: str, batch: int, seq: int) -> float:
    return 0.2 + 0.05 * SPEED.get(strategy, 1.4) * batch * seq / 512


def measured_grid(
    batches: Sequence[int] = (1, 2, 4, 8, 16),
    seqs: Sequence[int] = (512,),
    *,
    names: Sequence[str] = tuple(SLOPES),
    limit: float = CARD_MIB,
    rounds: int = 3,
    spread: float = 0.01,
    device: str = "cuda:0",
    model: str = "some-llama",
    changed: Mapping[tuple[str, int], Outcome] | None = None,
    **changes: object,
) -> Report:
    """Every cell measured, or out of memory beyond `limit` MiB; `changed` replaces cells by (strategy, batch)."""
    outcomes = []
    for batch, seq in ((batch, seq) for seq in seqs for batch in batches):
        work = workload(model=model, batch=batch, seq=seq, device=device, precision="bf16")
        for name in names:
            total = peak_mib(name, batch, seq)
            given = (changed or {}).get((name, batch))
            if given is not None:
                outcomes.append(replace(given, cell=replace(given.cell, workload=work)))
            elif total + 600 > limit:
                outcomes.append(outcome(name, work=work, failure=OUT_OF_MEMORY))
            else:
                on_card = {} if device == "cpu" else {"reserved": total + 100, "process": total + 600}
                times = steady(step_s(name, batch, seq), rounds, spread=spread)
                outcomes.append(outcome(name, peaks(0.9 * total, total, 4000, **on_card), times, work=work))
    made = report(*outcomes, device_name="Example Card", **changes)
    return replace(made, machine=replace(made.machine, device_memory_bytes=int(limit * MIB)))


def emulated_grid(**arguments: object) -> Report:
    """The same without times and gradients, in one round."""
    made = measured_grid(**arguments)  # type: ignore[arg-type]  # the caller's names are those of measured_grid
    outcomes = []
    for each in made.outcomes:
        rounds = tuple(
            replace(
                result,
                step_times_s=(),
                grad_checksum="",
                grad_rel_diff=None,
                memory=result.memory and replace(result.memory, process_bytes=None),
            )
            for result in each.rounds[:1]
        )
        outcomes.append(replace(each, rounds=rounds))
    machine = replace(made.machine, settings={EMULATED: "example"})
    return replace(made, source="emulated", outcomes=tuple(outcomes), machine=machine)


def predicted_grid(
    batches: Sequence[int] = (1, 2, 4, 8, 16),
    seqs: Sequence[int] = (512,),
    *,
    names: Sequence[str] = tuple(SLOPES),
    limit: float | None = CARD_MIB,
    reserve: float = 0.0,
    plus_mib: float = 0.0,
) -> Report:
    """Predictions of the same cells; `plus_mib` shifts what each process needs."""
    outcomes = []
    for batch, seq in ((batch, seq) for seq in seqs for batch in batches):
        for name in names:
            total = peak_mib(name, batch, seq)
            memory = peaks(0.9 * total, total, 4000, reserved=total + 100, process=total + 600 + plus_mib)
            said = replace(prediction(memory, limit=limit), reserve_frac=reserve)
            outcomes.append(cell(name, said, work=replace(CARD, batch_size=batch, seq_len=seq)))
    return predicted_report(*outcomes)


def with_times(report: Report, monkeypatch: pytest.MonkeyPatch, *, half_width: float | None = None) -> Report:
    """Give the rows of a prediction step times, with a band of this relative half width."""
    changed = []
    for row in tables.rows(report):
        seconds = 0.2 + 0.05 * row.batch_size
        band = (
            {}
            if half_width is None
            else {
                "step_time_low_s": seconds * (1 - half_width),
                "step_time_high_s": seconds * (1 + half_width),
            }
        )
        tokens = row.batch_size * row.seq_len
        changed.append(replace(row, step_time_s=seconds, tokens_per_s=tokens / seconds, **band))
    monkeypatch.setattr(sweep, "rows", lambda _: tuple(changed))
    return report
