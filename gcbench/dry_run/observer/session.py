"""One observed process: arms the hooks once torch is imported, and writes what was seen after every step."""

from __future__ import annotations

import atexit
import ctypes
import faulthandler
import functools
import gc
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

from . import places
from .ending import wait_for_autograd
from .import_hooks import AfterImport
from .out_of_memory import OutOfMemory
from .peaks import PeakMeter
from .phases import Phases
from .reads import Reads, mark_loss
from .recomputation import count_recomputation
from .saves import Saves
from .workload import Workload

SCHEMA = 1
_WRITE_EVERY_S = 0.5
_ALWAYS_WRITTEN_STEPS = 10
_MOST_TRACED = 1_000_000
"""Allocations and frees that a snapshot holds at most."""


class DryRunEnd(SystemExit):
    """Ends the script after the steps that were asked for, through its `finally` blocks, with exit code 0."""

    def __init__(self) -> None:
        super().__init__(0)


class Session:
    """The observer of one process.

    Args:
        folder: private folder of the dry run.
        max_steps: optimizer steps after which the script ends; None for no limit.
        snapshot: file for PyTorch's memory snapshot; None for none.
    """

    def __init__(self, *, folder: str, max_steps: int | None, snapshot: str | None) -> None:
        self._folder = Path(folder)
        self._max_steps = max_steps
        self._snapshot = snapshot
        self._pid = os.getpid()
        self._torch: Any = None
        self._phases: Phases | None = None
        self._reads: Reads | None = None
        self._memory: OutOfMemory | None = None
        self._saves: Saves | None = None
        self._workload = Workload(self._folder)
        self._notes: dict[str, Any] = {}
        self._failure: dict[str, Any] | None = None
        self._stopped: dict[str, Any] | None = None
        self._depths = threading.local()
        self._written_at = 0.0
        self._devices: list[str] = []
        self._context_bytes: int | None = None

    def arm(self) -> None:
        """Wait for torch's import."""
        AfterImport(
            {
                "torch": self._see_torch,
                "torch.utils.checkpoint": self._see_checkpoint,
                "safetensors.torch": self._see_safetensors,
            }
        ).install()
        self._stack_file = (self._folder / f"stack-{self._pid}.txt").open("w", encoding="utf-8")
        faulthandler.enable(self._stack_file)
        before = sys.excepthook

        def note_failure(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
            with suppress(Exception):
                trace = _without_observer(error, trace)
                self._see_failure(error, trace)
            before(kind, error, trace)

        sys.excepthook = note_failure
        atexit.register(self._end)

    # What torch reports

    def _phases_of(self) -> Phases:
        """Return the phases; `torch.utils.checkpoint` may be imported before torch is complete."""
        if self._phases is None:
            self._phases = Phases(_Later(), self._after_step)
        return self._phases

    def _see_checkpoint(self, module: ModuleType) -> None:
        count_recomputation(module, self._phases_of(), self._notes)

    def _see_safetensors(self, module: ModuleType) -> None:
        if self._saves is None:
            self._saves = Saves(self._phases_of())
        self._saves.watch(module, "save_file", position=1, keyword="filename")

    def _see_torch(self, module: ModuleType) -> None:
        torch: Any = module
        self._torch = torch
        phases = self._phases_of()
        phases._meter = PeakMeter(torch)
        self._memory = OutOfMemory(torch, phases, self._after_out_of_memory)
        if torch.version.cuda is not None:
            torch.cuda._lazy_call(self._see_first_use)
        self._reads = Reads(torch, self._see_endless)
        if self._saves is None:
            self._saves = Saves(phases)
        self._saves.watch(torch, "save", position=1, keyword="f")
        _around(torch.autograd, "backward", self._before_backward, phases.backward_ends)
        _around(torch.autograd, "grad", self._before_backward, phases.backward_ends)
        from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

        register_optimizer_step_pre_hook(self._before_optimizer)
        register_optimizer_step_post_hook(lambda optimizer, args, kwargs: phases.optimizer_ends())
        self._watch_modules(torch.nn.Module)

    def _see_first_use(self) -> None:
        """Begin recording once CUDA is initialised."""
        assert self._memory is not None
        cuda = self._torch.cuda
        free, total = cuda.mem_get_info(0)
        self._context_bytes = total - free - cuda.memory_reserved(0)
        self._devices = [cuda.get_device_name(index) for index in range(cuda.device_count())]
        self._memory.attach()
        if self._snapshot is None:
            cuda.memory._record_memory_history(context="state", stacks="python", max_entries=1)
        else:
            cuda.memory._record_memory_history(context="alloc", stacks="python", max_entries=_MOST_TRACED)
        self._write()  # a crash leaves at least this

    def _watch_modules(self, module_class: Any) -> None:
        """Note calls of outermost modules; PyTorch's global hooks would change how compiled modules are traced."""
        original = module_class.__call__
        compiling = self._torch.compiler.is_compiling
        depths = self._depths

        @functools.wraps(original)
        def call(module: Any, *args: Any, **kwargs: Any) -> Any:
            if compiling():
                return original(module, *args, **kwargs)
            depth = getattr(depths, "value", 0)
            if depth == 0:
                self._before_forward(module, args, kwargs)
            elif depth == 1:  # autocast may begin within the outermost module
                self._workload.see_autocast(self._torch)
            depths.value = depth + 1
            try:
                return original(module, *args, **kwargs)
            finally:
                depths.value = depth

        module_class.__call__ = call

    def _before_forward(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        phases, torch = self._phases_of(), self._torch
        if phases.is_recomputing:
            return
        trains = torch.is_grad_enabled()
        if trains:
            self._stop_if_done()
        phases.forward_begins(with_gradients=trains)
        if trains:
            self._workload.see_forward(torch, module, args, kwargs)

    def _before_backward(self, tensors: Any) -> None:
        phases = self._phases_of()
        if not phases.is_recomputing:
            self._stop_if_done()
            for each in tensors if isinstance(tensors, (list, tuple)) else [tensors]:
                mark_loss(each)
        phases.backward_begins()

    def _before_optimizer(self, optimizer: Any, args: object, kwargs: object) -> None:
        self._workload.see_optimizer(optimizer)
        self._phases_of().optimizer_begins()

    # Ends

    def _stop_if_done(self) -> None:
        """Raise `DryRunEnd` at the beginning of the step after the last one."""
        phases = self._phases_of()
        is_done = self._max_steps is not None and phases.done_steps >= self._max_steps
        if self._stopped is None and is_done:
            self._stopped = {"why": "steps", "file": None, "line": None}
        if self._stopped is not None and threading.current_thread() is threading.main_thread():
            raise DryRunEnd

    def _see_endless(self, file: str, line: int) -> None:
        if self._max_steps is None and self._stopped is None:
            self._stopped = {"why": "endless", "file": file, "line": line}

    def _see_failure(self, error: BaseException, trace: TracebackType | None) -> None:
        frames = [(each.filename, each.lineno or 0, each.name) for each in reversed(traceback.extract_tb(trace))]
        chain: list[dict[str, str]] = []
        cause: BaseException | None = error
        while cause is not None and len(chain) < 8:
            chain.append({"type": type(cause).__name__, "message": str(cause)[:2000]})
            cause = cause.__cause__ or cause.__context__
        out_of_memory = self._torch is not None and isinstance(error, self._torch.OutOfMemoryError)
        libraries = [library for each in frames if (library := places.library_of(each[0])) not in (None, "python")]
        self._failure = {
            "type": type(error).__name__,
            "message": str(error)[:4000],
            "chain": chain,
            "is_out_of_memory": out_of_memory,
            "is_interrupt": isinstance(error, KeyboardInterrupt),
            "place": places.user_place(frames),
            "libraries": list(dict.fromkeys(libraries)),
            "files": [each[0] for each in frames][:40],
        }

    def _after_out_of_memory(self) -> None:
        if "optimizer" not in self._workload.found:  # it never stepped, but may be there
            for thing in gc.get_objects():
                if issubclass(type(thing), self._torch.optim.Optimizer) and not hasattr(thing, "optimizer"):
                    self._workload.see_optimizer(thing)
        self._dump()
        self._write()

    def _after_step(self) -> None:
        due = self._phases_of().done_steps <= _ALWAYS_WRITTEN_STEPS
        if due or time.monotonic() - self._written_at >= _WRITE_EVERY_S:
            self._write()

    def _end(self) -> None:
        if os.getpid() != self._pid:  # a forked worker of a data loader
            return
        with suppress(Exception):
            self._phases_of().measure()
        if self._memory is None or not self._memory.count:
            self._dump()
        self._write()
        with suppress(Exception):
            wait_for_autograd()

    def _dump(self) -> None:
        """Write PyTorch's snapshot; the first time that memory runs out, else at the end."""
        if self._snapshot is None or os.getpid() != self._pid or self._notes.get("snapshot"):
            return
        if self._torch is None or self._torch.version.cuda is None or not self._torch.cuda.is_initialized():
            return
        try:
            self._torch.cuda.memory._dump_snapshot(self._snapshot)
            self._notes["snapshot"] = self._snapshot
        except Exception as err:
            self._notes["snapshot_failed"] = f"{type(err).__name__}: {err}"

    def _write(self) -> None:
        if os.getpid() != self._pid:
            return
        path = self._folder / f"observed-{self._pid}.json"
        temporary = path.with_suffix(".tmp")
        try:
            temporary.write_text(json.dumps(self.as_json(), default=str), encoding="utf-8")
            temporary.replace(path)
        except OSError:  # the folder is gone: the command was killed
            return
        self._written_at = time.monotonic()

    def as_json(self) -> dict[str, Any]:
        """Return everything that was seen (`records.Observed`)."""
        memory, torch = self._memory, self._torch
        return {
            "schema": SCHEMA,
            "pid": self._pid,
            "argv": list(sys.argv) if hasattr(sys, "argv") else [],
            "torch": None if torch is None else str(torch.__version__),
            "devices": self._devices,
            "context_bytes": self._context_bytes,
            **self._phases_of().as_json(),
            "out_of_memory": [] if memory is None else memory.events,
            "num_out_of_memory": 0 if memory is None else memory.count,
            "saved_files": [] if self._saves is None else self._saves.files,
            "reads": [] if self._reads is None else self._reads.as_json(),
            "workload": self._workload.found,
            "stopped": self._stopped,
            "failure": self._failure,
            "snapshot": self._notes.get("snapshot"),
            "snapshot_failed": self._notes.get("snapshot_failed"),
            "refused": _refused() if self._devices else [],
            "checkpoint_reentrant": self._notes.get("checkpoint_reentrant"),
        }


class _Later:
    """A meter that reads nothing, until torch is there."""

    def take(self) -> dict[int, tuple[int, int]]:
        return {}


def _refused() -> list[str]:
    """Return the functions of NVIDIA's libraries that were called and that the emulated card refuses."""
    try:
        asked = ctypes.CDLL("libcuda.so.1").emu_refused
    except (OSError, AttributeError):  # a card that is there
        return []
    asked.restype, asked.argtypes = ctypes.c_char_p, (ctypes.c_size_t,)
    names: list[str] = []
    while (name := asked(len(names))) is not None:
        names.append(name.decode())
    return names


def _without_observer(error: BaseException, trace: TracebackType | None) -> TracebackType | None:
    """Take the observer's own frames off an error's traceback, and off those of its causes."""

    def stripped(entry: TracebackType | None) -> TracebackType | None:
        while entry is not None and places.library_of(entry.tb_frame.f_code.co_filename) == "gcbench":
            entry = entry.tb_next
        if entry is not None:
            entry.tb_next = stripped(entry.tb_next)
        return entry

    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        cause.__traceback__ = stripped(cause.__traceback__)
        cause = cause.__cause__ or cause.__context__
    return stripped(trace)


def _around(module: Any, name: str, before: Callable[[Any], object], after: Callable[[], object]) -> None:
    """Wrap a function: `before` gets its first argument, `after` is called however it ends."""
    original = getattr(module, name)

    @functools.wraps(original)
    def around(*args: Any, **kwargs: Any) -> Any:
        import torch

        if torch.compiler.is_compiling():
            return original(*args, **kwargs)
        before(args[0] if args else next(iter(kwargs.values()), ()))
        try:
            return original(*args, **kwargs)
        finally:
            after()

    setattr(module, name, around)
