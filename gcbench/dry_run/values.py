"""Tells in words where a run depends on values, which an emulated card does not compute."""

from __future__ import annotations

from collections.abc import Sequence

from gcbench.dry_run.records import Read

SIZES = ("nonzero", "unique", "unique_consecutive", "masked_select", "argwhere", "mask")
_LISTS = ("tolist", "cpu", "int", "index")
_MODEL_CODE = ("/models/", "/integrations/", "modeling_")
"""Parts of the paths of a library's model code, as opposed to its trainer."""
_BESIDE_TRAINING = ("accelerate", "trl", "peft", "datasets", "tqdm")
"""Packages whose reads are for logging."""


def told(reads: Sequence[Read]) -> list[tuple[Read, str]]:
    """Return the reads that may change what is allocated, those of the user's own code first, each in words."""
    found = [(read, text) for read in reads if (text := _words(read)) is not None]
    return sorted(found, key=lambda each: (each[0].library is not None, each[0].condition != "while", -each[0].count))


def _words(read: Read) -> str | None:
    times = "once" if read.count == 1 else f"{read.count:,} times"
    if read.kind in SIZES:
        what = "an index by a mask" if read.kind == "mask" else f"torch.{read.kind}"
        return f"the size of {what} depends on values; it selected nothing here ({times})"
    if read.condition is not None and (read.library is None or read.kind == "bool"):
        if read.library in _BESIDE_TRAINING:
            return None
        return f"the condition ({read.condition}) reads a value; it was taken as {read.answer} ({times})"
    if read.kind in ("tolist", "cpu") and read.library is None:
        return f"values are copied from the card ({read.kind}), for what follows; they were {read.answer} ({times})"
    is_model = read.library is not None and any(part in read.file for part in _MODEL_CODE)
    if read.kind in _LISTS and is_model:
        return f"the model reads values ({read.kind}), which decide what follows; they were {read.answer} ({times})"
    return None
