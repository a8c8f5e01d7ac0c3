"""Progress of long work: how many cells are done, in plain lines through a pipe, also during a long wait."""

from __future__ import annotations

import io
import re
import threading

import pytest
from fixtures_report import outcome, peaks
from rich.console import Console

from gcbench.measure import progress
from gcbench.processes import progress as counting
from gcbench.processes.messages import Event
from gcbench.processes.progress import Heartbeat


@pytest.fixture
def printed():
    """A console and the lines that were printed on it."""
    text = io.StringIO()
    return Console(file=text, width=40), lambda: text.getvalue().splitlines()


def test_cells_are_counted_in_plain_lines(printed, monkeypatch):
    """The first and the last always, those between now and then, and none of them broken at 40 characters."""
    console, lines = printed
    now = iter(range(0, 1000, 2))
    monkeypatch.setattr(counting.time, "monotonic", lambda: float(next(now)))
    with counting.PlainCounter(console, verb="predicting", noun="cells") as counter:
        for done in range(13):
            counter.count(done, 12)
    found = [line.partition(" [")[0] for line in lines()]
    assert found[0] == "predicting: 0 of 12 cells (0 %)"
    assert found[-1] == "predicting: 12 of 12 cells (100 %)"
    assert 4 < len(found) < 10
    assert all(re.fullmatch(r"predicting: \d+ of 12 cells \(\d+ %\) \[.* elapsed\]", line) for line in lines())


def test_the_current_item_is_shown_where_it_is_known():
    assert counting.line("planning", "steps", 1, 4, "searching plans") == (
        "planning: 1 of 4 steps (25 %), searching plans"
    )


def test_a_line_is_repeated_in_a_long_wait_and_other_output_restarts_the_wait():
    beats = threading.Semaphore(0)
    heart = Heartbeat(beats.release, silences_s=(0.005, 0.01))
    heart.start()
    assert all(beats.acquire(timeout=30) for _ in range(3))
    heart.restart()
    assert beats.acquire(timeout=30)
    heart.stop()
    assert not heart._thread.is_alive()


def test_a_heartbeat_that_cannot_print_shows_no_traceback(capfd):
    """The trap: the display's thread printed a traceback of forty lines for what the main thread reports in one."""
    tried = threading.Semaphore(0)

    def fails():
        tried.release()
        raise OSError(28, "No space left on device")

    heart = Heartbeat(fails, silences_s=(0.001,))
    heart.start()
    assert all(tried.acquire(timeout=30) for _ in range(2))
    heart.stop()
    assert capfd.readouterr().err == ""


def test_a_run_shows_the_share_that_is_done_and_the_current_step(printed):
    console, lines = printed
    cell = outcome("per-layer", peaks(1, 2, 3), [[0.5]])
    display = progress.PlainProgress(console)
    with display:
        display._print_last_step()
        display.begin(num_steps=8, num_rounds=2)
        display.enter(cell.cell, round=0, num_steps=2)
        display._print_last_step()
        display.step(Event(kind="timed", step=2, seconds=0.5))
        display._print_last_step()
        display.leave(cell)
    shown = [re.sub(r"[\d.]+ [mµ]?s elapsed", "now", line) for line in lines()]
    assert shown == [
        "importing torch, reading the model … [now]",
        "measuring: 8 training steps or more, in 2 rounds",
        "round 1/2 per-layer, batch 16 × 64: building the model … [now]",
        "round 1/2 per-layer, batch 16 × 64: timed step 2 … [now]",
        "round 1/2 per-layer, batch 16 × 64: peak 3.00 MiB (optimizer), step 500 ms [25 % done, now]",
    ]


def test_quiet_shows_nothing(printed):
    console, lines = printed
    with counting.choose(console, verb="checking", noun="combinations", quiet=True) as counter:
        counter.count(1, 2)
    assert lines() == []
    assert type(counting.choose(console, verb="a", noun="b", quiet=False)) is counting.PlainCounter


def test_a_terminal_has_a_display_that_is_removed_at_the_end():
    text = io.StringIO()
    console = Console(file=text, width=60, force_terminal=True)
    with counting.choose(console, verb="checking", noun="combinations", quiet=False) as counter:
        counter.count(3, 12)
    assert "checking: 3 of 12 combinations (25 %)" in text.getvalue()


def test_predict_and_check_count_through_a_pipe(cli, model):
    """`check` showed nothing, and predict's cells of a recurrent model take minutes."""
    folder = model()
    predicted = cli("predict", "-m", folder, "-b", "1,2", "--seq-len", 8, "--strategies", "off", "--device", "a10")
    assert "predicting: 0 of 2 cells (0 %)" in predicted.err and "2 of 2 cells (100 %)" in predicted.err
    checked = cli("check", "-m", folder, "--strategies", "per-layer", "--no-compile", "--precision", "fp32")
    assert "checking: 0 of 1 combinations (0 %)" in checked.err and "(100 %)" in checked.err
