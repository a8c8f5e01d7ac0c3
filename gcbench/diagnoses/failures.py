"""What an exception means that no measurement expects: the known cause, or the trace. No torch."""

from __future__ import annotations

import traceback

from gcbench.core.records import Failure
from gcbench.diagnoses.known_causes import Observation, diagnose


def crash(err: BaseException, strategy: str = "", *, lora: bool = False) -> Failure:
    """The failure of a cell whose code raised something unexpected."""
    text = str(err).strip() or type(err).__name__
    known = diagnose(
        Observation.of_strategy(
            strategy,
            error_type=type(err).__name__,
            error_text=text,
            frozen_base=lora,
        )
    )
    advice = f". {known.cause} {known.remedy} See {known.link}" if known else "; the whole trace is in report.json"
    return Failure(
        kind="crash",
        message=f"{type(err).__name__}: {text.splitlines()[0][:300].rstrip('.')}{advice}",
        detail="".join(traceback.format_exception(err)),
    )
