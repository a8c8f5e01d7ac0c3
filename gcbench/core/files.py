"""Writes a file atomically, makes a temporary folder, and finds the user's cache folder. No torch."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from gcbench.core.errors import UnavailableError


def write_text(path: Path, text: str) -> None:
    """Replace the content of `path` atomically; raises OSError and leaves the old content on failure.

    Bytes of file names that are not valid text are written unchanged, in JSON as escapes.
    """
    errors = "backslashreplace" if path.suffix == ".json" else "surrogateescape"
    write_bytes(path, text.encode("utf-8", errors))


def write_bytes(path: Path, content: bytes) -> None:
    """Replace the content of `path` atomically; raises OSError and leaves the old content on failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def temporary_folder() -> Path:
    """Make a private folder, which the caller removes; raises UnavailableError where that is impossible."""
    try:
        return Path(tempfile.mkdtemp(prefix="gcbench-"))
    except OSError as err:
        raise UnavailableError(
            f"no temporary folder can be created ({err.strerror}); set TMPDIR to a folder with free space"
        ) from None


def cache_folder() -> Path:
    """Return gcbench's folder in the user's cache folder (XDG base directory specification)."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "gcbench"
