"""Stored plans and checks: rendered in any format, exported again, compared, and refused when damaged."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT
from processes import PROCESS_TIMEOUT_S

from gcbench.check.cases import Check, CheckResult, CheckSetting, Combination
from gcbench.check.stored import load_check
from gcbench.core.errors import ResultsError, UsageError
from gcbench.core.json_codec import encode
from gcbench.core.model_changes import ChangedConfig
from gcbench.core.records import Machine, ModelFacts
from gcbench.core.units import GIB
from gcbench.devices.target import Target
from gcbench.job.settings import Settings
from gcbench.plan import compare as compare_plans
from gcbench.plan import session as plan_session
from gcbench.plan import view
from gcbench.plan.decision import Candidate, Decision, Largest, MemoryLever
from gcbench.plan.planned import PlanResult
from gcbench.plan.stored import load_plan, save_plan
from gcbench.report.run_folder import Store
from gcbench.strategies import Plan, parse

LAYERS = 4


def candidate(strategy="off", batch=4, peak=10.0, rate=1000.0, **changes):
    plan = parse(strategy).plan_for(LAYERS)
    fields = {
        "strategy": strategy, "plan": plan, "batch_size": batch, "peak_bytes": int(peak * GIB),
        "allocated_bytes": int(peak * GIB), "peak_phase": "backward", "fits": peak < 20, "step_time_s": 1.0,
        "tokens_per_s": rate,
    }  # fmt: skip
    return Candidate(**(fields | changes))


def planned(*candidates, **changes):
    found = candidates or (candidate(), candidate("per-layer", peak=5.0, rate=800.0), candidate("every:2", peak=30.0))
    choice = next((each for each in found if each.fits), None)
    decision = Decision(
        limit_bytes=24 * GIB, usable_bytes=20 * GIB, reserve_frac=0.05, choice=choice,
        smallest=None if choice else found[0], candidates=found, largest=(Largest(strategy="off", batch_size=4),),
        levers=(MemoryLever(name="a leaner thing", flag=None, peak_bytes=GIB, fits=True),), peak_words="backward phase",
        binding="Memory binds.", times_from="rates", notices=("A notice.",),
    )  # fmt: skip
    made = PlanResult(
        settings=Settings(model="llama-3.2-1b", batch_size=(1,), precision="bf16"),
        seq_len=1024,
        target=Target(kind="cuda", name="rtx-4090", memory_bytes=24 * GIB),
        machine=Machine(device="cpu", device_name="Some CPU", device_memory_bytes=GIB, platform="Linux"),
        facts=ModelFacts(
            model="llama-3.2-1b", model_type="llama", num_params=10, num_layers=LAYERS, max_seq_len=None,
            attn_implementation="sdpa", checkpointing_refusal=None,
        ),
        decision=decision,
        command="gcbench plan -m llama-3.2-1b",
        created="2026-01-01T00:00:00+00:00",
        hub_id="meta-llama/Llama-3.2-1B",
        stored_where="Some Card",
    )  # fmt: skip
    return replace(made, **changes)


@pytest.fixture
def folder(tmp_path):
    plan_session.publish(planned(), Store.create(tmp_path / "p"))
    return tmp_path / "p"


def test_a_plan_is_read_as_it_was_stored(folder):
    """The traps: policies, tuples and None, which JSON does not tell apart; a folder that was moved."""
    loaded = load_plan(folder)
    assert loaded == replace(planned(), plan_file=folder / "plan.json")
    moved = folder.rename(folder.with_name("moved"))
    assert load_plan(moved).plan_file == moved / "plan.json"
    assert load_plan(moved / "planned.json") == load_plan(moved / "decision.json")
    changed = planned(
        settings=Settings(model="m", batch_size=(1,), layers=2),
        changed=ChangedConfig(fields={"a": [1]}, keeps_weights=True),
    )
    save_plan(changed, folder.with_name("c"))
    assert load_plan(folder.with_name("c")) == changed


def test_a_stored_plan_is_shown_in_every_format(cli, folder, tmp_path):
    expected = view.text(planned(plan_file=folder / "plan.json"), width=200)
    assert cli("report", folder).out.split() == expected.split()
    assert cli("report", folder, "-f", "markdown").out == (folder / "plan.md").read_text()
    rows = cli("report", folder, "--json").rows
    assert set(rows) == {"off", "per-layer", "every:2"} and rows["off"]["is_choice"]
    table = list(csv.DictReader(io.StringIO(cli("report", folder, "-f", "csv").out)))
    assert [row["strategy"] for row in table] == ["off", "per-layer", "every:2"]
    assert {str(value) for value in rows["off"].values() if value is not None} >= {"off", "4"}
    drawn = cli("report", folder, "-f", "png", "--out", tmp_path / "pictures")
    assert Path(drawn.out.strip()).stat().st_size > 10_000
    assert cli("report", folder, "-f", "markdown", "--out", tmp_path / "x.md").code == 0
    assert (tmp_path / "x.md").read_text() == (folder / "plan.md").read_text()


def test_a_stored_plan_is_handed_over_to_any_tool_without_torch(folder, tmp_path):
    """No new planning: nothing is imported that could plan, and nothing is stored."""
    probe = (
        "import sys\nfrom gcbench.cli import app as cli\n"
        f"sys.argv = ['gcbench', 'plan', '--from', {str(folder)!r}, '--emit', 'trl', '-q']\n"
        "try:\n    cli.main()\nfinally:\n"
        "    assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, cwd=tmp_path, timeout=PROCESS_TIMEOUT_S,
        check=False, env={"PYTHONPATH": str(ROOT), "PATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    compile(done.stdout, "emitted", "exec")
    assert "SFTConfig(" in done.stdout and '"meta-llama/Llama-3.2-1B"' in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"p"}


def test_a_stored_plan_in_which_nothing_fits_exits_with_1(cli, tmp_path):
    plan_session.publish(planned(candidate(peak=23.5)), Store.create(tmp_path / "p"))
    done = cli("plan", "--from", "p", "--emit", "trl")
    assert (done.code, done.out) == (1, "")
    assert "error: nothing fits into 22.80 GiB (5.0 % of 24.00 GiB held back)" in done.err
    assert "take --reserve 2%, with which off at batch 4 fits" in done.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--batch", 4), "--batch: p is a stored plan, which is taken as it is; leave the flag out"),
        (("--reserve", "1%"), "--reserve: p is a stored plan"),
        (("--precision", "fp32"), "--precision: a stored run or plan has its own; leave it out"),
        (("--emit", "torchtitan", "--layers", 2), "--layers: a stored run or plan has its own; leave it out"),
    ],
)
def test_options_that_a_stored_plan_cannot_serve_are_refused(cli, folder, flags, message):
    cli("plan", "--from", "p", *flags).refused(2, message)


def check_of(verdict="identical"):
    return Check(
        model="gpt2", command="gcbench check", device="cpu", versions={"torch": "2"}, scaled=None, num_params=3,
        num_layers=2, combinations=(Combination(setting=CheckSetting(), strategy="per-layer"),),
        results=(CheckResult(number=0, verdict=verdict, grad_rel_diff=0.0),),
    )  # fmt: skip


def test_a_stored_check_is_shown(cli, tmp_path):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "check.json").write_text(json.dumps(encode(check_of())))
    assert "1 of 1 combination trains with the gradients of off, bit-identical." in cli("report", "c").out
    assert cli("report", "c", "-f", "markdown").out.startswith("# gcbench check: gpt2\n")
    (row,) = cli("report", "c/check.json", "--json").document["rows"]
    assert (row["strategy"], row["verdict"]) == ("per-layer", "identical")
    assert cli("report", "c", "-f", "csv").out.splitlines()[0].startswith("model,strategy,precision,")
    cli("report", "c", "-f", "png").refused(2, "a check has no plots")
    cli("compare", "c", "c").refused(2, "is a check, which has no figures to compare")


BROKEN = {
    "planned.json": ["", "{", "[]", "{}", '{"schema": 1}', '{"schema": 99}', "[" * 100_000],
    "check.json": ["", "[]", "{}", '{"schema": 99, "combinations": [], "results": []}'],
    "decision.json": ["{}"],
}


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in BROKEN.items() for text in texts])
def test_a_broken_file_is_one_sentence(cli, tmp_path, name, text):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / name).write_text(text)
    cli("report", "x").refused(4, "x")
    if name != "check.json":
        cli("plan", "--from", "x", "--emit", "trl").refused(4, "x")


def test_a_check_whose_results_name_no_combination_is_damaged(tmp_path):
    damaged = replace(check_of(), combinations=())
    (tmp_path / "check.json").write_text(json.dumps(encode(damaged)))
    with pytest.raises(ResultsError, match="a result belongs to no combination"):
        load_check(tmp_path)


# Two plans


def test_two_plans_are_compared_setting_by_setting(cli, folder, tmp_path):
    other = planned(candidate(peak=12.0), candidate("per-layer", peak=5.0), candidate("off", 8, peak=15.0))
    plan_session.publish(other, Store.create(tmp_path / "q"))
    done = cli("compare", "p", "q", "--json")
    rows = {(row["strategy"], row["batch_size"]): row for row in done.document["rows"]}
    assert rows["off", 4]["memory_change_frac"] == pytest.approx(0.2)
    assert rows["off", 4]["is_choice_a"] and rows["off", 4]["is_choice_b"]
    assert rows["off", 8]["peak_a_bytes"] is None and rows["off", 8]["memory_change_frac"] is None
    shown = cli("compare", "p", "q").out
    assert "A: llama-3.2-1b · 1024 tokens" in shown and "+20 %" in shown
    assert cli("compare", "p", "q", "--fail-on", "memory:1%").code == 1
    assert cli("compare", "q", "p", "--fail-on", "memory:1%").code == 0
    cli("compare", "p", "p", "--fail-on", "time:1%", "--json").refused(2, "a plan's times are estimates")


def test_a_threshold_of_time_needs_times(cli):
    predicted = ROOT / "results" / "reference" / "llama-8b-rtx-4090"
    cli("compare", predicted, predicted, "--fail-on", "memory:1%,time:5%").refused(2, "has no times", "compare runs")
    assert cli("compare", predicted, predicted, "--fail-on", "memory:1%").code == 0


def test_plans_that_have_nothing_in_common_are_not_compared():
    small = planned(settings=Settings(model="llama-3.2-1b", batch_size=(1,), layers=2))
    with pytest.raises(UsageError, match="with num_hidden_layers=2"):
        compare_plans.compare(planned(), small, force=False)
    assert compare_plans.compare(planned(), small, force=True)
    with pytest.raises(UsageError, match="no setting in common"):
        compare_plans.compare(planned(), planned(candidate(batch=64)), force=False)


def test_a_lower_bound_is_no_change():
    bound = planned(candidate(), candidate("every:2", peak=35.0, is_lower_bound=True))
    changes = compare_plans.compare(planned(), bound, force=False)
    (one,) = [each for each in changes if each.strategy == "every:2"]
    assert one.memory_change_frac is None and one.peak_is_lower_bound
    assert Plan(num_layers=LAYERS) == bound.decision.candidates[0].plan
