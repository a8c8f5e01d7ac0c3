"""The sentences under a table, one case each, whole: a wrong word here is a wrong recommendation."""

from __future__ import annotations

import pytest
from fixtures_report import OUT_OF_MEMORY, outcome, peaks, report, steady, workload

from gcbench.report import rows as tables
from gcbench.report import sentences

GPU = workload(device="cuda:0")


def summary_of(*outcomes):
    """Return the summary of one workload, on a GPU so that it lacks the sentence about CPUs."""
    return sentences.summary(tables.rows(report(*outcomes)))


def cell(strategy, memory=None, seconds=None, *, spread=0.0, rounds=3, **changes):
    times = () if seconds is None else steady(seconds, rounds=rounds, spread=spread)
    return outcome(strategy, memory, times, work=GPU, **changes)


def off(memory=None, seconds=0.5, **changes):
    return cell("off", memory or peaks(900, 1000, 400), seconds, **changes)


def test_the_title_names_the_workload():
    assert sentences.title(workload()) == "gpt2 · batch 16 × 64 tokens · fp32 · adamw_torch · sdpa · cpu"
    without = sentences.title(workload(model="rwkv", attn=None, precision="bf16"), model=False)
    assert without == "batch 16 × 64 tokens · bf16 · adamw_torch · cpu"


def test_a_saving_that_ends_in_the_optimizer_step():
    assert summary_of(off(spread=0.01), cell("per-layer", peaks(400, 500, 590), 0.635, spread=0.04)) == (
        "per-layer saves 41 % of peak memory for 27 % more time (95 %: 22 to 32 %); the peak is now in the optimizer "
        "step, so checkpointing more will not help."
    )


def test_a_saving_whose_peak_stays_in_the_backward_pass():
    assert summary_of(off(), cell("per-layer", peaks(400, 590, 400), 0.635)) == (
        "per-layer saves 41 % of peak memory for 27 % more time (95 %: 27.0 to 27.0 %); the peak is still in the "
        "backward pass."
    )


def test_a_saving_whose_peak_moves_to_the_forward_pass():
    assert summary_of(off(), cell("per-layer", peaks(590, 500, 400), 0.635)).endswith(
        "; the peak is now in the forward pass."
    )


def test_an_interval_around_zero_shows_no_difference():
    assert summary_of(off(spread=0.01), cell("per-layer", peaks(400, 590, 400), 0.505, spread=0.05)) == (
        "per-layer saves 41 % of peak memory with no difference in time shown (95 %: −3.9 to 6.1 %); the peak is still "
        "in the backward pass."
    )


def test_less_time_is_reported_as_less():
    assert "for 20 % less time (95 %: " in summary_of(off(), cell("per-layer", peaks(400, 590, 400), 0.4))


@pytest.mark.parametrize("rounds", [1, 2])
def test_too_few_rounds_are_reported_in_place_of_an_interval(rounds):
    """The trap: "no difference in time shown (95 %: −100 to 3256277426 %)" for a setting that takes 20 % more."""
    single = outcome("off", peaks(900, 1000, 400), [[0.5], [0.51]][:rounds], work=GPU)
    other = outcome("per-layer", peaks(400, 590, 400), [[0.6], [0.6]][:rounds], work=GPU)
    found = summary_of(single, other)
    assert "more time (too few rounds for an interval; --rounds 3 gives one)" in found
    assert "no difference" not in found and "95 %" not in found


def test_no_strategy_is_called_cheaper_without_intervals():
    found = summary_of(
        off(rounds=2),
        cell("per-layer", peaks(400, 500, 590), 0.65, rounds=2),
        cell("every:2", peaks(500, 594, 590), 0.6, rounds=2),
    )
    assert "within 1 %" not in found


def test_memory_without_times_still_has_its_saving():
    assert summary_of(off(), outcome("per-layer", peaks(400, 590, 400), [[]], work=GPU)) == (
        "per-layer saves 41 % of peak memory at a time that was not measured against off; the peak is still in the "
        "backward pass."
    )


def test_no_saving_is_reported_where_the_optimizer_step_sets_the_peak_of_off():
    optimizer = peaks(300, 400, 700)
    assert summary_of(off(optimizer), cell("per-layer", optimizer, 0.6)) == (
        "No strategy saves memory: with this batch the peak is in the optimizer step, where checkpointing cannot "
        "help; raise the batch, or use a leaner optimizer."
    )


def test_no_saving_is_reported_where_another_phase_sets_the_peak():
    assert summary_of(off(), cell("segment:4", peaks(900, 1010, 400), 0.6)) == (
        "No strategy saves memory: off has a peak of 1000 MiB, in the backward pass, and none is below it."
    )


def test_the_subject_is_the_lowest_peak_not_the_first():
    assert summary_of(
        off(), cell("every:2", peaks(700, 800, 400), 0.55), cell("per-layer", peaks(400, 590, 400), 0.6)
    ).startswith("per-layer saves 41 %")


def test_a_cheaper_strategy_with_the_same_peak_is_named():
    found = summary_of(
        off(),
        cell("per-layer", peaks(400, 500, 590), 0.65),
        cell("every:2", peaks(500, 594, 590), 0.6),
        cell("every:4", peaks(500, 700, 590), 0.55),
    )
    assert found.endswith("every:2 comes within 1 % of the same peak for 20 % more time (95 %: 20.0 to 20.0 %).")


def test_of_equal_peaks_the_faster_is_the_subject_and_needs_no_second_sentence():
    found = summary_of(off(), cell("per-layer", peaks(400, 500, 590), 0.65), cell("every:2", peaks(500, 500, 590), 0.6))
    assert found.startswith("every:2 saves 41 % of peak memory for 20 % more time")
    assert "within 1 %" not in found


def test_a_strategy_that_is_not_shown_to_be_cheaper_is_not_named():
    """Overlapping intervals: naming the one that happens to have the lower centre would sell noise."""
    found = summary_of(
        off(spread=0.01),
        cell("per-layer", peaks(400, 500, 590), 0.61, spread=0.1),
        cell("every:2", peaks(500, 594, 590), 0.60, spread=0.1),
    )
    assert "every:2" not in found


def test_off_does_not_fit_and_another_does():
    assert summary_of(
        cell("off", failure=OUT_OF_MEMORY), cell("per-layer", peaks(400, 590, 400), 0.6, diffs=[None] * 3)
    ) == (
        "off does not fit in memory; per-layer does, with a peak of 590 MiB in the backward pass and steps of 600 ms."
    )


def test_off_does_not_fit_and_a_faster_one_fits_too():
    found = summary_of(
        cell("off", failure=OUT_OF_MEMORY),
        cell("per-layer", peaks(400, 590, 400), 0.6, spread=0.01),
        cell("every:2", peaks(700, 800, 400), 0.5, spread=0.01),
    )
    assert found.endswith("every:2 fits too, with a peak of 800 MiB and steps of 500 ms.")


def test_off_that_crashed_is_not_reported_as_too_large():
    found = summary_of(cell("off", failure=("crash", "boom")), cell("per-layer", peaks(400, 590, 400), 0.6))
    assert found == (
        "The lowest peak is that of per-layer: 590 MiB, in the backward pass. "
        "off crashed, so what checkpointing saves is unknown."
    )


def test_without_off_no_saving_is_reported():
    assert summary_of(cell("per-layer", peaks(400, 590, 400), 0.6)) == (
        "The lowest peak is that of per-layer: 590 MiB, in the backward pass. "
        "off was not measured, so what checkpointing saves is unknown; add off to the strategies."
    )


def test_only_off():
    assert summary_of(off()) == "Only off was measured; its peak is 1000 MiB, in the backward pass."


def test_only_off_because_the_others_failed():
    assert summary_of(
        off(), cell("per-layer", failure=("timeout", "60 s")), cell("every:2", failure=("timeout", "60 s"))
    ) == ("Only off was measured: per-layer and every:2 timed out; its peak is 1000 MiB, in the backward pass.")


def test_everything_out_of_memory():
    assert summary_of(cell("off", failure=OUT_OF_MEMORY), cell("per-layer", failure=OUT_OF_MEMORY)) == (
        "Nothing fits in memory; try a smaller batch, a shorter sequence or a leaner optimizer."
    )


def test_everything_failed_in_different_ways():
    found = summary_of(
        cell("off", failure=("crash", "x")),
        cell("per-layer", failure=("killed", "x")),
        cell("every:2", failure=OUT_OF_MEMORY),
        cell("every:4"),
        cell("segment:4", failure=("unsupported", "x")),
    )
    assert found == (
        "Nothing was measured: off crashed; per-layer was killed; every:2 ran out of memory; every:4 was not reached; "
        "segment:4 is not supported."
    )


def test_a_failed_proof_is_named_and_never_the_subject():
    """It has the lowest peak, because it did not do its work."""
    found = summary_of(
        off(), cell("per-layer", peaks(400, 590, 400), 0.6), cell("every:2", peaks(100, 200, 100), 0.5, recomputed=5)
    )
    assert found.startswith("per-layer saves 41 %")
    assert found.endswith("every:2 failed the proof (recomputed 5 of 6 layers), so its figures are not to be used.")


def test_several_failed_proofs_have_their_own_reasons():
    found = summary_of(
        off(),
        cell("per-layer", peaks(400, 590, 400), 0.6, recomputed=0),
        cell("every:2", peaks(400, 590, 400), 0.6, recomputed=5),
    )
    assert found == (
        "Only off was measured; its peak is 1000 MiB, in the backward pass. per-layer and every:2 failed the proof "
        "(per-layer: recomputed 0 of 12 layers; every:2: recomputed 5 of 6 layers), so their figures are not to be "
        "used."
    )


def test_off_that_fails_its_own_proof_is_no_baseline():
    found = summary_of(off(recomputed=3), cell("per-layer", peaks(400, 590, 400), 0.6))
    assert "saves" not in found.replace("checkpointing saves is unknown", "")
    assert "off failed the proof, so what checkpointing saves is unknown." in found


def test_cpu_figures_are_labelled_as_such():
    found = sentences.summary(tables.rows(report(outcome("off", peaks(900, 1000, 400), steady(0.5)))))
    assert found.endswith(
        "These are CPU figures: the memory of activations carries over to a GPU only roughly, and times do not."
    )
    nothing = sentences.summary(tables.rows(report(outcome("off", failure=OUT_OF_MEMORY))))
    assert "CPU" not in nothing


def test_intervals_read_well():
    assert sentences.interval(0.22, 0.33) == "22 to 33 %"
    assert sentences.interval(-0.03, 0.054) == "−3.0 to 5.4 %"
    assert sentences.interval(0.271, 0.274) == "27.1 to 27.4 %"
    assert sentences.interval(None, 0.1) is None
