"""A full disk below --out of a plan, check or prediction: the result is printed, and one sentence reports the disk."""

from __future__ import annotations

import errno

import pytest
from fixtures_report import outcome, peaks, report, steady

from gcbench.check import session as check_session
from gcbench.core.files import write_text
from gcbench.plan import session as plan_session
from gcbench.report import publish, run_folder
from gcbench.report import report_file as reports

SHOWN_THEN_TOLD = "could not be written (No space left on device), so only the output above exists"


@pytest.fixture
def full(monkeypatch):
    """`full(module, …)`: nothing that these write has room."""

    def fails(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    return lambda *modules: [monkeypatch.setattr(module, "write_text", fails) for module in modules]


def test_a_plan(cli, full, tmp_path):
    measured = report(outcome("off", peaks(1, 2, 3), steady(0.5)), outcome("per-layer", peaks(1, 1, 1), steady(0.6)))
    measured = type(measured)(**{**vars(measured), "settings": {"precision": "fp32", "optim": "adamw_torch"}})
    reports.save(measured, tmp_path / "run")
    full(plan_session)
    result = cli("plan", "--from", "run", "--device-memory", "8GiB", "--out", "plan")
    assert result.code == 1
    assert "checkpointing" in result.out and "gcbench.apply(model, 'off')" in result.out
    assert SHOWN_THEN_TOLD in result.err and "Traceback" not in result.err
    assert not (tmp_path / "plan").exists(), "made for nothing"


def test_a_check(cli, full, model):
    full(check_session)
    flags = ("--strategies", "per-layer", "--no-compile", "--precision", "fp32", "--out", "out")
    result = cli("check", "-m", model(), *flags)
    assert result.code == 1
    assert "1 of 1 combination trains with the gradients of off" in result.out
    assert SHOWN_THEN_TOLD in result.err and "Traceback" not in result.err


def test_a_prediction(cli, full, model, tmp_path, monkeypatch):
    refuge = tmp_path / "refuge"
    refuge.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(refuge))
    real = write_text

    def only_elsewhere(path, text):
        if "out" in path.parts:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, text)

    for module in (reports, run_folder, publish):
        monkeypatch.setattr(module, "write_text", only_elsewhere)
    flags = ("-b", 1, "--seq-len", 8, "--strategies", "off", "--device", "a10", "--out", "out")
    result = cli("predict", "-m", model(), *flags)
    assert result.code == 1
    assert "off fits in" in result.out
    assert result.err.count("warning:") == 1 and "Traceback" not in result.err
    (kept,) = refuge.glob("gcbench-run-*")
    assert f"they are in {kept}" in result.err
    assert reports.load(kept).outcomes[0].prediction is not None


def test_no_temporary_folder(cli, model, monkeypatch):
    def fails(*args, **kwargs):
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found")

    monkeypatch.setattr("gcbench.core.files.tempfile.mkdtemp", fails)
    cli("env").refused(3, "no temporary folder can be created", "set TMPDIR")
