"""What tests of the real command line share: model folders, and two ways to call it."""

from __future__ import annotations

import csv
import gc
import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path

import pytest
import tiny
from processes import PROCESS_TIMEOUT_S, session_members

from gcbench.cli import app as command_line

# The fixtures of tests/emulate: a conftest.py there would hide this module from all that import from it.
pytest_plugins = ("emulated_driver",)

# Started in the background of a shell, a process ignores Ctrl-C and hands that down to all that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one call of the command line ended in."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, object]:
        return json.loads(self.out)

    @property
    def rows(self) -> dict[str, dict[str, object]]:
        """The rows of --json by strategy."""
        return {row["strategy"]: row for row in self.document["rows"]}

    def refused(self, code: int, *words: str) -> None:
        """Assert that it ended with `code` and one sentence on stderr that holds each of `words`, and with no more."""
        assert self.code == code, self
        assert self.out == "", self
        assert "Traceback" not in self.err and "\n  File " not in self.err, self.err
        assert [line.startswith("error:") for line in self.err.splitlines()].count(True) == 1, self.err
        said = self.err[self.err.index("error:") :]
        for word in words:
            assert word in said, f"{word!r} is not in {said!r}"
        assert len(said.strip().splitlines()) == 1, f"more than one sentence: {said!r}"
        assert ";" in said or "did you mean" in said, f"no remedy in {said!r}"


@pytest.fixture(scope="session")
def warm_server() -> None:
    """The process that children are forked from, with everything imported that the tiny models need.

    A run sets its own list of modules, which a server that is already there does not read. One thread a child: tiny
    models gain nothing from more, and threads that wait for each other crawl on a busy machine.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["gcbench.measure.worker", *tiny.MODEL_MODULES])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # as a run does it, for the same reason
        forkserver.ensure_running()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For tests that train in this process: two threads of a tiny step fight over a busy machine.

    What tests before them hold is frozen, so that a probe of live tensors does not count it: a child begins like that.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(before)


@pytest.fixture
def model(tmp_path: Path) -> Callable[..., Path]:
    """`model("llama", num_hidden_layers=2)` writes a model folder and returns it."""
    return lambda family="llama", **changes: tiny.write_model(tmp_path / family, family, **changes)


@pytest.fixture
def cli(
    warm_server: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> Iterator[Callable[..., Result]]:
    """`cli("run", …)` calls the real command line in this process, so that the server of children stays warm."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*args: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["gcbench", *map(str, args)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            command_line.main()
        out, err = capfd.readouterr()
        return Result(code=int(ended.value.code or 0), out=out, err=err)

    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def popen(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """`popen("run", …)` starts `python -m gcbench` from the plain checkout, in a session of its own.

    The session outlives every parent in it, so that what a run leaves behind can be found (`session_members`).
    """
    started: list[subprocess.Popen[str]] = []

    def start(*args: object, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "gcbench", *map(str, args)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
            cwd=tmp_path,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", **(env or {})},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        for pid in session_members(process.pid):
            os.kill(pid, signal.SIGKILL)
        process.communicate()


@pytest.fixture
def cli_process(popen: Callable[..., subprocess.Popen[str]]) -> Callable[..., Result]:
    """`cli_process("run", …)` runs `python -m gcbench` to its end."""

    def call(*args: object, env: dict[str, str] | None = None) -> Result:
        process = popen(*args, env=env)
        out, err = process.communicate(timeout=PROCESS_TIMEOUT_S)
        return Result(code=process.returncode, out=out, err=err)

    return call


def table(folder: Path) -> dict[str, dict[str, str]]:
    """The rows of a run folder's table.csv by strategy."""
    return {row["strategy"]: row for row in csv.DictReader(io.StringIO((folder / "table.csv").read_text()))}


@pytest.fixture
def no_hook_reaches_the_next_test() -> Iterator[None]:
    """A hook that a test leaves behind would spoil all tests after it in this process."""
    import torch
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    yield
    for _ in range(20):
        if torch._C._autograd._top_saved_tensors_default_hooks(True) is None:
            break
        torch._C._autograd._pop_saved_tensors_default_hooks()
    for mode in reversed(_get_current_dispatch_mode_stack()):
        mode.__exit__(None, None, None)


@pytest.fixture
def offloading(monkeypatch) -> list[tuple[int, ...]]:
    """Offloading on a CPU, to memory that is not pinned: the shapes of what was moved."""
    import torch

    from gcbench import api
    from gcbench.checkpointing import apply as checkpointing

    moved = []

    def save_on_host():
        hooks = torch.autograd.graph.save_on_cpu(pin_memory=False)
        moves = hooks.pack_hook
        hooks.pack_hook = lambda tensor: (moved.append(tensor.shape), moves(tensor))[1]
        return hooks

    monkeypatch.setattr(checkpointing, "save_on_host", save_on_host)
    monkeypatch.setattr(api, "unsupported", lambda plan, kind: None)
    return moved
