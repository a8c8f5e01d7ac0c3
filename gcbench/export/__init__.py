"""Write the choice of `gcbench plan` as settings of a training tool. One file per target.

Every module has `NAME`, `TOOL` (its name in sentences), `refusal(training)` (why it cannot run this workload at all,
with the remedy), `why_not(plan, handover)` (what of a plan it cannot express, worded to follow its name) and
`render(rival, handover)`. What a tool can express was read in its source; each module names the version.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

from gcbench.core.errors import UsageError
from gcbench.core.plugins import modules
from gcbench.core.units import format_percent
from gcbench.export._handover import Handover, Rival, Training


@dataclass(frozen=True, kw_only=True)
class Emitted:
    """Settings of a tool, ready to print.

    Attributes:
        text: a config file, command or program, newline included.
        expressed: the setting in the text: the choice, or the best of its rivals that the tool can express.
        notice: why that is not the choice, and what it costs; None when it is the choice.
    """

    text: str
    expressed: Rival
    notice: str | None


def names() -> tuple[str, ...]:
    """Return the name of every target."""
    return tuple(module.NAME for module in modules(__name__))


def check(target: str, training: Training) -> None:
    """Raise UsageError when the tool cannot run this workload with any plan."""
    tool = _tool(target)
    refusal = tool.refusal(training)
    if refusal is not None:
        raise UsageError(f"--emit {target}: {refusal}")


def _tool(target: str) -> ModuleType:
    return {module.NAME: module for module in modules(__name__)}[target]


def emit(target: str, handover: Handover) -> Emitted:
    """Return the choice as settings of `target`, or the best of its rivals that the tool can express.

    Raises KeyError when there is no such target; UsageError when the tool cannot run this workload, or can express
    none of the settings that fit.
    """
    check(target, handover)
    tool = _tool(target)
    why = tool.why_not(handover.choice.plan, handover)
    if why is None:
        return Emitted(text=tool.render(handover.choice, handover), expressed=handover.choice, notice=None)
    for rival in handover.rivals:
        if tool.why_not(rival.plan, handover) is None:
            nearest = f"{rival.strategy} at batch {rival.batch_size}: {_cost(rival)}"
            notice = f"{tool.TOOL} {why}; the nearest it can express is {nearest}."
            return Emitted(text=tool.render(rival, handover), expressed=rival, notice=notice)
    raise UsageError(
        f"--emit {target}: {tool.TOOL} {why}, and nothing else that it can express fits; use --emit python, which "
        "expresses every plan"
    )


def _cost(rival: Rival) -> str:
    lost = 1 - rival.tokens_per_s_frac
    if abs(lost) < 0.0005:
        return "as many tokens/s"
    return f"{format_percent(abs(lost))} {'fewer' if lost > 0 else 'more'} tokens/s"
