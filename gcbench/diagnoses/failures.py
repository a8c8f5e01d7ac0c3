"""Turn an unexpected exception into a failure with its known cause, or with its traceback. No torch."""

from __future__ import annotations

import traceback

from gcbench.core.records import Failure
from gcbench.diagnoses.known_causes import Observation, diagnose

_VALUES_UNKNOWN = "nothing is computed on an emulated card, so code that reads values of tensors may fail only there"


NEEDS_TRITON = "compiled layers need the package triton, which is not installed; run pip install triton"


def lacks_triton(err: BaseException) -> bool:
    """Return whether the compiler for a card found no triton, which `pip install --no-deps torch` leaves out."""
    return type(err).__name__ == "TritonMissing"


def with_doubt(message: str, err: BaseException) -> str:
    """Add to the message of a failure on an emulated card that the card may be the cause; a library's own error class
    tells of something else."""
    return f"{message}; {_VALUES_UNKNOWN}" if type(err).__module__ == "builtins" else message


def crash(err: BaseException, strategy: str = "", *, lora: bool = False) -> Failure:
    """Return the failure of a cell whose code raised an unexpected exception."""
    text = str(err).strip() or type(err).__name__
    known = diagnose(
        Observation.of_strategy(
            strategy,
            error_type=type(err).__name__,
            error_text=text,
            frozen_base=lora,
        )
    )
    advice = f". {known.cause} {known.remedy} See {known.link}" if known else "; the full traceback is in report.json"
    return Failure(
        kind="crash",
        message=f"{type(err).__name__}: {text.splitlines()[0][:300].rstrip('.')}{advice}",
        detail="".join(traceback.format_exception(err)),
    )
