"""Two processes share one list of items; what one fails on, the other does."""

from __future__ import annotations

import os
import time
from types import SimpleNamespace

import pytest

from gcbench.plan.search import two_cores
from gcbench.plan.search.two_cores import on_two_cores


def test_whoever_is_free_takes_the_next_and_none_is_done_twice(monkeypatch, tmp_path):
    """The trap: every second one for each, and one waits where the other has the long ones."""
    monkeypatch.setattr(two_cores, "_can_be_shared", lambda: True)

    def work(number):
        with (tmp_path / "done").open("a", encoding="utf-8") as done:
            done.write(f"{number}\n")
        time.sleep(0.5 if number == 0 else 0.01)
        return os.getpid()

    found = on_two_cores(work, range(9))
    assert sorted((tmp_path / "done").read_text(encoding="utf-8").split()) == [str(number) for number in range(9)]
    assert len(set(found)) == 2 and found.count(found[0]) < 4


def test_results_come_back_in_order():
    assert on_two_cores(lambda number: number * number, range(7)) == [number * number for number in range(7)]
    assert on_two_cores(str, []) == [] and on_two_cores(str, [1]) == ["1"]


def test_what_the_other_half_cannot_do_or_send_is_done_here(monkeypatch):
    monkeypatch.setattr(two_cores, "_can_be_shared", lambda: True)
    here = os.getpid()

    def work(number):
        if os.getpid() != here:
            raise ValueError
        return number

    assert on_two_cores(work, range(4)) == [0, 1, 2, 3]
    unpicklable = on_two_cores(lambda number: SimpleNamespace(number=number, other=lambda: None), range(3))
    assert [each.number for each in unpicklable] == [0, 1, 2]


def test_a_mistake_in_this_half_is_raised_and_leaves_no_process(monkeypatch):
    monkeypatch.setattr(two_cores, "_can_be_shared", lambda: True)
    here = os.getpid()

    def work(number):
        if os.getpid() == here:
            raise KeyError(number)
        return b"x" * 10**6  # more than a pipe holds

    begun = []
    fork = os.fork

    def noted():
        pid = fork()
        begun.append(pid)
        return pid

    monkeypatch.setattr(os, "fork", noted)
    with pytest.raises(KeyError):
        on_two_cores(work, range(4))
    with pytest.raises(ChildProcessError):  # it has ended and was waited for
        os.waitpid(begun[0], os.WNOHANG)
