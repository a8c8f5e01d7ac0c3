"""A model that `--layers` or `--set` changed is never shown under the name of the unchanged one."""

from __future__ import annotations

import csv
import io
import json

import pytest
from fixtures_report import mixed_report

from gcbench.core import model_changes
from gcbench.report import compare, report_file, sentences
from gcbench.report import rows as tables

TOLD = "num_hidden_layers=2, hidden_size=64"
SMALL = ("--layers", 2, "--set", "hidden_size=64", "--seq-len", 16, "-b", 2)


def test_changes_are_described():
    assert model_changes.describe(None, None) is None and model_changes.describe(None, {}) is None
    assert model_changes.describe(6, None) == "num_hidden_layers=6"
    assert model_changes.describe(2, {"hidden_size": 64, "tie": True, "act": "gelu"}) == (
        "num_hidden_layers=2, hidden_size=64, tie=true, act=gelu"
    )
    assert model_changes.named("llama", None) == "llama"
    assert model_changes.named("llama", "a=1") == "llama with a=1"


@pytest.mark.parametrize("command", ["predict", "plan", "check", "run"])
def test_every_command_names_what_was_changed(cli, model, tmp_path, command):
    """The trap: a relative of 180 K parameters under the heading `llama-3.2-1b · batch 2 × 64 tokens`."""
    more = {
        "run": ("--strategies", "off", "--rounds", 1, "--steps", 1),
        "check": ("--strategies", "per-layer", "--precision", "fp32", "--no-compile"),
    }.get(command, ("--strategies", "off"))
    device = "rtx-4090" if command == "plan" else "cpu"  # a card needs no timing of operators
    done = cli(command, "-m", model(), *SMALL, "--device", device, *more, "--out", tmp_path / "out")
    assert done.code == 0, done.err
    assert f"llama with {TOLD} · " in done.out.splitlines()[0], done.out.splitlines()[0]
    texts = list((tmp_path / "out").glob("*.md"))
    assert texts and all(f"llama with {TOLD}" in path.read_text().splitlines()[0] for path in texts)
    if command in ("predict", "run"):
        (row,) = csv.DictReader(io.StringIO((tmp_path / "out" / "table.csv").read_text()))
        assert row["model_changes"] == TOLD and row["model"].endswith("llama")


def stored(changed):
    whole = mixed_report()
    document = json.loads(json.dumps(report_file.encode(whole)))
    document["settings"] |= {"layers": 4, "set": None} if changed else {}
    for outcome in document["outcomes"]:
        del outcome["cell"]["workload"]["model_changes"]
    return document


def test_the_model_of_an_older_report_is_described_too(tmp_path):
    """Its cells do not record the changes, but its settings do."""
    (tmp_path / "report.json").write_text(json.dumps(stored(changed=True)))
    loaded = report_file.load(tmp_path)
    assert {row.model_changes for row in tables.rows(loaded)} == {"num_hidden_layers=4"}
    assert sentences.model_of(loaded) == "gpt2 with num_hidden_layers=4"


def test_compare_names_what_was_changed_and_where(tmp_path):
    sides = []
    for name, changed in (("a", False), ("b", True)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text(json.dumps(stored(changed)))
        sides.append(report_file.load(tmp_path / name))
    one = compare.compare(*sides, force=False).changes[0]
    assert one.name == "gpt2 (A with no changes; B with num_hidden_layers=4)"
    same = compare.compare(sides[1], sides[1], force=False).changes[0]
    assert same.cell.startswith("gpt2 with num_hidden_layers=4 · batch ")
