"""The state of the machine in a turn: from counters made by hand, and from files that lack what others have."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from gcbench.core.records import Conditions
from gcbench.devices import conditions
from gcbench.devices.conditions import Reading, between

START = Reading(
    busy_s=1000.0,
    steal_s=50.0,
    all_s=4000.0,
    user_s=10.0,
    system_s=2.0,
    throttled_s=7.0,
    monotonic_s=500.0,
    boot_s=900.0,
    wall_s=1_700_000_000.0,
)
"""Of a machine with four processors."""


@pytest.fixture(autouse=True)
def no_frequency(monkeypatch):
    monkeypatch.setattr(conditions, "_frequency_mhz", lambda: None)


def after(seconds: float = 10.0, **growth: float) -> Reading:
    """The counters so many seconds later, in which this process used one processor of four; `growth` adds to them."""
    grown = {"busy_s": seconds, "user_s": seconds, "all_s": 4 * seconds, "steal_s": 0.0, "throttled_s": 0.0}
    clocks = dict.fromkeys(("monotonic_s", "boot_s", "wall_s"), seconds)
    changes = {**grown, **clocks}
    for name, value in growth.items():
        changes[name] = changes.get(name, 0.0) + value
    return replace(START, **{name: getattr(START, name) + value for name, value in changes.items()})


QUIET = Conditions(steal_frac=0.0, others_frac=0.0, throttled_frac=0.0)


def test_a_quiet_machine():
    assert between(START, after()) == QUIET


def test_what_other_virtual_machines_took():
    found = between(START, after(steal_s=8.0))
    assert found == replace(QUIET, steal_frac=0.2)  # 8 of 4 × 10 s


def test_what_other_processes_used():
    """Without this process's own time, in its code and in the kernel."""
    assert between(START, after(busy_s=20.0)).others_frac == 0.5
    assert between(START, after(busy_s=20.0, system_s=20.0)).others_frac == 0.0


def test_ticks_that_lag_behind_are_no_negative_share():
    """The trap: the system counts in ticks of ten milliseconds, this process in microseconds."""
    assert between(START, after(busy_s=-0.02)).others_frac == 0.0
    assert between(START, after(steal_s=-0.01)).steal_frac == 0.0


def test_a_quota_that_held_it_back():
    assert between(START, after(throttled_s=2.5)).throttled_frac == 0.25


def test_a_quota_on_several_processors_holds_it_back_all_of_the_time_at_most():
    """The trap: the kernel adds up the processors, so that four of them are throttled for 30 s in 10 s."""
    assert between(START, after(throttled_s=30.0)).throttled_frac == 1.0


def test_a_machine_that_was_suspended():
    """Its clocks that go on are ahead of the one that stood still; nobody has set the clock."""
    found = between(START, after(boot_s=3600.0, wall_s=3600.0))
    assert (found.suspended_s, found.clock_step_s) == (pytest.approx(3600.0), None)


@pytest.mark.parametrize("step", [3600.0, 1.0, -1.0, -7200.0])
def test_a_clock_that_was_set(step):
    found = between(START, after(wall_s=step))
    assert (found.suspended_s, found.clock_step_s) == (None, pytest.approx(step))


def test_a_clock_that_was_set_while_the_machine_was_suspended():
    found = between(START, after(boot_s=60.0, wall_s=60.0 - 5.0))
    assert (found.suspended_s, found.clock_step_s) == (pytest.approx(60.0), pytest.approx(-5.0))


@pytest.mark.parametrize("drift", [0.3, -0.3])
def test_a_clock_that_is_corrected_slowly_was_not_set(drift):
    """A time service slews by 0.5 ms a second at most, and the clocks are read one after the other."""
    found = between(START, after(wall_s=drift, boot_s=0.01))
    assert (found.suspended_s, found.clock_step_s) == (None, None)


def test_without_a_clock_that_goes_on_a_suspended_machine_looks_like_a_clock_that_was_set():
    """Either makes the turn's times unusable."""
    found = between(replace(START, boot_s=None), replace(after(wall_s=600.0), boot_s=None))
    assert (found.suspended_s, found.clock_step_s) == (None, pytest.approx(600.0))


@pytest.mark.parametrize(
    ("missing", "field"),
    [("steal_s", "steal_frac"), ("busy_s", "others_frac"), ("throttled_s", "throttled_frac")],
)
def test_a_counter_that_is_missing_is_unknown_and_the_others_are_there(missing, field):
    """The trap: `0 %` of something that nobody counted. It may be missing at one of the two moments."""
    for first, last in ((None, after()), (START, None), (None, None)):
        found = between(
            replace(START, **{missing: None}) if first is None else first,
            replace(after(), **{missing: None}) if last is None else last,
        )
        assert found == replace(QUIET, **{field: None})


def test_without_the_time_of_all_processors_no_share_is_known():
    found = between(replace(START, all_s=None), after())
    assert (found.steal_frac, found.others_frac, found.throttled_frac) == (None, None, 0.0)


def test_a_turn_shorter_than_a_tick_has_no_shares():
    """The trap: a division by nothing."""
    assert between(START, START) == Conditions()


# Reading the counters


@pytest.fixture
def files(monkeypatch):
    """`files["/proc/stat"] = text` is what is read from there; what is not set is not there."""
    contents: dict[str, str] = {}

    def read_text(path, *args, **kwargs):
        if str(path) not in contents:
            raise FileNotFoundError(str(path))
        return contents[str(path)]

    monkeypatch.setattr(Path, "read_text", read_text)
    return contents


def test_the_counters_of_linux(files, monkeypatch):
    monkeypatch.setattr(conditions.os, "sysconf", lambda name: {"SC_CLK_TCK": 100}[name])
    files["/proc/stat"] = "cpu  1000 20 300 5000 70 8 9 40 500 0\ncpu0 1 2 3\n"
    files["/sys/fs/cgroup/cpu.stat"] = "usage_usec 5\nnr_throttled 3\nthrottled_usec 2500000\n"
    now = conditions.read()
    assert now.busy_s == pytest.approx((1000 + 20 + 300 + 8 + 9) / 100)
    assert (now.steal_s, now.throttled_s) == (0.4, 2.5)
    assert now.all_s == pytest.approx((1000 + 20 + 300 + 5000 + 70 + 8 + 9 + 40) / 100)  # a guest's time is in `user`


@pytest.mark.parametrize(
    "stat", [None, "", "cpu 1 2 3\n", "intr 5 6 7 8 9 10 11 12 13\n", "cpu a b c d e f g h\n"], ids=repr
)
def test_counters_that_are_not_there_or_look_different_are_unknown(files, stat):
    """The trap: a run that ends in a traceback in a sandbox whose kernel has another /proc."""
    if stat is not None:
        files["/proc/stat"] = stat
        files["/sys/fs/cgroup/cpu.stat"] = "usage_usec 5\nuser_usec 5\n"  # no quota is set
    now = conditions.read()
    assert (now.busy_s, now.steal_s, now.all_s, now.throttled_s) == (None, None, None, None)
    assert now.user_s > 0 and now.wall_s > now.monotonic_s > 0
    found = between(now, conditions.read())
    assert (found.steal_frac, found.others_frac, found.throttled_frac) == (None, None, None)
    assert (found.suspended_s, found.clock_step_s) == (None, None)


def test_this_machine_can_be_read():
    """Twice, with work between: this process's time goes up, and nothing is set or suspended."""
    before = conditions.read()
    faults = conditions.page_faults()
    kept = [bytes(2**20) for _ in range(32)]
    while conditions.read().user_s - before.user_s < 0.01:
        sum(range(1000))
    found = between(before, conditions.read())
    assert (found.suspended_s, found.clock_step_s) == (None, None)
    assert found.others_frac is None or 0 <= found.others_frac <= 1
    assert faults is None or conditions.page_faults() > faults
    assert len(kept) == 32


# A card


def state(text: str | None, *, code: int = 0, monkeypatch):
    from gcbench.devices.backends import cuda

    class Started:
        returncode = code

        def communicate(self, timeout):
            if text is None:
                raise subprocess.TimeoutExpired("nvidia-smi", timeout)
            return text, None

        def kill(self):
            ended.append(True)

    ended: list[bool] = []
    found = cuda._state_of_card(Started())
    assert ended == ([True] if text is None else []), "a tool that hangs is ended"
    return found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("1980, 45, 0x0000000000000000\n", (1980.0, 45.0, ())),
        ("1980, 45, 0x0000000000000001\n", (1980.0, 45.0, ())),  # idle
        ("1410, 83, 0x0000000000000024\n", (1410.0, 83.0, ("power cap", "thermal slowdown"))),
        ("345, 91, 0x00000000000000C0\n", (345.0, 91.0, ("hardware thermal slowdown", "power brake"))),
        ("[N/A], 45, 0x0000000000000004\n", (None, 45.0, ("power cap",))),
        ("1980, [Not Supported], [N/A]\n", (1980.0, None, ())),
        ("1980, -3, 0x\n", (1980.0, None, ())),
        ("1980, 45\n", (None, None, ())),
        ("1980, 45, 0x0, 7\n", (None, None, ())),
        ("No devices were found\n", (None, None, ())),
        ("\n", (None, None, ())),
        ("", (None, None, ())),
        (None, (None, None, ())),
    ],
)  # fmt: skip
def test_the_state_of_a_card_is_what_the_tool_says_of_it(text, found, monkeypatch):
    assert state(text, monkeypatch=monkeypatch) == found


def test_a_tool_that_fails_or_is_missing_says_nothing(monkeypatch):
    from gcbench.devices.backends import cuda

    assert state("1980, 45, 0x0\n", code=9, monkeypatch=monkeypatch) == (None, None, ())
    assert cuda._state_of_card(None) == (None, None, ())
    monkeypatch.setenv("PATH", "/nowhere")
    assert cuda._start_nvidia_smi(0, "clocks.sm") is None
