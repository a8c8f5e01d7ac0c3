"""The report of a dry run, as text and JSON."""

from __future__ import annotations

import json
from dataclasses import replace

from dry_runs import dry_run, observed, out_of_memory, step

from gcbench.core import json_codec
from gcbench.dry_run import values, view
from gcbench.dry_run.records import Observed, Read, Stopped, Verdict, WouldFit

FITS = Verdict(ending="fits", sentence="it fits", exit_code=0)
DOES_NOT = Verdict(ending="does not fit", sentence="it does not fit", exit_code=1)


def text(found: Observed, verdict: Verdict = FITS, fitting: WouldFit | None = None) -> str:
    return view.text(dry_run(found, verdict, fitting), width=120)


def test_the_first_step_the_others_and_what_surrounds_them_have_rows():
    shown = text(observed(outside={"start": [1, 2], "evaluation": [3, 4], "save": [5, 6]}))
    for name in ("before the first step", "first step, forward", "steps 2 to 3, backward", "evaluation", "saving"):
        assert name in shown
    assert "emulated (nothing is computed)" in shown and "nvidia-smi, about" in shown


def test_rows_say_that_they_are_emulated():
    document = json.loads(view.document(dry_run(observed(), FITS)))
    row = next(row for row in document["rows"] if (row["step"], row["peak_phase"]) == ("later", "backward"))
    assert row["source"] == "emulated"
    assert row["peak_process_bytes"] == row["peak_reserved_bytes"] + 420 * 2**20
    assert document["verdict"]["ending"] == "fits"


def test_checkpointing_is_told_as_it_was_counted():
    assert "Gradient checkpointing is off" in text(observed())
    counted = {"checkpointed": 8, "recomputed": 6, "layers_checkpointed": 4, "layers_recomputed": 3}
    shown = text(observed(later=step(2, 2**31, **counted), checkpoint_reentrant=True))
    assert "is on, reentrant: 4 of 4 layers checkpointed, 3 really recomputed in a step" in shown


def test_out_of_memory_names_the_line_and_what_was_allocated():
    shown = text(observed(out_of_memory=(out_of_memory(),), num_out_of_memory=1), DOES_NOT)
    assert "at /home/me/train.py:7, main: loss.backward()" in shown
    assert "5.00 GiB  parameters, 12 blocks" in shown
    assert "4.00 GiB  from Net.forward (/home/me/net.py:9), 32 blocks" in shown


def test_what_would_fit_is_told_with_its_source():
    fitting = WouldFit(
        strategy="every:2",
        batch_size=4,
        peak_bytes=3 * 2**30,
        allocated_bytes=2**30,
        source="predicted",
        same_batch_strategy="per-layer",
        same_batch_peak_bytes=5 * 2**30,
    )
    shown = text(observed(), DOES_NOT, fitting)
    assert (
        "Checkpointing with every:2 at batch 4 with 3 times the gradient accumulation would need 3.00 GiB in all"
        in shown
    )
    assert "predicted by gcbench plan" in shown
    assert "Checkpointing with per-layer at its own batch 12 would need 5.00 GiB." in shown


def test_a_loop_that_was_ended_is_told():
    shown = text(observed(stopped=Stopped(why="endless", file="/home/me/train.py", line=3)))
    assert "the loop at /home/me/train.py:3 depends on a value" in shown


def test_saved_files_are_told_to_hold_nothing():
    assert "/home/me/a.pt and 1 other file: saved by the script" in text(
        observed(saved_files=("/home/me/a.pt", "/home/me/b.pt"))
    )


def test_a_report_that_was_never_made_has_a_verdict():
    shown = view.text(dry_run(None, Verdict(ending="unobserved", sentence="nobody saw it", exit_code=3)), width=80)
    assert shown.split("\n")[:2] == ["verdict", "  Nobody saw it."]


def test_only_reads_that_decide_something_are_told():
    base = Read(file="/home/me/t.py", line=1, kind="item", answer="1.0", count=3, library=None, condition=None)
    model = "/v/site-packages/transformers/models/moe/modeling_moe.py"
    reads = [
        base,
        replace(base, line=2, condition="while"),
        replace(base, line=3, kind="mask"),
        replace(base, line=4, kind="tolist", library="transformers", file=model),
        replace(base, line=5, kind="cpu", library="transformers", file="/v/site-packages/transformers/trainer.py"),
        replace(base, line=6, kind="bool", library="accelerate", condition="if"),
        replace(base, line=7, kind="tolist", answer="zeros"),
    ]
    assert [read.line for read, _ in values.told(reads)] == [2, 3, 7, 4]


def test_what_is_observed_is_read_back_as_it_was_written():
    found = observed(out_of_memory=(out_of_memory(),))
    assert json_codec.decode(Observed, json.loads(json.dumps(json_codec.encode(found)))) == found
