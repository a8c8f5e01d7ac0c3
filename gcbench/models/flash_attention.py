"""Predict `flash_attention_2` on a card with torch's built-in flash kernel in place of the package. No torch.

The package's kernel is the one that torch has built in: it saves the same tensors and allocates the same buffers
(flash_api.cpp in both), so the package need not be installed for a prediction.
"""

from __future__ import annotations

from collections.abc import Sequence

from gcbench import strategies
from gcbench.core.errors import UsageError
from gcbench.devices.target import Target

FLASH, FLEX = "flash_attention_2", "flex_attention"
STAND_IN = "gcbench_fa2"
"""Name of the replacement among transformers' attention implementations; "flash" in it would require the package."""
NOTICE = f"{FLASH} is predicted with torch's own flash kernel, which needs the same memory; no package is needed."
_OTHER_PACKAGES = ("flash_attention_3", "flash_attention_4")
_OLDEST = (8, 0)


def is_stood_in(attn_implementation: str | None, target: Target | None) -> bool:
    """Return whether a prediction for `target` traces torch's kernel in place of the package's."""
    return attn_implementation == FLASH and _is_card(target)


def traced_as(attn_implementation: str | None, target: Target | None) -> str | None:
    """Return the attention implementation to build the model with in a prediction for `target`."""
    return STAND_IN if is_stood_in(attn_implementation, target) else attn_implementation


def check_plan(attn_implementation: str | None, target: Target | None) -> None:
    """Raise UsageError for an attention implementation for which plans cannot be searched on `target`."""
    if attn_implementation == FLEX or (attn_implementation in (FLASH, *_OTHER_PACKAGES) and _is_card(target)):
        raise UsageError(
            f"--attn-implementation {attn_implementation}: a plan names operators inside the layers, and this one's "
            "are not torch's; plan with sdpa, which needs the same memory when it selects the flash kernel"
        )


def _is_card(target: Target | None) -> bool:
    return target is not None and target.kind == "cuda"


def check(attn_implementation: str | None, target: Target | None, *, precision: str, specs: Sequence[str]) -> None:
    """Raise UsageError for an attention implementation that cannot be predicted on `target` with these strategies."""
    flag = f"--attn-implementation {attn_implementation}"
    if attn_implementation == FLEX:
        raise UsageError(
            f"{flag} cannot be predicted: torch traces its backward pass on a GPU only; use sdpa, or measure it with "
            "gcbench run"
        )
    if target is None or not _is_card(target):
        return
    if attn_implementation is not None and "/" in attn_implementation:
        raise UsageError(f"{flag} is a kernel from the hub, which is not predicted; use {FLASH} or leave the flag out")
    if attn_implementation in _OTHER_PACKAGES:
        raise UsageError(f"{flag} is not predicted; use {FLASH}, or leave the flag out")
    if attn_implementation != FLASH:
        return
    if target.capability is not None and target.capability < _OLDEST:
        raise UsageError(f"{flag} does not run on {target.name}, which is older than Ampere; leave the flag out")
    if precision == "fp32":
        raise UsageError(f"{flag} only computes in 16 bits; add --precision bf16 or bf16-mixed")
    saving = [spec for spec in specs if strategies.parse(spec).operators]
    if saving:
        raise UsageError(
            f"{flag} runs operators of its package, and {saving[0]} saves none of them; leave that strategy out, or "
            "use sdpa"
        )
