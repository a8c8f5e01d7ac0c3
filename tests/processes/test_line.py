"""The line between a child and its parent: a child ends with its parent, whatever it had still to say."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from conftest import ROOT
from processes import PROCESS_TIMEOUT_S

_CHILD = """
import os, sys
from multiprocessing import Pipe
from gcbench.processes.child import _PipeLine

ours, theirs = Pipe()
pid = os.fork()
if pid == 0:
    ours.close()
    line = _PipeLine(theirs)
    line("an event")
    print("said", line.pause("the last one"), flush=True)
    line.pause("again")
    os._exit(3)
theirs.close()
ours.poll(None)
if sys.argv[1] == "all is read":
    ours.recv(), ours.recv()
if sys.argv[2] == "told to go on":
    ours.send("word")
    ours.poll(None)
ours.close()
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


@pytest.mark.parametrize("reads", ["all is read", "nothing is read"])
@pytest.mark.parametrize("told", ["told to go on", "not told"])
def test_a_child_that_waits_ends_with_its_parent(reads, told):
    """The trap: a connection with unread events in it is reset instead of ended, and the child waits for ever with
    its memory."""
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, reads, told],
        capture_output=True,
        text=True,
        timeout=PROCESS_TIMEOUT_S,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.stdout.split("\n")[-2:] == ["1", ""], done
    assert told != "told to go on" or reads != "all is read" or done.stdout.startswith("said word")
