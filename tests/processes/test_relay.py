"""Children with an environment of their own: it reaches them alone, and nothing of them is left behind."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from relayed import Hang, KillRelay, Look

from gcbench.processes.children import ForkedChildren

MARK = "GCBENCH_TEST_MARK"
PRELOADED = ("relayed",)


def look(children):
    pids = []
    answer = children.run(Look(), on_event=lambda event: pids.append(event.step), timeout_s=60)
    return answer.machine.settings, pids[0]


def is_gone(pid):
    """Whether a process has ended; a zombie has, and waits only for whoever adopted it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def await_gone(*pids):
    deadline = time.monotonic() + 30
    while not all(map(is_gone, pids)):
        assert time.monotonic() < deadline, pids
        time.sleep(0.01)


@pytest.mark.usefixtures("warm_server")
def test_the_environment_reaches_the_children_that_were_asked_for_it_and_nothing_else():
    """The trap: multiprocessing has one server a process, whose environment every later child has."""
    before = dict(os.environ)
    with ForkedChildren(preload=PRELOADED) as plain:
        assert MARK not in look(plain)[0]
        with ForkedChildren(preload=PRELOADED, environment={MARK: "here"}) as marked:
            assert look(marked)[0][MARK] == "here"
            assert MARK not in look(plain)[0]
            relay = marked._relay._process.pid
        assert MARK not in look(plain)[0]
    assert {name: value for name, value in os.environ.items() if not name.startswith("PYTORCH_NVML")} == {
        name: value for name, value in before.items() if not name.startswith("PYTORCH_NVML")
    }
    assert MARK not in os.environ
    await_gone(relay)


def test_an_interruption_in_the_parent_ends_the_relay_and_its_child():
    """The trap: a child that goes on in a process that the parent no longer talks to."""
    pids = []

    def interrupt(event):
        pids.append(event.step)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), ForkedChildren(preload=PRELOADED, environment={MARK: "1"}) as children:
        pids.append(children._relay._process.pid)
        children.run(Hang(), on_event=interrupt, timeout_s=60)
    await_gone(*pids)
    assert not children._folder.exists()


def test_a_child_that_is_still_running_at_its_timeout_is_a_failure_and_the_next_one_runs():
    with ForkedChildren(preload=PRELOADED, environment={MARK: "1"}) as children:
        answer = children.run(Hang(), on_event=lambda event: None, timeout_s=0.5)
        assert answer.failure.kind == "timeout"
        assert look(children)[0][MARK] == "1"


def test_a_relay_that_ends_is_a_sentence():
    with ForkedChildren(preload=PRELOADED, environment={MARK: "1"}) as children:
        pid = children._relay._process.pid
        answer = children.run(KillRelay(pid=pid), on_event=lambda event: None, timeout_s=60)
    assert answer.refusal.error == "UnavailableError" and "a library is missing or broken" in answer.refusal.message


def test_a_halt_ends_the_running_child_from_another_thread():
    with ForkedChildren(preload=PRELOADED, environment={MARK: "1"}) as children:
        answer = children.run(Hang(), on_event=lambda event: children.halt(), timeout_s=60)
    assert answer.failure.kind == "killed"
