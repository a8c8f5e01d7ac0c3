"""Dry runs to judge and show, without any process."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from gcbench.devices import cards
from gcbench.dry_run.process import Ended
from gcbench.dry_run.records import (
    Allocated,
    Cause,
    DryRun,
    Observed,
    OutOfMemory,
    Place,
    ScriptError,
    Step,
    Verdict,
    Workload,
    WouldFit,
)

MIB = 2**20
GIB = 2**30
CARD = cards.find("rtx-4090")
PLACE = Place(file="/home/me/train.py", line=7, function="main", text="loss.backward()")


def step(number: int, peak: int, **changes: Any) -> Step:
    return replace(
        Step(
            number=number,
            peaks={"forward": [peak - MIB, peak], "backward": [peak, peak + MIB], "optimizer": [MIB, peak]},
            backwards=1,
            checkpointed=0,
            recomputed=0,
            layers_checkpointed=0,
            layers_recomputed=0,
        ),
        **changes,
    )


def observed(**changes: Any) -> Observed:
    return replace(
        Observed(
            schema=1,
            pid=1,
            argv=("train.py",),
            torch="2.13.0+cu130",
            devices=(CARD.title,),
            context_bytes=420 * MIB,
            num_steps=3,
            first=step(1, GIB),
            later=step(2, 2 * GIB),
            later_peaks=step(2, 2 * GIB).peaks,
            unfinished=None,
            listed=((GIB, GIB), (2 * GIB, 2 * GIB), (2 * GIB, 2 * GIB)),
            outside={"start": [MIB, 2 * MIB]},
            by_card={"0": [2 * GIB, 2 * GIB + MIB]},
            evaluations=0,
            out_of_memory=(),
            num_out_of_memory=0,
            saved_files=(),
            reads=(),
            workload=Workload(
                batch_size=12,
                seq_len=512,
                model_class="LlamaForCausalLM",
                model_type="llama",
                causal_lm=True,
                config="/nowhere/config.json",
                dtype="bfloat16",
                optimizer="AdamW",
                fused=False,
                num_params=10,
                num_trainable=10,
                num_layers=4,
                attn_implementation="sdpa",
            ),
            stopped=None,
            failure=None,
            snapshot=None,
            snapshot_failed=None,
            checkpoint_reentrant=None,
        ),
        **changes,
    )


def out_of_memory(**changes: Any) -> OutOfMemory:
    return replace(
        OutOfMemory(
            number=1,
            device=0,
            requested=3 * GIB,
            limit=24 * GIB,
            free=GIB,
            allocated=20 * GIB,
            reserved=21 * GIB,
            phase="backward",
            done_steps=3,
            place=PLACE,
            library_place=None,
            alive=(
                Allocated(kind="parameters", bytes=5 * GIB, count=12),
                Allocated(
                    kind="by line", bytes=4 * GIB, count=32, file="/home/me/net.py", line=9, function="Net.forward"
                ),
            ),
        ),
        **changes,
    )


def error(kind: str, message: str, **changes: Any) -> ScriptError:
    return replace(
        ScriptError(
            type=kind,
            message=message,
            chain=(Cause(type=kind, message=message),),
            is_out_of_memory=False,
            is_interrupt=False,
            place=PLACE,
            libraries=(),
            files=(),
        ),
        **changes,
    )


def ended(*found: Observed, exit_code: int = 0, was_interrupted: bool = False, stacks: str = "") -> Ended:
    return Ended(exit_code=exit_code, was_interrupted=was_interrupted, observed=found, stacks=stacks)


def dry_run(found: Observed | None, verdict: Verdict, would_fit: WouldFit | None = None) -> DryRun:
    return DryRun(
        invocation="gcbench dry-run --device rtx-4090 -- python train.py",
        command=("python", "train.py"),
        created="2026-01-01T00:00:00+00:00",
        card=CARD,
        num_cards=1,
        observed=found,
        script_exit_code=0,
        verdict=verdict,
        would_fit=would_fit,
    )
