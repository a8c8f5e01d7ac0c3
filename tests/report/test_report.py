"""Reports on disk: loading returns what was saved, and every kind of damage is reported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fixtures_report import mixed_report, outcome, peaks, report, steady

from gcbench.core.errors import ResultsError
from gcbench.core.records import SCHEMA
from gcbench.report import report_file as reports
from gcbench.report import rows as tables

DATA = Path(__file__).parents[1] / "data"


def stored(tmp_path):
    reports.save(mixed_report(), tmp_path)
    return tmp_path / "report.json"


def edited(tmp_path, change):
    """A stored report with `change` made to its document."""
    path = stored(tmp_path)
    document = json.loads(path.read_text(encoding="utf-8"))
    change(document)
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


def test_what_is_saved_is_loaded(tmp_path):
    stored(tmp_path)
    assert reports.load(tmp_path) == mixed_report()


def test_the_file_itself_can_be_named(tmp_path):
    assert reports.load(stored(tmp_path)) == mixed_report()


def test_times_survive_to_the_last_bit(tmp_path):
    exact = report(outcome("off", peaks(1, 2, 1), [[0.1 + 0.2, 1 / 3]], diffs=[2.0**-40]))
    reports.save(exact, tmp_path)
    assert reports.load(tmp_path).outcomes[0].rounds[0].step_times_s == (0.1 + 0.2, 1 / 3)


def test_saving_makes_the_folder_and_leaves_nothing_else(tmp_path):
    reports.save(mixed_report(), tmp_path / "new" / "run")
    assert [path.name for path in (tmp_path / "new" / "run").iterdir()] == ["report.json"]


@pytest.mark.parametrize("fault", ["write_bytes", "replace"])
def test_a_failed_save_keeps_the_old_report(tmp_path, monkeypatch, fault):
    """Ctrl-C or a full disk in the middle of a save must not cost what was measured before."""
    before = stored(tmp_path).read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full) if fault == "write_bytes" else _break_replace(monkeypatch, full)
    with pytest.raises(OSError, match="No space"):
        reports.save(report(outcome("off", peaks(1, 2, 1), steady(0.1))), tmp_path)
    monkeypatch.undo()
    assert (tmp_path / "report.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def _break_replace(monkeypatch, full):
    """Both spellings, so that the test does not depend on which one is used."""
    monkeypatch.setattr("os.replace", full)
    monkeypatch.setattr(Path, "replace", full)


def test_an_interrupted_write_keeps_the_old_report_and_cleans_up(tmp_path, monkeypatch):
    before = stored(tmp_path).read_bytes()
    whole = Path.write_bytes

    def half(self, data, **kwargs):
        whole(self, data[: len(data) // 2], **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(KeyboardInterrupt):
        reports.save(report(), tmp_path)
    monkeypatch.undo()
    assert (tmp_path / "report.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_a_missing_report_is_answered_with_what_to_pass(tmp_path):
    with pytest.raises(ResultsError, match=r"there is no .*report\.json; pass a folder"):
        reports.load(tmp_path / "nowhere")


def test_a_folder_in_place_of_the_file_cannot_be_read(tmp_path):
    (tmp_path / "report.json").mkdir()
    with pytest.raises(ResultsError, match="cannot be read"):
        reports.load(tmp_path)


@pytest.mark.parametrize("kept", [0, 1, 500, -20])
def test_a_truncated_report_is_damaged(tmp_path, kept):
    path = stored(tmp_path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ResultsError, match=r"is damaged \(line \d+: .*measure again"):
        reports.load(tmp_path)


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"\x80abc"])
def test_bytes_that_are_no_text_cannot_be_read(tmp_path, content):
    (tmp_path / "report.json").write_bytes(content)
    with pytest.raises(ResultsError, match="cannot be read"):
        reports.load(tmp_path)


@pytest.mark.parametrize("content", ["[]", "null", "3", '"text"'])
def test_json_of_another_kind_is_damaged(tmp_path, content):
    (tmp_path / "report.json").write_text(content, encoding="utf-8")
    with pytest.raises(ResultsError, match="is damaged"):
        reports.load(tmp_path)


def test_a_newer_schema_asks_for_a_newer_gcbench(tmp_path):
    """Even when it has fields of its own: the schema must be looked at first."""
    path = edited(tmp_path, lambda document: document.update(schema=SCHEMA + 1, novelty=[]))
    with pytest.raises(ResultsError, match=f"has schema {SCHEMA + 1} and this gcbench reads up to {SCHEMA}; upgrade"):
        reports.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("model"), "Report lacks 'model'"),
        (lambda d: d.pop("schema"), "Report lacks 'schema'"),
        (lambda d: d["outcomes"][1]["rounds"][2].pop("step_times_s"), r"Report\.outcomes\[1\]\.rounds\[2\] lacks"),
        (lambda d: d["outcomes"][0].update(extra=1), r"outcomes\[0\] has an unknown field 'extra'"),
        (lambda d: d["machine"].update(device=3), r"Report\.machine\.device is 3"),
        (lambda d: d["outcomes"][3]["failure"].update(kind="tired"), r"failure\.kind is 'tired'"),
        (lambda d: d["outcomes"][0]["rounds"][0].update(layers_recomputed=True), "layers_recomputed is True"),
        (lambda d: d["outcomes"][0]["rounds"][0].update(step_times_s=[0.1, None]), r"step_times_s\[1\] is None"),
        (lambda d: d.update(outcomes={}), "Report.outcomes is"),
    ],
)
def test_a_wrong_field_is_named_with_its_place(tmp_path, change, message):
    with pytest.raises(ResultsError, match=message):
        reports.load(edited(tmp_path, change))


def test_a_whole_number_of_seconds_is_a_time(tmp_path):
    """JSON written by hand says 1, not 1.0."""
    path = edited(tmp_path, lambda d: d["outcomes"][0]["rounds"][0].update(step_times_s=[1]))
    assert reports.load(path).outcomes[0].rounds[0].step_times_s == (1.0,)


def test_a_field_with_a_default_may_be_absent(tmp_path):
    """Reports written before the field existed."""
    path = edited(tmp_path, lambda d: d.pop("notices"))
    assert reports.load(path).notices == ()


def test_a_report_of_schema_1_still_loads():
    """Never make this file again: it stands for the runs that people have kept."""
    old = reports.load(DATA / "report-schema-1.json")
    assert old.schema == 1
    rows = tables.rows(old)
    assert [(row.strategy, row.status) for row in rows[:4]] == [
        ("off", "ok"),
        ("per-layer", "ok"),
        ("every:2", "ok"),
        ("off", "oom"),
    ]
    assert rows[0].peak_allocated_bytes == 2_600_468_480
    assert rows[1].memory_saved_frac == pytest.approx(0.0766, abs=1e-4)
