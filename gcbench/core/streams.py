"""Write to standard output and error without tracebacks: other encodings, full disks, closed pipes."""

from __future__ import annotations

import codecs
import errno
import json
import os
import re
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

from gcbench.core.errors import OutputError, ReaderGone

if TYPE_CHECKING:
    from gcbench.core.errors import GcbenchError

SPELLED = "gcbench-spelled"
"""Name of the error handler for characters that an encoding lacks."""

_SPELLINGS = {
    "…": "...",
    "×": "x",
    "−": "-",
    "–": "-",
    "—": "-",
    "·": "-",
    "≈": "~",
    "±": "+-",
    "Δ": "d",
    "µ": "u",
    "μ": "u",
    "→": "->",
    "←": "<-",
    "≤": "<=",
    "≥": ">=",
    "✗": "x",
    "✓": "v",
    "•": "*",
    "▏": "|",
    "‘": "'",
    "’": "'",
    "“": '"',
    "”": '"',
}
_BOX_LINES = {"─": "-", "━": "-", "│": "|", "┃": "|", "╸": "-", "╺": "-"}


def spelled(text: str, encoding: str) -> str:
    """Replace characters that `encoding` lacks by ASCII: `...` for an ellipsis, `\\u6a21` without a similar one."""
    try:
        text.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return "".join(char if _has(encoding, char) else _spelling(char) for char in text)
    return text


def _has(encoding: str, char: str) -> bool:
    try:
        char.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return ord(char) < 128
    return True


def _spelling(char: str) -> str:
    """Return the ASCII replacement of a character."""
    if char in _SPELLINGS or char in _BOX_LINES:
        return _SPELLINGS.get(char) or _BOX_LINES[char]
    if "\u2500" <= char <= "\u257f":  # corners and crossings of boxes
        return "+"
    if "\u2580" <= char <= "\u259f":  # blocks, of bars
        return "#"
    if "\u2800" <= char <= "\u28ff":  # Braille, of spinners
        return "*"
    plain = "".join(part for part in unicodedata.normalize("NFKD", char) if ord(part) < 128)
    return plain.strip() or char.encode("ascii", "backslashreplace").decode("ascii")


def _spell(err: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(err, UnicodeEncodeError):
        raise err
    char = err.object[err.start]
    if "\udc80" <= char <= "\udcff":  # a byte of a path that is not valid text: unchanged
        return bytes([ord(char) - 0xDC00]), err.start + 1
    return _spelling(char), err.start + 1


def print_json(text: str) -> None:
    """Print a JSON document: as UTF-8, or with escapes when standard output has another encoding."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    is_utf8 = codecs.lookup(encoding).name == "utf-8"
    beyond = r"[\ud800-\udfff]" if is_utf8 else r"[^\x00-\x7f]"
    print(re.sub(beyond, lambda char: json.dumps(char[0])[1:-1], text), end="")


class _Guarded:
    """A text stream that raises a GcbenchError, once, when writing fails; other attributes are the stream's own."""

    def __init__(self, stream: TextIO | None, *, is_forgiving: bool) -> None:
        self.is_closed = stream is None
        self._stream = _nowhere() if stream is None else stream
        self._is_forgiving = is_forgiving
        self._has_failed = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        if not self._has_failed:
            with self._errors_converted():
                self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        if not self._has_failed:
            with self._errors_converted():
                self._stream.flush()

    @contextmanager
    def _errors_converted(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            self._silence()
            raise ReaderGone from None
        except OSError as err:
            self._silence()
            if not self._is_forgiving:
                raise OutputError(
                    f"standard output cannot be written ({err.strerror or err}); redirect it to another file"
                ) from None

    def _silence(self) -> None:
        """Discard later output: the interpreter writes once more as it exits."""
        self._has_failed = True
        with suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


@contextmanager
def guarded() -> Iterator[None]:
    """Guard both streams inside the block: they write in any encoding, and a failure is a GcbenchError.

    Errors of standard error are ignored, except a closed pipe, which raises ReaderGone as well.
    """
    _open_closed_descriptors()
    codecs.register_error(SPELLED, _spell)
    before = sys.stdout, sys.stderr
    errors = [getattr(stream, "errors", None) for stream in before]
    for stream in before:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=SPELLED)
    sys.stdout = cast(TextIO, _Guarded(before[0], is_forgiving=False))
    sys.stderr = cast(TextIO, _Guarded(before[1], is_forgiving=True))
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream, used in zip(before, errors, strict=True):
            if hasattr(stream, "reconfigure"):
                with suppress(OSError):
                    stream.reconfigure(errors=used)


def require_output() -> None:
    """Raise OutputError when standard output is closed, before an hour of measuring and not after it."""
    if getattr(sys.stdout, "is_closed", False):
        raise OutputError("standard output is closed; redirect it to a file, or to /dev/null")


def _nowhere() -> TextIO:
    return Path(os.devnull).open("w", encoding="utf-8")


def _open_closed_descriptors() -> None:
    """Open the null device as 0, 1 and 2 if these are closed; otherwise the next open file would get such a number."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError as err:
            if err.errno != errno.EBADF:
                raise
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)


@contextmanager
def stored_in(folder: object) -> Iterator[None]:
    """Add `folder`, where the results are already stored, to an OutputError of the block that prints them."""
    try:
        yield
    except OutputError as err:
        raise OutputError(f"{err}; the results are in {folder}") from None


def print_error(err: GcbenchError) -> None:
    """Print an error on standard error: a sentence, or a list of sentences."""
    print(f"error: {err}" if "\n" not in str(err) else f"error:\n{err}", file=sys.stderr)
