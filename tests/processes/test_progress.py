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
    off, cell = outcome("off", peaks(1, 2, 4), [[0.4]]), outcome("per-layer", peaks(1, 2, 3), [[0.5]])
    display = progress.PlainProgress(console)
    with display:
        display._print_last_step()
        display.begin(num_rounds=2)
        display.enter(cell.cell, doing=progress.WARMING_UP)
        display._print_last_step()
        display.step(Event(kind="memory", step=2, seconds=0.5))
        display._print_last_step()
        display.leave(cell)
        display.enter(cell.cell, doing="round 1")
        display._print_last_step()
        display.step(Event(kind="timed", step=3, seconds=0.5))
        display._print_last_step()
        display.end_round([off, cell])
        display.end_round([off, cell])  # less than some seconds after the first: not worth a line
    shown = [re.sub(r"[\d.]+ [mµ]?s elapsed", "now", line) for line in lines()]
    assert shown == [
        "importing torch, reading the model … [now]",
        "measuring: 2 rounds",
        "per-layer, batch 16 × 64, warming up: building the model … [now]",
        "per-layer, batch 16 × 64, warming up: memory step 2 … [now]",
        "per-layer, batch 16 × 64: peak 3.00 MiB (optimizer), step 500 ms [now]",
        "per-layer, batch 16 × 64, round 1: under way … [now]",
        "per-layer, batch 16 × 64, round 1: timed step 3 … [now]",
        "round 1/2: per-layer +25 % [now]",
    ]


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"num_rounds": 1}, "measuring: 1 round"),
        ({"num_rounds": None}, "measuring: until the intervals are narrow"),
        ({"num_rounds": None, "limit_s": 165.0}, "measuring: until the intervals are narrow, at most 2 min 45 s"),
    ],
)
def test_a_run_says_what_ends_it(printed, limits, said):
    console, lines = printed
    with progress.PlainProgress(console) as display:
        display.begin(**limits)
    assert lines() == [said]


def test_a_run_without_a_number_of_rounds_counts_them_and_shows_what_is_known(printed, monkeypatch):
    """A line every few seconds, with the intervals so far: whoever waits sees them become narrow."""
    console, lines = printed
    now = iter(range(0, 10_000, 10))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(now)))
    with progress.PlainProgress(console) as display:
        display.begin(num_rounds=None, limit_s=1000.0)
        for count in (1, 3):
            off = outcome("off", peaks(1, 2, 4), [[0.4]] * count)
            display.end_round([off, outcome("per-layer", peaks(1, 2, 3), [[0.5]] * count)])
        display.end_round([outcome("per-layer", peaks(1, 2, 3), [[0.5]])])
    shown = [line.partition(" [")[0] for line in lines()]
    assert shown[1:] == [
        "round 1: per-layer +25 %",
        "round 2: per-layer +25 % (95 %: 25.0 to 25.0 %)",
        "round 3: timed",
    ]


@pytest.mark.parametrize("limits", [{"num_rounds": 3}, {"num_rounds": None, "limit_s": 60.0}, {"num_rounds": None}])
def test_a_terminal_shows_a_run_live(limits):
    text = io.StringIO()
    console = Console(file=text, width=120, force_terminal=True)
    off, cell = outcome("off", peaks(1, 2, 4), [[0.4]]), outcome("per-layer", peaks(1, 2, 3), [[0.5]])
    with progress.choose(console, quiet=False) as display:
        assert isinstance(display, progress.LiveProgress)
        display.begin(**limits)
        display.enter(cell.cell, doing=progress.WARMING_UP)
        display.step(Event(kind="memory", step=2, seconds=0.5))
        display.leave(cell)
        display.enter(cell.cell, doing="round 1")
        display.step(Event(kind="timed", step=3, seconds=None))
        display.end_round([off, cell])
    assert "per-layer, batch 16 × 64: peak 3.00 MiB (optimizer), step 500 ms" in text.getvalue()
    assert "per-layer +25 %" in text.getvalue()


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
