"""Records where a script reads values from the card, and answers so that no values do not stop it.

Nothing is computed on an emulated card: what is read is zero, and true for a question. Two answers are set right here,
because scripts stop for them: whether something is NaN or infinite (no), and the value of a loss (1, not 0).
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from . import places

_TRUTH = "_gcbench_truth"
"""Attribute of a tensor of truth values of which the answer is known."""
_LOSS = "_gcbench_loss"
"""Attribute of a scalar that is a loss, or a copy of one."""
_ZEROS = "zeros"
LOSS_VALUE = 1.0
_QUESTIONS = {"isnan": False, "isinf": False, "isneginf": False, "isposinf": False, "isfinite": True}
_PASSED_ON = ("any", "all", "cpu", "detach", "clone", "to", "bool", "squeeze", "view", "reshape", "max", "min")
_JOINED = {
    "logical_or": lambda a, b: a or b,
    "logical_and": lambda a, b: a and b,
    "__or__": lambda a, b: a or b,
    "__and__": lambda a, b: a and b,
}
_READS = ("item", "tolist", "__bool__", "__int__", "__float__", "__index__")
_SIZES = ("nonzero", "unique", "unique_consecutive", "masked_select", "argwhere")
_MOST_PLACES = 300
_MOST_COPIED = 4096
"""Elements of the largest tensor whose copy to the host counts as reading values."""
ENDLESS_READS = 100


class Reads:
    """The places that read values.

    Args:
        torch: the module.
        on_endless: is called with file and line once a `while` has read a value `ENDLESS_READS` times.

    Attributes:
        counts: file, line, kind and what was answered -> number of reads.
    """

    def __init__(self, torch: Any, on_endless: Callable[[str, int], None]) -> None:
        self._torch = torch
        self._on_endless = on_endless
        self._in_progress = False
        self.counts: dict[tuple[str, int, str, str], int] = {}
        self._answer_questions()
        self._answer_reads()
        self._watch_sizes()

    def _note(self, kind: str, answer: bool | int | float | str) -> None:
        frames = places.frames_from(sys._getframe(2))
        place = places.reading_place(frames)
        if place is None:
            return
        key = (place[0], place[1], kind, str(answer))
        if key not in self.counts and len(self.counts) >= _MOST_PLACES:
            return
        count = self.counts[key] = self.counts.get(key, 0) + 1
        is_own = count == ENDLESS_READS and places.library_of(place[0]) is None
        if is_own and places.condition_of(place[0], place[1]) == "while":
            self._on_endless(place[0], place[1])

    def _is_emulated(self, tensor: Any) -> bool:
        return isinstance(tensor, self._torch.Tensor) and bool(tensor.is_cuda)

    def _answer_questions(self) -> None:
        torch, tensor = self._torch, self._torch.Tensor
        compiling = torch.compiler.is_compiling
        for name, truth in _QUESTIONS.items():
            _wrap(torch, name, _tagging(getattr(torch, name), truth, compiling), torch)
            _wrap(tensor, name, _tagging(getattr(tensor, name), truth, compiling))
        for name in _PASSED_ON:
            _wrap(tensor, name, _passing_on(getattr(tensor, name), compiling))
        for name in ("any", "all"):
            _wrap(torch, name, _passing_on(getattr(torch, name), compiling), torch)
        for name, join in _JOINED.items():
            _wrap(tensor, name, _joining(getattr(tensor, name), join, compiling))
            if not name.startswith("__"):
                _wrap(torch, name, _joining(getattr(torch, name), join, compiling), torch)
        for name in ("__invert__", "logical_not"):
            _wrap(tensor, name, _inverting(getattr(tensor, name), compiling))
        for name in ("__eq__", "__ne__"):
            _wrap(tensor, name, _comparing(getattr(tensor, name), name, compiling))

    def _answer_reads(self) -> None:
        tensor = self._torch.Tensor
        for name in _READS:
            original = getattr(tensor, name, None)
            if original is not None:
                _wrap(tensor, name, self._reading(original, name))
        _wrap(tensor, "cpu", self._copying(tensor.cpu))

    def _reading(self, original: Callable[..., Any], name: str) -> Callable[..., Any]:
        compiling = self._torch.compiler.is_compiling
        kind = name.strip("_")

        @functools.wraps(original)
        def read(tensor: Any, *args: Any, **kwargs: Any) -> Any:
            if compiling() or self._in_progress or not (tensor.is_cuda or _is_marked(tensor)):
                return original(tensor, *args, **kwargs)
            self._in_progress = True  # item() may be implemented by another of these
            try:
                value = original(tensor, *args, **kwargs)
            finally:
                self._in_progress = False
            value = _answer(tensor, value)
            self._note(kind, value if isinstance(value, (bool, int, float)) else _ZEROS)
            return value

        return read

    def _copying(self, original: Callable[..., Any]) -> Callable[..., Any]:
        compiling = self._torch.compiler.is_compiling

        @functools.wraps(original)
        def cpu(tensor: Any, *args: Any, **kwargs: Any) -> Any:
            copied = original(tensor, *args, **kwargs)
            if not compiling() and tensor.is_cuda and tensor.numel() <= _MOST_COPIED:
                self._note("cpu", _ZEROS)
            return copied

        return cpu

    def _watch_sizes(self) -> None:
        torch, tensor = self._torch, self._torch.Tensor
        compiling = torch.compiler.is_compiling

        def watching(original: Callable[..., Any], name: str) -> Callable[..., Any]:
            @functools.wraps(original)
            def sized(*args: Any, **kwargs: Any) -> Any:
                if not compiling() and self._is_emulated(args[0] if args else None):
                    self._note(name, "no elements")
                return original(*args, **kwargs)

            return sized

        for name in _SIZES:
            for owner, registry in ((torch, torch), (tensor, None)):
                original = getattr(owner, name, None)
                if original is not None:
                    _wrap(owner, name, watching(original, name), registry)
        indexing = tensor.__getitem__

        @functools.wraps(indexing)
        def getitem(of: Any, index: Any) -> Any:
            if not compiling() and of.is_cuda:
                parts = index if isinstance(index, tuple) else (index,)
                if any(isinstance(part, tensor) and part.dtype is torch.bool and part.dim() for part in parts):
                    self._note("mask", "no elements")
            return indexing(of, index)

        _wrap(tensor, "__getitem__", getitem)

    def as_json(self) -> list[dict[str, object]]:
        """Return the places with what was read there and how often."""
        return [
            {
                "file": file,
                "line": line,
                "kind": kind,
                "answer": answer,
                "count": count,
                "library": places.library_of(file),
                "condition": places.condition_of(file, line),
            }
            for (file, line, kind, answer), count in self.counts.items()
        ]


def mark_loss(tensor: Any) -> None:
    """Mark a scalar whose value is read as that of a loss."""
    if getattr(tensor, "dim", None) is not None and tensor.dim() == 0:
        setattr(tensor, _LOSS, True)


def _is_loss(tensor: Any) -> bool:
    return tensor.dim() == 0 and tensor.is_floating_point() and (tensor.grad_fn is not None or hasattr(tensor, _LOSS))


def _answer(tensor: Any, value: Any) -> Any:
    truth = getattr(tensor, _TRUTH, None)
    if truth is not None:
        if isinstance(value, (list, tuple)):
            return _filled(value, truth)
        return type(value)(truth) if isinstance(value, (bool, int, float)) else value
    return LOSS_VALUE if isinstance(value, float) and _is_loss(tensor) else value


def _is_marked(tensor: Any) -> bool:
    """Return whether a tensor on the host is a copy of one whose answer is known."""
    known: dict[str, object] = getattr(tensor, "__dict__", {})
    return _TRUTH in known or _LOSS in known


def _filled(value: Any, truth: bool) -> Any:
    return [_filled(part, truth) for part in value] if isinstance(value, list) else truth


def _wrap(owner: Any, name: str, wrapper: Callable[..., Any], torch: Any = None) -> None:
    """Put the wrapper in place; TorchScript, which knows functions by identity, is told that it is the same."""
    original = getattr(owner, name)
    setattr(owner, name, wrapper)
    if torch is not None:
        import torch.jit._builtins

        builtins: Any = torch.jit._builtins
        known = builtins._find_builtin(original)
        if known is not None:
            builtins._register_builtin(wrapper, known)
        dispatched: Any = torch._jit_internal.boolean_dispatched
        if original in dispatched:
            dispatched[wrapper] = dispatched[original]


def _tagging(original: Callable[..., Any], truth: bool, compiling: Callable[[], bool]) -> Callable[..., Any]:
    @functools.wraps(original)
    def question(*args: Any, **kwargs: Any) -> Any:
        answer = original(*args, **kwargs)
        if not compiling() and getattr(answer, "is_cuda", False):
            setattr(answer, _TRUTH, truth)
        return answer

    return question


def _passing_on(original: Callable[..., Any], compiling: Callable[[], bool]) -> Callable[..., Any]:
    @functools.wraps(original)
    def passing(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        if not compiling() and args:
            known = getattr(args[0], "__dict__", None)
            if known:
                for mark in (_TRUTH, _LOSS):
                    if mark in known and hasattr(result, "is_cuda"):
                        setattr(result, mark, known[mark])
            elif getattr(result, "is_cuda", False) and _is_scalar_with_gradient(args[0]):
                setattr(result, _LOSS, True)
        return result

    return passing


def _is_scalar_with_gradient(tensor: Any) -> bool:
    return tensor.dim() == 0 and tensor.grad_fn is not None


def _joining(
    original: Callable[..., Any], join: Callable[[bool, bool], bool], compiling: Callable[[], bool]
) -> Callable[..., Any]:
    @functools.wraps(original)
    def joining(a: Any, b: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(a, b, *args, **kwargs)
        if not compiling():
            left, right = getattr(a, _TRUTH, None), getattr(b, _TRUTH, None)
            if left is not None and right is not None and hasattr(result, "is_cuda"):
                setattr(result, _TRUTH, join(left, right))
        return result

    return joining


def _inverting(original: Callable[..., Any], compiling: Callable[[], bool]) -> Callable[..., Any]:
    @functools.wraps(original)
    def inverting(tensor: Any) -> Any:
        result = original(tensor)
        if not compiling() and getattr(tensor, _TRUTH, None) is not None:
            setattr(result, _TRUTH, not getattr(tensor, _TRUTH))
        return result

    return inverting


def _comparing(original: Callable[..., Any], name: str, compiling: Callable[[], bool]) -> Callable[..., Any]:
    """Answer `x != x`, which asks for NaN, with no, and whether a loss is zero with no too."""

    @functools.wraps(original)
    def comparing(a: Any, b: Any) -> Any:
        result = original(a, b)
        if compiling() or not getattr(result, "is_cuda", False):
            return result
        if a is b:
            setattr(result, _TRUTH, name == "__eq__")
        elif isinstance(b, (int, float)) and b == 0 and _is_loss(a):
            setattr(result, _TRUTH, name == "__ne__")
        return result

    return comparing
