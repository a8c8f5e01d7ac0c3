"""Synthetic reports: cells with chosen peaks, times and faults, as a run would have stored them."""

from __future__ import annotations

from collections.abc import Sequence

from gcbench.core.records import (
    SCHEMA,
    Cell,
    Failure,
    FailureKind,
    Machine,
    MemoryPeaks,
    ModelFacts,
    Outcome,
    Report,
    RoundResult,
    Workload,
)
from gcbench.core.units import MIB

CHECKPOINTED = {"off": 0, "per-layer": 12, "every:2": 6, "every:3": 4, "every:4": 3, "segment:4": 12}


def workload(
    *,
    model: str = "gpt2",
    batch: int = 16,
    seq: int = 64,
    device: str = "cpu",
    precision: str = "fp32",
    optim: str = "adamw_torch",
    attn: str | None = "sdpa",
) -> Workload:
    return Workload(
        model=model,
        device=device,
        batch_size=batch,
        seq_len=seq,
        precision=precision,
        optim=optim,
        attn_implementation=attn,
    )


def peaks(
    forward: float, backward: float, optimizer: float, *, reserved: float | None = None, process: float | None = None
) -> MemoryPeaks:
    """Peaks given in MiB."""
    return MemoryPeaks(
        allocated_bytes=int(max(forward, backward, optimizer) * MIB),
        reserved_bytes=None if reserved is None else int(reserved * MIB),
        process_bytes=None if process is None else int(process * MIB),
        forward_bytes=int(forward * MIB),
        backward_bytes=int(backward * MIB),
        optimizer_bytes=int(optimizer * MIB),
    )


def round_result(
    number: int,
    times: Sequence[float] = (),
    *,
    memory: MemoryPeaks | None = None,
    planned: int = 0,
    recomputed: int = 0,
    without_grad: int = 0,
    diff: float | None = 0.0,
    retries: int | None = None,
) -> RoundResult:
    return RoundResult(
        round=number,
        memory=memory,
        step_times_s=tuple(times),
        layers_run=12,
        layers_planned=planned,
        layers_recomputed=recomputed,
        params_without_grad=without_grad,
        grad_checksum="a1b2c3",
        grad_rel_diff=diff,
        grad_worst_param=None,
        num_alloc_retries=retries,
        num_steps=len(times) + 2,
        steps_s=sum(times),
        wall_s=sum(times) + 0.5,
    )


def outcome(
    strategy: str,
    memory: MemoryPeaks | None = None,
    times: Sequence[Sequence[float]] = (),
    *,
    work: Workload | None = None,
    checkpointed: int | None = None,
    recomputed: int | None = None,
    without_grad: int = 0,
    diffs: Sequence[float | None] | None = None,
    failure: tuple[FailureKind, str] | None = None,
    retries: int | None = None,
) -> Outcome:
    """A cell with one round per entry of `times` (samples in seconds); memory is measured in the first round."""
    layers = CHECKPOINTED.get(strategy, 12) if checkpointed is None else checkpointed
    rounds = tuple(
        round_result(
            number,
            samples,
            memory=memory if number == 0 else None,
            planned=layers,
            recomputed=layers if recomputed is None else recomputed,
            without_grad=without_grad,
            diff=0.0 if diffs is None else diffs[number],
            retries=retries,
        )
        for number, samples in enumerate(times)
    )
    return Outcome(
        cell=Cell(workload=work or workload(), strategy=strategy),
        layers_checkpointed=layers,
        rounds=rounds,
        failure=Failure(kind=failure[0], message=failure[1]) if failure else None,
    )


def steady(seconds: float, rounds: int = 3, spread: float = 0.02) -> tuple[tuple[float, ...], ...]:
    """Three samples in each of `rounds` rounds, whose medians rise by `spread` in all around `seconds`."""
    drift = [spread * (number / max(rounds - 1, 1) - 0.5) for number in range(rounds)]
    return tuple(tuple(seconds * (1 + part) * factor for factor in (1.0, 0.995, 1.01)) for part in drift)


def report(*outcomes: Outcome, device_name: str = "Example CPU", **changes: object) -> Report:
    """A report of these outcomes; `changes` replace its other fields."""
    first = outcomes[0].cell.workload if outcomes else workload()
    values: dict[str, object] = {
        "schema": SCHEMA,
        "gcbench_version": "0.1.0",
        "command": f"gcbench run --model {first.model} --device {first.device}",
        "created": "2026-11-02T10:00:00+00:00",
        "settings": {"model": first.model, "rounds": 3, "seed": 0, "threads": 8},
        "machine": Machine(
            device=first.device,
            device_name=device_name,
            device_memory_bytes=16 * 1024 * MIB,
            platform="Linux-6.1-x86_64",
            versions={"python": "3.11.4", "torch": "2.13.0", "transformers": "5.23.0"},
            settings={"threads": "8"},
        ),
        "model": ModelFacts(
            model=first.model,
            model_type="gpt2",
            num_params=124_439_808,
            num_layers=12,
            max_seq_len=1024,
            attn_implementation="sdpa",
            checkpointing_refusal=None,
        ),
        "outcomes": outcomes,
    }
    return Report(**(values | changes))  # type: ignore[arg-type]  # the builder is for tests, which fail on a wrong name


OUT_OF_MEMORY: tuple[FailureKind, str] = (
    "oom",
    "the step needs more than the 16 GiB of this device; try a smaller batch, or checkpoint more layers",
)


def mixed_report() -> Report:
    """Two batches on a CPU: one where everything is measured, one with an out-of-memory and a broken strategy."""
    small, large = workload(batch=8), workload(batch=32, seq=256)
    return report(
        outcome("off", peaks(2310, 2480, 2290, process=3100), steady(0.512, spread=0.01), work=small),
        outcome("per-layer", peaks(1420, 1730, 2290, process=2900), steady(0.648, spread=0.03), work=small),
        outcome("every:2", peaks(1800, 2110, 2290, process=2950), steady(0.583), work=small),
        outcome("off", work=large, failure=OUT_OF_MEMORY),
        outcome("per-layer", peaks(6_420, 7_730, 2290, process=8100), steady(9.3), work=large, diffs=[None] * 3),
        outcome(
            "every:2",
            peaks(9_420, 10_730, 2290, process=11_100),
            steady(8.1),
            work=large,
            recomputed=5,
            diffs=[None] * 3,
        ),
        notices=("attention: sdpa, the model's own choice",),
    )


def long_report():
    """A GPU run of one workload with twelve layers' worth of strategies, one of them with a long name."""
    work = workload(model="meta-llama/Llama-3.2-1B", device="cuda:0", precision="bf16", batch=4, seq=2048)
    return report(
        outcome("off", peaks(30_100, 33_210, 12_000, reserved=34_000), steady(1.234, rounds=8), work=work),
        outcome(
            "per-layer", peaks(11_000, 14_100, 12_000, reserved=15_000), steady(1.601, rounds=8), work=work, retries=2
        ),
        outcome(
            "segment:4+offload:boundaries",
            peaks(12_000, 15_432, 12_000, reserved=16_000),
            steady(1.712, rounds=8),
            work=work,
            diffs=[0.001] * 8,
        ),
        device_name="Example H200",
    )
