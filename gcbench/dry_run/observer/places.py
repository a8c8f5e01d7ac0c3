"""Finds the places in the code that a moment of training belongs to: the script's own line and a library's."""

from __future__ import annotations

import ast
import linecache
import sys
import sysconfig
import threading
from functools import cache
from pathlib import Path
from types import FrameType

_OBSERVER = str(Path(__file__).resolve().parent)
_STANDARD = tuple(
    {
        str(Path(path).resolve())
        for name in ("stdlib", "platstdlib", "purelib", "platlib")
        if (path := sysconfig.get_paths().get(name))
    }
)
_MACHINERY = ("torch", "accelerate", "lightning", "pytorch_lightning", "lightning_fabric", "contextlib", "functools")


@cache
def library_of(filename: str) -> str | None:
    """Return the installed package that a file belongs to (`torch`); None for the user's own code."""
    if filename.startswith("<"):
        return "python"
    for marker in ("/site-packages/", "/dist-packages/"):
        if marker in filename:
            return filename.rpartition(marker)[2].partition("/")[0].removesuffix(".py")
    path = str(Path(filename).resolve())
    if path.startswith(_OBSERVER):
        return "gcbench"
    return "python" if path.startswith(_STANDARD) else None


def frames_from(frame: FrameType | None) -> list[tuple[str, int, str]]:
    """Return file, line and function of the frames from `frame` outward, without the observer's own."""
    found = []
    while frame is not None:
        code = frame.f_code
        if library_of(code.co_filename) != "gcbench":
            found.append((code.co_filename, frame.f_lineno, code.co_name))
        frame = frame.f_back
    return found


def stack(frame: FrameType | None) -> list[tuple[str, int, str]]:
    """Return the frames that led here, innermost first.

    The backward pass runs in a thread of PyTorch's own, which has no Python frames of the script: its frames are
    followed by those of the main thread, which waits for it.
    """
    found = frames_from(frame)
    main = threading.main_thread().ident
    if threading.get_ident() != main and main is not None:
        found += frames_from(sys._current_frames().get(main))
    return found


def user_place(frames: list[tuple[str, int, str]]) -> dict[str, object] | None:
    """Return the innermost line outside every installed package, else the outermost one within one."""
    own = next((each for each in frames if library_of(each[0]) is None), None)
    if own is None:
        libraries = [each for each in frames if library_of(each[0]) != "python"]
        own = libraries[-1] if libraries else None
    return None if own is None else _place(own)


def library_place(frames: list[tuple[str, int, str]]) -> dict[str, object] | None:
    """Return the innermost line of a library's model or trainer code; None where the script's own line is nearer."""
    for each in frames:
        library = library_of(each[0])
        if library is None:
            return None
        if library != "python" and library not in _MACHINERY:
            return _place(each)
    return None


def reading_place(frames: list[tuple[str, int, str]]) -> tuple[str, int, str] | None:
    """Return the innermost line outside torch."""
    return next((each for each in frames if library_of(each[0]) not in ("torch", "python")), None)


def _place(frame: tuple[str, int, str]) -> dict[str, object]:
    filename, line, function = frame
    return {
        "file": filename,
        "line": line,
        "function": qualified_name(filename, line) or function,
        "text": linecache.getline(filename, line).strip(),
    }


@cache
def _parsed(filename: str) -> ast.Module | None:
    try:
        return ast.parse("".join(linecache.getlines(filename)))
    except (SyntaxError, ValueError):
        return None


@cache
def qualified_name(filename: str, line: int) -> str | None:
    """Return `LlamaMLP.forward`, the function that a line stands in with its class; None where unknown."""
    tree = _parsed(filename)
    names: list[str] = []
    node: ast.AST | None = tree
    while node is not None:
        node = next(
            (
                child
                for child in ast.walk(node)
                if child is not node
                and isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
                and child.lineno <= line <= (child.end_lineno or child.lineno)
            ),
            None,
        )
        if node is not None:
            names.append(node.name)
    return ".".join(names) or None


@cache
def condition_of(filename: str, line: int) -> str | None:
    """Return which kind of condition a value that is read in a line decides: `while`, `if` or `assert`.

    The line is within the condition, or assigns a name that a condition of the same function tests. None where it is
    neither: the value is only stored, printed or passed on.
    """
    tree = _parsed(filename)
    if tree is None:
        return None
    scope = _scope_of(tree, line)
    tested = [(kind, test) for node in ast.walk(scope) for kind, test in _tests(node)]
    for kind, test in tested:
        if test.lineno <= line <= (test.end_lineno or test.lineno):
            return kind
    names = {
        name.id
        for node in ast.walk(scope)
        if isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.NamedExpr))
        and node.lineno <= line <= (node.end_lineno or node.lineno)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        for name in ast.walk(target)
        if isinstance(name, ast.Name)
    }
    kinds = [
        kind for kind, test in tested if any(isinstance(name, ast.Name) and name.id in names for name in ast.walk(test))
    ]
    return next((kind for kind in ("while", "if", "assert") if kind in kinds), None)


def _tests(node: ast.AST) -> list[tuple[str, ast.expr]]:
    if isinstance(node, ast.While):
        return [("while", node.test)]
    if isinstance(node, (ast.If, ast.IfExp)):
        return [("if", node.test)]
    if isinstance(node, ast.Assert):
        return [("assert", node.test)]
    if isinstance(node, ast.comprehension):
        return [("if", test) for test in node.ifs]
    return []


def _scope_of(tree: ast.Module, line: int) -> ast.AST:
    """Return the innermost function around a line, or the module."""
    inner: ast.AST = tree
    for node in ast.walk(tree):  # breadth first: an inner function comes after the outer one
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.lineno <= line <= (
            node.end_lineno or node.lineno
        ):
            inner = node
    return inner
