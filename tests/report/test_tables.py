"""Rows: figures relative to `off`, the proof, and what a row must not claim."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import pytest
from fixtures_report import OUT_OF_MEMORY, mixed_report, outcome, peaks, report, round_result, steady, workload

from gcbench.core.records import Cell, Outcome, Row
from gcbench.core.units import MIB
from gcbench.report import rows as tables

OFF_PEAKS = peaks(400, 500, 300)
HALF_PEAKS = peaks(200, 250, 240)


def off(**changes):
    return outcome("off", OFF_PEAKS, steady(0.5, spread=0.0), **changes)


def row_of(*outcomes, strategy="per-layer"):
    return next(row for row in tables.rows(report(*outcomes)) if row.strategy == strategy)


def test_columns_are_the_documented_ones_in_their_order():
    """Scripts read columns by name and position; new ones go at the end."""
    documented = [
        *("model", "strategy", "status", "device", "batch_size", "seq_len", "precision", "optim"),
        *("attn_implementation", "num_params", "num_layers", "layers_checkpointed", "peak_allocated_bytes"),
        *("peak_reserved_bytes", "peak_process_bytes", "peak_phase", "step_time_s", "step_time_low_s"),
        *("step_time_high_s", "tokens_per_s", "memory_saved_frac", "time_overhead_frac", "grad_rel_diff"),
        *("source", "message"),
    ]
    assert list(tables.columns()[: len(documented)]) == documented
    assert tables.columns() == tuple(f.name for f in fields(Row))


def test_a_row_has_the_figures_of_its_cell_and_what_it_saves():
    row = row_of(off(), outcome("per-layer", HALF_PEAKS, steady(0.625, spread=0.0)))
    assert (row.status, row.source, row.message, row.proof) == ("ok", "measured", None, "identical")
    assert row.peak_allocated_bytes == 250 * MIB
    assert row.peak_phase == "backward"
    assert row.memory_saved_frac == pytest.approx(0.5)
    assert row.time_overhead_frac == pytest.approx(0.25)
    assert row.step_time_s == pytest.approx(0.625)
    assert row.tokens_per_s == pytest.approx(16 * 64 / 0.625)
    assert (row.layers_checkpointed, row.layers_recomputed) == (12, 12)
    assert (row.peak_forward_bytes, row.peak_optimizer_bytes) == (200 * MIB, 240 * MIB)
    assert (row.peak_reserved_bytes, row.peak_process_bytes) == (None, None)


def test_rows_have_the_order_of_the_outcomes():
    strategies = [row.strategy for row in tables.rows(mixed_report())]
    assert strategies == ["off", "per-layer", "every:2"] * 2


def test_off_saves_nothing_and_costs_nothing():
    row = row_of(off(), strategy="off")
    assert (row.memory_saved_frac, row.time_overhead_frac) == (0.0, 0.0)
    assert (row.time_overhead_low_frac, row.time_overhead_high_frac) == (0.0, 0.0)


def test_memory_is_read_from_the_round_that_measured_it():
    """Later rounds only time; taking the last round's memory would lose it."""
    late = Outcome(
        cell=Cell(workload=workload(), strategy="per-layer"),
        layers_checkpointed=12,
        rounds=(round_result(0, [0.6], recomputed=12), round_result(1, [0.6], recomputed=12, memory=HALF_PEAKS)),
    )
    assert row_of(off(), late).peak_allocated_bytes == 250 * MIB


def test_savings_are_against_off_of_the_same_workload():
    small, large = workload(batch=1), workload(batch=4)
    found = tables.rows(
        report(
            outcome("off", peaks(100, 200, 50), steady(0.1), work=small),
            outcome("off", peaks(300, 800, 50), steady(0.4), work=large),
            outcome("per-layer", peaks(100, 200, 50), steady(0.1), work=large),
        )
    )
    assert found[2].memory_saved_frac == pytest.approx(0.75)
    assert found[2].time_overhead_frac == pytest.approx(-0.75, abs=0.01)


def test_without_off_there_is_no_saving_and_no_reference():
    row = row_of(outcome("per-layer", HALF_PEAKS, steady(0.6), diffs=[None] * 3))
    assert (row.memory_saved_frac, row.time_overhead_frac, row.grad_noise_floor) == (None, None, None)
    assert row.proof == "no reference"
    assert row.peak_allocated_bytes == 250 * MIB


def test_a_failed_cell_retains_what_was_measured():
    row = row_of(
        off(), outcome("per-layer", HALF_PEAKS, steady(0.6, rounds=1), failure=("killed", "the kernel took it"))
    )
    assert (row.status, row.message) == ("killed", "the kernel took it")
    assert row.peak_allocated_bytes == 250 * MIB
    assert row.step_time_s is not None


def test_a_cell_that_never_ran_has_no_figures_and_no_proof():
    row = row_of(off(), outcome("per-layer", failure=OUT_OF_MEMORY))
    assert row.status == "oom"
    unknown = (row.peak_allocated_bytes, row.peak_phase, row.step_time_s, row.tokens_per_s, row.proof)
    assert unknown == (None,) * 5
    assert (row.layers_recomputed, row.memory_saved_frac, row.grad_rel_diff) == (None,) * 3


def test_a_cell_that_the_run_never_reached_is_reported():
    assert "ended before this cell" in str(row_of(off(), outcome("per-layer")).message)


def test_fewer_layers_recomputed_than_planned_fails_the_proof():
    row = row_of(off(), outcome("per-layer", HALF_PEAKS, steady(0.6), recomputed=11))
    assert row.proof == "FAILED: recomputed 11 of 12 layers"
    assert (row.memory_saved_frac, row.time_overhead_frac, row.time_overhead_low_frac) == (None, None, None)
    assert "no saving is shown" in str(row.message)
    assert row.peak_allocated_bytes == 250 * MIB


@pytest.mark.parametrize(
    ("counts", "fewest", "why"),
    [
        ((12, 0, 12), 0, "recomputed 0 of 12 layers in one round and 12 in another"),
        ((12, 13, 12), 12, "recomputed 12 of 12 layers in one round and 13 in another"),
    ],
)
def test_rounds_that_disagree_fail_the_proof_with_the_smallest_count(counts, fewest, why):
    """One lucky round must not cover for another, nor the smallest count for a larger one."""
    rounds = tuple(
        round_result(number, [0.6], planned=12, recomputed=count, memory=None if number else HALF_PEAKS)
        for number, count in enumerate(counts)
    )
    uneven = Outcome(cell=Cell(workload=workload(), strategy="per-layer"), layers_checkpointed=12, rounds=rounds)
    row = row_of(off(), uneven)
    assert row.layers_recomputed == fewest
    assert row.proof == f"FAILED: {why}"


def test_layers_that_training_never_runs_are_not_missed_in_the_proof():
    """The trap: a multimodal model owns vision layers; a plan over all layers would never be fulfilled on text."""
    rounds = (replace(round_result(0, [0.6], planned=2, recomputed=2, memory=HALF_PEAKS), layers_run=2),)
    multimodal = Outcome(cell=Cell(workload=workload(), strategy="per-layer"), layers_checkpointed=29, rounds=rounds)
    row = row_of(off(), multimodal)
    assert (row.layers_recomputed, row.layers_checkpointed, row.num_layers) == (2, 2, 2)
    assert row.proof == "identical"


def test_a_parameter_that_lost_its_gradient_fails_the_proof():
    row = row_of(off(without_grad=1), outcome("per-layer", HALF_PEAKS, steady(0.6), without_grad=3))
    assert row.proof == "FAILED: 2 parameters got no gradient"


def test_parameters_that_off_leaves_out_too_are_no_fault():
    """Experts that no token reached, or a frozen vision tower, have no gradient with any strategy."""
    row = row_of(off(without_grad=3), outcome("per-layer", HALF_PEAKS, steady(0.6), without_grad=3))
    assert row.proof == "identical"


@pytest.mark.parametrize(
    ("precision", "diff", "proof"),
    [
        ("fp32", 2.3e-7, "within noise"),
        ("fp32", 2.5e-7, "FAILED: the gradients differ from off by 2.5e-07"),
        ("bf16", 0.0156, "within noise"),
        ("bf16-mixed", 0.0157, "FAILED: the gradients differ from off by 0.016"),
        ("fp16-mixed", 0.00195, "within noise"),
        ("fp16-mixed", 0.00196, "FAILED: the gradients differ from off by 0.002"),
        ("fp32", math.inf, "FAILED: the gradients differ from off by inf"),
    ],
)
def test_a_difference_is_judged_by_four_roundoffs_where_kernels_are_deterministic(precision, diff, proof):
    work = workload(precision=precision)
    mine = outcome("per-layer", HALF_PEAKS, steady(0.6), work=work, diffs=[0.0, diff, 0.0])
    row = row_of(outcome("off", OFF_PEAKS, steady(0.5), work=work), mine)
    assert row.proof == proof
    assert row.grad_rel_diff == diff
    assert (row.memory_saved_frac is None) == proof.startswith("FAILED")


def test_a_difference_is_judged_by_twice_what_off_itself_varies():
    noisy = off(diffs=[0.0, 1e-5, 2e-5])
    accepted = row_of(noisy, outcome("per-layer", HALF_PEAKS, steady(0.6), diffs=[3.9e-5] * 3))
    refused = row_of(noisy, outcome("per-layer", HALF_PEAKS, steady(0.6), diffs=[4.1e-5] * 3))
    assert accepted.grad_noise_floor == 2e-5
    assert accepted.proof == "within noise"
    assert str(refused.proof).startswith("FAILED")
    itself = row_of(noisy, strategy="off")
    assert (itself.proof, itself.grad_rel_diff) == ("within noise", 2e-5)


def test_one_round_of_off_knows_no_noise_floor():
    """Its own difference is 0.0 by definition, which is not a measured floor."""
    row = row_of(
        outcome("off", OFF_PEAKS, steady(0.5, rounds=1)), outcome("per-layer", HALF_PEAKS, steady(0.6, rounds=1))
    )
    assert row.grad_noise_floor is None


@pytest.mark.parametrize("diffs", [[math.nan, 0.0, 0.0], [0.0, 0.0, math.nan]])
def test_gradients_that_are_not_numbers_fail_the_proof(diffs):
    """NaN compares False with everything, so max() and <= would let it through."""
    row = row_of(off(), outcome("per-layer", HALF_PEAKS, steady(0.6), diffs=diffs))
    assert row.proof == "FAILED: the gradients are not numbers"
    assert row.memory_saved_frac is None


def test_a_baseline_that_fails_its_proof_gives_no_savings():
    """If `off` recomputed layers, it is not `off`."""
    row = row_of(off(recomputed=2), outcome("per-layer", HALF_PEAKS, steady(0.6)))
    assert (row.memory_saved_frac, row.time_overhead_frac) == (None, None)


def test_allocator_retries_are_a_warning_beside_the_figures():
    row = row_of(off(), outcome("per-layer", HALF_PEAKS, steady(0.6), retries=3))
    assert row.status == "ok"
    assert row.message == (
        "the allocator had to flush and retry 3 times: timings are pessimistic and the setting is near out of memory"
    )


def test_rows_group_by_workload_in_order():
    groups = tables.by_workload(tables.rows(mixed_report()))
    assert [(w.batch_size, len(group)) for w, group in groups.items()] == [(8, 3), (32, 3)]
