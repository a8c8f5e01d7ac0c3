"""Usable memory and predictions too close to call: the same reserve, figures and words in every command."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fixtures_predicted import CARD, cell, peaks, predicted_report, prediction
from fixtures_report import workload

from gcbench.core import headroom
from gcbench.core.errors import UsageError
from gcbench.core.units import GIB, MIB
from gcbench.report import predictions as predicted
from gcbench.report import rows as tables

LIMIT = 40 * 1024


def fitting(strategy, spare, *, reserve=0.05, limit=LIMIT):
    """A cell that leaves `spare` MiB of the card, of which a part is held back."""
    memory = peaks(900, 1000, 400, reserved=limit - spare - 400, process=limit - spare)
    said = replace(prediction(memory, limit=limit), reserve_frac=reserve)
    failure = ("oom", "needs more") if said.needed_bytes > said.usable_bytes else None
    return cell(strategy, said, failure=failure)


def rows(*cells):
    return {row.strategy: row for row in tables.rows(predicted_report(*cells))}


def summary(*cells):
    (group,) = predicted.by_workload(predicted_report(*cells)).values()
    return predicted.summary(group)


@pytest.mark.parametrize(
    ("needed", "reserve", "fit"),
    [
        (38.0, 0.05, "yes"),
        (38.01, 0.05, "in the reserve"),
        (38.01, 0.0, "yes"),
        (39.9, 0.0, "too close to tell"),
        (39.9, 0.05, "too close to tell"),
        (40.01, 0.0, "no"),
    ],
)
def test_whether_a_step_fits_a_card(needed, reserve, fit):
    given = {"limit_bytes": 40 * GIB, "reserve_frac": reserve, "reserved_bytes": int((needed - 0.5) * GIB)}
    assert headroom.classify_fit(int(needed * GIB), **given) == fit


def test_the_uncertainty_is_the_context_and_a_share_of_reserved_memory():
    assert headroom.uncertain_bytes(100 * GIB) == 267 * MIB + int(2.2 * GIB)
    assert headroom.uncertain_bytes(None) == 0, "on a CPU what is limited is what is predicted, to the byte"
    assert headroom.classify_fit(GIB, limit_bytes=GIB, reserve_frac=0.0, reserved_bytes=None) == "yes"


def test_a_cell_that_only_the_reserve_excludes_is_reported_with_a_reserve_that_fits():
    """The trap: `predict` says it fits, `plan` that nothing does, and nobody names the reserve."""
    said = summary(fitting("off", -9000), fitting("per-layer", 1946))
    assert said.startswith(
        "Nothing fits in 38.00 GiB (5.0 % of 40.00 GiB held back): per-layer comes nearest and needs 102 MiB more. "
        "Only the reserve is in the way: with --reserve 2% per-layer fits, with 1.90 GiB of headroom."
    )
    told = rows(fitting("off", -9000), fitting("per-layer", 1946))["per-layer"]
    assert (told.status, told.fits, told.spare_bytes) == ("oom", "in the reserve", 1946 * MIB)
    assert told.usable_bytes == 38 * GIB
    report = predicted_report(fitting("off", -9000), fitting("per-layer", 1946))
    assert "with --reserve 2% per-layer fits" in predicted.nothing_fits(report)


def test_the_cell_fits_with_the_suggested_reserve():
    for spare in (0, 1, 300, 500, 900, 1500, 2000):
        frac = headroom.smaller_reserve((LIMIT - spare) * MIB, limit_bytes=LIMIT * MIB, reserve_frac=0.05)
        assert frac is not None
        assert (LIMIT - spare) * MIB <= headroom.usable_bytes(LIMIT * MIB, frac)
    assert headroom.smaller_reserve(LIMIT * MIB + 1, limit_bytes=LIMIT * MIB, reserve_frac=0.05) is None
    assert headroom.smaller_reserve(38 * GIB, limit_bytes=LIMIT * MIB, reserve_frac=0.05) is None


@pytest.mark.parametrize("spare_mib", [0, 8, 700])
def test_headroom_below_the_uncertainty_is_not_called_enough(spare_mib):
    """The trap: "fits … nothing has to be recomputed" with 8 MiB of headroom, where the context alone may take more."""
    said = summary(fitting("off", spare_mib, reserve=0.0), fitting("per-layer", 8000, reserve=0.0))
    assert said.startswith("per-layer fits in 40.00 GiB, with 7.81 GiB of headroom.")
    assert "off is too close to tell, with" in said and "nothing has to be recomputed" not in said
    alone = summary(fitting("off", spare_mib, reserve=0.0))
    assert alone.startswith("Whether off fits in 40.00 GiB is too close to tell: it leaves ")
    assert "more than predicted" in alone and "nothing has to be recomputed" not in alone
    assert rows(fitting("off", spare_mib, reserve=0.0))["off"].fits == "too close to tell"


def test_a_cell_that_fits_without_the_reserve_is_reported_beside_one_that_fits():
    said = summary(fitting("off", 1700), fitting("per-layer", 8000))
    assert "off fits only without the reserve (5.0 % of 40.00 GiB)." in said


def test_nothing_fits_has_a_remedy_and_is_not_said_when_something_fits():
    report = predicted_report(fitting("off", -9000), fitting("per-layer", -100))
    told = predicted.nothing_fits(report)
    assert told.startswith("nothing fits into 38.00 GiB (5.0 % of 40.00 GiB held back), the nearest is per-layer with ")
    assert "; try a smaller batch" in told
    assert predicted.nothing_fits(predicted_report(fitting("off", -9000), fitting("per-layer", 9000))) is None
    unbound = cell("off", prediction(peaks(1, 2, 1)), work=workload(device="cpu"))
    assert predicted.nothing_fits(predicted_report(unbound)) is None
    failed = cell("every:2", None, work=CARD, failure=("unsupported", "cannot be traced"))
    assert predicted.nothing_fits(predicted_report(fitting("off", -9000), failed)) is None


@pytest.mark.parametrize("text", ["110%", "1", "lots", "-1%"])
def test_an_invalid_reserve_is_refused(text):
    with pytest.raises(UsageError, match=r"--reserve: .*; write"):
        headroom.parse_reserve(text)


def test_predict_takes_the_reserve_from_the_flag_or_the_file(cli, model, tmp_path):
    """On a CPU nothing is held back unless --reserve is set."""
    work = ("-m", model(), "--seq-len", 16, "--device", "cpu", "--strategies", "off", "-b", 2)
    peak = cli("predict", *work, "--json").rows["off"]["peak_allocated_bytes"]
    memory = ("--device-memory", f"{peak + 10}B")
    assert cli("predict", *work, *memory, "--json").rows["off"]["fits"] == "yes"
    held = cli("predict", *work, *memory, "--reserve", "5%", "--json")
    assert (held.code, held.rows["off"]["status"], held.rows["off"]["fits"]) == (1, "oom", "in the reserve")
    assert "only the reserve is in the way: with --reserve 0% off fits" in held.err
    (tmp_path / "run.toml").write_text('reserve = "5%"\n')
    assert cli("predict", *work, *memory, "--config", "run.toml", "--json").code == 1
    assert cli("predict", *work, *memory, "--config", "run.toml", "--reserve", "0", "--json").code == 0
