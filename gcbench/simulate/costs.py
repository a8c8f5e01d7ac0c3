"""Estimates how long operators take, from the work of each call and a device's figures. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

from gcbench.devices.cards import Card

WorkKind = Literal["matmul", "attention", "pointwise", "view"]
Caller = Literal["model", "checkpoint", "policy", "recompute", "backward", "optimizer"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """The work of one call of an operator: its traffic and its arithmetic.

    Attributes:
        op: its name without `aten::` and without overload, `_backward` included.
        kind: `view` moves nothing; `pointwise` is everything that is neither a view nor a product.
        dtype: of its numbers: `fp32`, `bf16`, `fp16`; another's name in torch otherwise.
        nbytes: bytes read and written, each tensor once.
        flops: floating-point operations of products; 0 for all else.
        dims: (batch, m, n, k) of a product of (m, k) and (k, n); (batch, heads, queries, keys, head size) of attention.
        is_causal: attention in which a token sees only those before it.
        call: the call as text (`gcbench.operators.call_text`), enough to replay it; empty if it cannot be written down.
        cold: bit n is set if the n-th tensor argument was touched so long ago that no cache holds it.
        caller: what calls it: the model's forward pass, a checkpointed group in it, one in which a policy decides on
            every operator, a recomputation, the backward pass, the optimizer.
    """

    op: str
    kind: WorkKind
    dtype: str
    nbytes: int
    flops: int = 0
    dims: tuple[int, ...] = ()
    is_causal: bool = False
    call: str = ""
    cold: int = 0
    caller: Caller = "model"


class Figures(Protocol):
    """A device's times for any work."""

    @property
    def source(self) -> str:
        """The source of the figures, in words."""

    @property
    def step_s(self) -> float:
        """Seconds of a step beyond its calls."""

    def seconds(self, work: Work) -> float:
        """Estimate the seconds of one call."""


def total(works: Iterable[Work], figures: Figures) -> float:
    """Estimate the seconds of all of them, one after the other."""
    known: dict[Work, float] = {}
    seconds = 0.0
    for work in works:
        if work not in known:
            known[work] = figures.seconds(work)
        seconds += known[work]
    return seconds


LAUNCH_S = 5e-6
"""The shortest time of a kernel, by judgement; no source or card has confirmed it."""
_OF_PEAK_MATMUL = 0.8
_OF_PEAK_BANDWIDTH = 0.85
"""Achievable shares of the peak rates without a published measurement: those of other cards, rounded down."""
_ATTENTION = {7: 0.5, 8: 0.70, 9: 0.40, 10: 0.40, 12: 0.55}
"""Share of the matmul rate that attention kernels reach, by major compute capability. FlashAttention-2: 50 to 73 % of
the peak on an A100 (Dao 2023, arXiv:2307.08691), 35 % on an H100 (Shah et al. 2024, arXiv:2407.08608); the others in
between, by judgement."""
_ATTENTION_OTHERWISE = 0.5
_UNKNOWN_CARD = Card(
    name="cuda", memory_bytes=0, bandwidth_bytes_per_s=1555e9, matmul_flops={"fp32": 19.5e12, "bf16": 312e12}
)
"""Represents a card of which only the memory is known: an A100's rates, whose ratio of arithmetic to bandwidth is in
the middle of the catalogue's."""


class CardFigures:
    """Estimates times by the roofline of a card's published rates (Williams et al. 2009), one operator at a time.

    A call's time is that of its arithmetic or of its traffic, whichever is longer, and at least a launch.
    """

    step_s = 0.0
    """None: Python runs ahead of a card."""

    def __init__(self, card: Card | None) -> None:
        self.card = card or _UNKNOWN_CARD
        self._is_known = card is not None and bool(card.matmul_flops)

    @property
    def source(self) -> str:
        """The source of the figures, in words."""
        if not self._is_known:
            return "the rates of an A100, since the card's are not known"
        return f"the published rates of {self.card.title}"

    def seconds(self, work: Work) -> float:
        """Estimate the seconds of one call."""
        if work.kind == "view":
            return 0.0
        traffic = work.nbytes / self.bandwidth
        if work.kind == "pointwise":
            return max(traffic, LAUNCH_S)
        rate = self.matmul_rate(work.dtype)
        if work.kind == "attention":
            rate *= self._attention_share
        return max(work.flops / rate, traffic, LAUNCH_S)

    @property
    def bandwidth(self) -> float:
        """Achievable bandwidth in bytes per second."""
        card = self._rates
        return card.achievable_bandwidth_bytes_per_s or _OF_PEAK_BANDWIDTH * (card.bandwidth_bytes_per_s or 0.0)

    def matmul_rate(self, dtype: str) -> float:
        """Achievable operations per second of a large product."""
        card = self._rates
        for name in (dtype, "fp32"):
            if name in card.achievable_matmul_flops:
                return card.achievable_matmul_flops[name]
            if name in card.matmul_flops:
                return _OF_PEAK_MATMUL * card.matmul_flops[name]
        return _OF_PEAK_MATMUL * max(card.matmul_flops.values())

    @property
    def _rates(self) -> Card:
        return self.card if self._is_known and self.card.bandwidth_bytes_per_s else _UNKNOWN_CARD

    @property
    def _attention_share(self) -> float:
        capability = self.card.compute_capability or ""
        major = capability.partition(".")[0]
        return _ATTENTION.get(int(major), _ATTENTION_OTHERWISE) if major.isdecimal() else _ATTENTION_OTHERWISE
