"""The wait for autograd's threads at a script's end."""

from __future__ import annotations

from pathlib import Path

import pytest

from gcbench.dry_run.observer import ending


def thread(folder: Path, number: int, *, name: str, state: str, switches: int) -> None:
    status = folder / str(number) / "status"
    status.parent.mkdir(exist_ok=True)
    lines = [f"Name:\t{name}", f"State:\t{state} (…)", f"voluntary_ctxt_switches:\t{switches}"]
    status.write_text("\n".join([*lines, "nonvoluntary_ctxt_switches:\t0"]))


@pytest.fixture
def pauses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses made so far; during the first three, autograd's thread works on."""
    made: list[float] = []

    def pause(seconds: float) -> None:
        made.append(seconds)
        if len(made) <= 3:
            thread(tmp_path, 2, name="pt_autograd_0", state="S", switches=10 + len(made))

    monkeypatch.setattr(ending.time, "sleep", pause)
    return made


def test_it_waits_until_the_thread_no_longer_wakes(tmp_path: Path, pauses: list[float]) -> None:
    thread(tmp_path, 2, name="pt_autograd_0", state="S", switches=10)
    ending.wait_for_autograd(tmp_path)
    assert len(pauses) == 4  # three in which it woke, one in which it did not


def test_a_thread_that_runs_is_not_at_rest(
    tmp_path: Path, pauses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    thread(tmp_path, 2, name="pt_autograd_0", state="S", switches=10)
    thread(tmp_path, 3, name="pt_autograd_1", state="R", switches=5)
    clock = iter(range(100))
    monkeypatch.setattr(ending.time, "monotonic", lambda: float(next(clock)) / 4)
    ending.wait_for_autograd(tmp_path)
    assert len(pauses) == 7  # until two seconds have gone by


def test_a_script_without_autograd_does_not_wait(tmp_path: Path, pauses: list[float]) -> None:
    thread(tmp_path, 1, name="python", state="R", switches=1)
    ending.wait_for_autograd(tmp_path)
    assert not pauses


def test_threads_that_cannot_be_read_do_not_hold_it_up(tmp_path: Path, pauses: list[float]) -> None:
    (tmp_path / "4").mkdir()
    (tmp_path / "4" / "status").write_text("nonsense")
    ending.wait_for_autograd(tmp_path)
    assert not pauses
