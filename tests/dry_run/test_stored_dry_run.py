"""A dry run that was stored with --out, and shown again by report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from dry_runs import dry_run, observed
from typer.testing import CliRunner

from gcbench.cli.app import app
from gcbench.core.errors import ResultsError, UsageError
from gcbench.dry_run import view
from gcbench.dry_run.records import Verdict
from gcbench.dry_run.stored import load_dry_run

SEEN = dry_run(observed(), Verdict(ending="fits", sentence="it fits", exit_code=0))


def test_what_was_stored_is_loaded_with_nothing_lost(tmp_path: Path) -> None:
    (tmp_path / "dry-run.json").write_text(view.document(SEEN))
    assert load_dry_run(tmp_path) == SEEN
    assert load_dry_run(tmp_path / "dry-run.json") == SEEN


def test_report_shows_it_as_text_and_json_and_has_no_plots_of_it(tmp_path: Path) -> None:
    (tmp_path / "dry-run.json").write_text(view.document(SEEN))
    runner = CliRunner()
    assert "It fits." in runner.invoke(app, ["report", str(tmp_path)]).output
    again = runner.invoke(app, ["report", str(tmp_path / "dry-run.json"), "--format", "json"]).output
    assert json.loads(again) == json.loads(view.document(SEEN))
    refused = runner.invoke(app, ["report", str(tmp_path), "--format", "png"])
    assert isinstance(refused.exception, UsageError) or refused.exit_code == 2


@pytest.mark.parametrize("content", ["[]", '{"verdict": 1, "observed": null}'])
def test_a_damaged_one_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "dry-run.json").write_text(content)
    with pytest.raises(ResultsError, match="is damaged"):
        load_dry_run(tmp_path)


def test_two_dry_runs_are_not_compared(cli, tmp_path):
    (tmp_path / "dry-run.json").write_text(view.document(SEEN))
    cli("compare", tmp_path, tmp_path).refused(2, "is a dry run of one script", "pass two runs")
