"""Explanations of predicted peaks: every sentence follows from the figures alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
from conftest import ROOT
from fixtures_predicted import LAYERS, card_report, cell, cpu_report, predicted_report, prediction
from fixtures_report import peaks

from gcbench.core.prediction import LayerShare, Lever
from gcbench.report import explanation as explained
from gcbench.report import predictions as predicted
from gcbench.report.formats import terminal

CHUNKS, EVERY, FUSED = "a loss computed in 8 chunks", "checkpointing every layer", "the fused optimizer"


def cells(report):
    """Those of the report's only workload."""
    (found,) = predicted.by_workload(report).values()
    return found


def levers(checkpointed=0, *, now=10_000, shares=None, tried=True, **gains):
    """The sentence for a cell of `now` MiB whose levers save so many MiB each."""
    names = {"chunks": CHUNKS, "every": EVERY, "fused": FUSED}
    peak_with = {names[name]: now - gain for name, gain in gains.items()}
    made = prediction(
        peaks(now, now, 100), shares=shares or {"logits and loss": 6100, "gradients": 3900}, levers=peak_with
    )
    (only,) = cells(predicted_report(cell("off", made, checkpointed=checkpointed)))
    return explained.lever_sentence(only, tried=tried)


def test_each_lever_is_listed_with_what_it_saves():
    """Also one that saves nothing."""
    assert levers(chunks=4198.4, every=10) == (
        "the logits take 61 % of the peak: a loss in 8 chunks saves 4.10 GiB, checkpointing more saves nothing"
    )


def test_less_than_half_a_percent_counts_as_no_saving():
    """The trap: a figure that rounding or a moved boundary makes, sold as a saving."""
    assert "checkpointing more saves nothing" in levers(every=49)
    assert "checkpointing every layer saves 51.00 MiB" in levers(every=51)
    assert "checkpointing more saves nothing" in levers(every=-49)
    assert "checkpointing every layer adds 51.00 MiB" in levers(every=-51)


def test_the_sentence_begins_with_the_memory_that_the_best_lever_reduces():
    """The trap: `the optimizer state takes 60 %`, followed by a lever that has nothing to do with it."""
    shares = {"optimizer state": 5500, "saved activations": 3000, "logits and loss": 1000, "temporaries": 500}
    assert levers(shares=shares, every=2900, chunks=900).startswith(
        "the saved activations take 30 % of the peak: checkp"
    )
    assert levers(shares=shares, fused=3000, chunks=900).startswith("temporaries take 5.0 % of the peak: the fused opt")
    assert levers(shares=shares, every=0).startswith("the optimizer state takes 55 % of the peak: checkpointing more")
    tied = levers(shares=shares, chunks=900, every=900)
    assert tied.startswith("the saved activations take 30 %"), "of two equal levers, the one whose kind is larger"


def test_a_cell_without_levers_gives_the_reason():
    assert levers(LAYERS) == (
        "the logits take 61 % of the peak, and no change that was tried reduces it: every layer is checkpointed"
    )
    assert levers(LAYERS, chunks=3000).endswith("saves 2.93 GiB; every layer is checkpointed already")
    assert levers(tried=False) is None, "levers that were not searched for are not levers that save nothing"


def test_levers_and_kinds_have_the_names_that_the_simulator_uses():
    """The trap: a lever renamed there falls silently out of the sentences here."""
    child = (ROOT / "gcbench/predict/worker.py").read_text(encoding="utf-8")
    assert f'"{EVERY}"' in child and f'"{FUSED}"' in child and "a loss computed in {CHUNKS} chunks" in child
    assert predicted.checkpointing_lever(prediction(peaks(1, 1, 1), levers={EVERY: 1})) == Lever(
        name=EVERY, peak_bytes=2**20
    )
    from gcbench.simulate.compose.block_kinds import KIND_NAMES

    names = {explained.kind_name(kind) for kind in KIND_NAMES.values()}
    assert set(explained._SUBJECTS) == names
    assert set(explained._MOVES.values()) <= names
    assert set(predicted._MODEL_STATE) <= set(KIND_NAMES.values())


@pytest.mark.parametrize(
    ("runs", "text"),
    [
        ([(0, 31, 32)], "layers 0 to 31: 32.00 MiB each"),
        ([(11, 11, 48)], "layer 11: 48.00 MiB"),
        ([(0, 0, 6), (1, 1, 9), (2, 2, 6), (3, 3, 9)], "layers 0 and 2: 6.00 MiB each; layers 1 and 3: 9.00 MiB each"),
        ([(k, k, 6 + k % 2) for k in range(12)], "layers 0, 2 … 10: 6.00 MiB each; layers 1, 3 … 11: 7.00 MiB each"),
        (
            [(0, 0, 6), (1, 3, 9), (4, 4, 6), (5, 7, 9)],
            "layers 0 and 4: 6.00 MiB each; 6 of the layers 1 to 7: 9.00 MiB each",
        ),
        (
            [(k, k, 10 + k) for k in range(8)],
            "from 10.00 MiB (layer 0) to 17.00 MiB (layer 7) each, 108 MiB in all",
        ),
        ([], ""),
    ],
)
def test_layers_that_save_the_same_amount_are_listed_together(runs, text):
    """The trap: a line per layer of a model of 126 layers, or one that hides that they differ."""
    shares = [LayerShare(first=first, last=last, nbytes=size * 2**20) for first, last, size in runs]
    assert explained.saved_text(shares) == text


def test_the_number_of_traced_layers_is_reported():
    made = prediction(peaks(1, 1, 1), layers_traced=3)
    assert explained.traced_text(made, 32) == "3 of 32 layers, which represent the rest"
    assert explained.traced_text(replace(made, layers_traced=32), 32) == "every layer"
    assert explained.traced_text(replace(made, why_in_full="layers share parameters"), 32) == (
        "every layer: layers share parameters"
    )


def test_small_shares_are_summed_up():
    shares = {"saved activations": 9000, "temporaries": 960, "gradients": 20, "boundaries": 20}
    report = predicted_report(cell("off", prediction(peaks(1, 10_000, 1), shares=shares)))
    (peak,) = explained.explanations(cells(report))
    assert [(share.kind, share.nbytes // 2**20) for share in peak.shares] == [
        ("saved activations", 9000),
        ("temporaries", 960),
        (explained.REST, 40),
    ]


def test_identical_cells_are_explained_once():
    same = prediction(peaks(1, 10, 1))
    report = predicted_report(*(cell(name, same, checkpointed=12) for name in ("per-layer", "every:1", "segment:1")))
    (peak,) = explained.explanations(cells(report))
    assert peak.heading.startswith("per-layer, every:1, segment:1: 10.00 MiB in the loss")


def test_memory_outside_the_trace_is_listed_once_with_its_source():
    text = terminal.render(card_report(explain=True), width=100)
    assert text.count("CUDA context: 400 MiB, outside the allocator") == 1
    assert text.count("measured by others: example.org/1") == 1
    assert "cuBLAS workspace: 8.00 MiB, in the allocator" in text
    assert explained.OUTSIDE_TRACE not in terminal.render(cpu_report(explain=True))


@pytest.mark.parametrize("kind", ["boundaries", "layer inputs"])
def test_kinds_of_older_reports_are_shown_under_their_present_names(kind):
    made = prediction(peaks(1, 1000, 1), shares={kind: 1000})
    (peak,) = explained.explanations(cells(predicted_report(cell("off", made))))
    assert [share.kind for share in peak.shares] == ["layer inputs"]
