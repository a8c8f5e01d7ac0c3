"""`load`: a stored run or prediction as a data frame."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT
from fixtures_predicted import card_report
from fixtures_report import mixed_report

from gcbench.core.errors import ResultsError
from gcbench.core.units import MIB
from gcbench.report import formats, report_file
from gcbench.report import rows as tables
from gcbench.report.loaded import load

pandas = pytest.importorskip("pandas")


@pytest.fixture
def folder(tmp_path):
    report_file.save(mixed_report(), tmp_path)
    return tmp_path


def test_the_frame_has_a_row_per_cell_and_the_columns_of_the_csv(folder):
    frame = load(folder).to_frame()
    assert tuple(frame.columns) == tables.columns()
    assert list(frame["strategy"]) == [row.strategy for row in tables.rows(mixed_report())]


def test_columns_are_nullable():
    """The trap: one missing peak turns a column of bytes into floats."""
    assert set(map(str, load(ROOT / "tests/data/report-schema-1.json").to_frame().dtypes)) <= {
        *("Int64", "Float64", "string")
    }


def test_unknown_figures_are_na_and_known_ones_exact(folder):
    frame = load(folder).to_frame()
    kinds = {name: str(frame[name].dtype) for name in ("batch_size", "peak_allocated_bytes", "step_time_s", "proof")}
    assert kinds == {
        "batch_size": "Int64",
        "peak_allocated_bytes": "Int64",
        "step_time_s": "Float64",
        "proof": "string",
    }
    assert frame["peak_allocated_bytes"][3] is pandas.NA
    assert frame["peak_allocated_bytes"][0] == 2480 * MIB


def test_the_frame_holds_the_figures_of_the_csv(folder):
    """Two ways to the same table must not disagree."""
    frame = load(folder).to_frame()
    read = pandas.read_csv(io.StringIO(formats.get("csv").render(mixed_report()))).astype(frame.dtypes)
    pandas.testing.assert_frame_equal(frame, read)


def test_kind_distinguishes_runs_and_predictions(tmp_path, folder):
    predicted = tmp_path / "predicted"
    predicted.mkdir()
    report_file.save(card_report(), predicted)
    assert (load(folder).kind, load(predicted).kind) == ("run", "prediction")
    assert load(predicted).to_frame()["spare_bytes"].notna().any()


def test_a_file_and_a_text_are_accepted_as_well(folder):
    file = folder / "report.json"
    assert load(file).path == load(str(folder)).path == file
    assert load(file).report == mixed_report()


@pytest.mark.parametrize(("name", "kind"), [("planned.json", "plan"), ("check.json", "check")])
def test_a_plan_or_check_is_refused_with_the_command_that_shows_it(tmp_path, name, kind):
    (tmp_path / name).write_text(json.dumps({}))
    with pytest.raises(ResultsError, match=f"is a stored {kind}.*gcbench report"):
        load(tmp_path)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(ResultsError, match="there is no"):
        load(tmp_path)


def test_loading_imports_pandas_only_for_a_frame(folder):
    code = (
        "import sys; from gcbench.report.loaded import load; loaded = load(sys.argv[1]);"
        "assert not {'pandas', 'numpy', 'torch'} & set(sys.modules);"
        "loaded.to_frame(); assert 'pandas' in sys.modules and 'torch' not in sys.modules"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, env=env)
