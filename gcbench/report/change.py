"""The record of what changed in one cell between two runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gcbench.core import model_changes as changes
from gcbench.report import sentences as words

Verdict = Literal[
    "same",
    "better",
    "worse",
    "above",
    "below",
    "no difference shown",
    "too few rounds",
    "only in A",
    "only in B",
    "newly failing",
    "newly passing",
    "both fail",
    "not measured",
]
"""`same`: memory is equal to the byte. `above`, `below`: figures from different sources. `too few rounds`: times have
no interval. `not measured`: both runs passed without that figure."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """One cell of A, of B or of both; fractions are relative to A, positive when B takes more. Unknown is None.

    Attributes:
        precision, device: None when the runs differ in it and were compared by force.
        status_a, status_b: `ok`, a failure kind or `proof failed`; None where the run does not have the cell.
    """

    model: str
    strategy: str
    device: str | None
    batch_size: int
    seq_len: int
    precision: str | None
    optim: str
    attn_implementation: str | None
    status_a: str | None
    status_b: str | None
    memory_verdict: Verdict
    time_verdict: Verdict
    peak_allocated_a_bytes: int | None
    peak_allocated_b_bytes: int | None
    memory_change_frac: float | None
    step_time_a_s: float | None
    step_time_b_s: float | None
    time_change_frac: float | None
    time_change_low_frac: float | None
    time_change_high_frac: float | None
    lora_r: int | None = None
    model_changes_a: str | None = None
    model_changes_b: str | None = None
    time_change_basis: str | None = None
    """What the change of time is of: `processor time` or `wall time`."""

    @property
    def name(self) -> str:
        """The model, with the changes to its config."""
        a, b = self.model_changes_a, self.model_changes_b
        if a == b or self.status_b is None:
            return changes.named(self.model, a)
        if self.status_a is None:
            return changes.named(self.model, b)
        return f"{self.model} (A with {a or 'no changes'}; B with {b or 'no changes'})"

    @property
    def cell(self) -> str:
        """The cell's workload, as a title."""
        parts = [self.name, f"batch {self.batch_size} × {self.seq_len} tokens", self.precision, self.optim]
        parts += [words.lora(self.lora_r) if self.lora_r is not None else None, self.attn_implementation, self.device]
        return " · ".join(part for part in parts if part is not None)
