"""Estimates how long operators take, from the work of each call and a device's figures. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

from gcbench.devices.cards import Card
from gcbench.simulate import kernel_times

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
        """Estimate the seconds of one call on the device."""

    def host_s(self, work: Work) -> float:
        """Estimate the seconds that the processor takes to launch one call; 0 where it computes the call itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Times:
    """Seconds of calls: those of the device, and those that the processor takes to launch them."""

    device_s: float
    host_s: float


def times(works: Iterable[Work], figures: Figures) -> Times:
    """Estimate the seconds of all of them, on the device and on the processor that launches them."""
    known: dict[Work, tuple[float, float]] = {}
    device_s = host_s = 0.0
    for work in works:
        found = known.get(work)
        if found is None:
            found = known[work] = (figures.seconds(work), figures.host_s(work))
        device_s += found[0]
        host_s += found[1]
    return Times(device_s=device_s, host_s=host_s)


def total(works: Iterable[Work], figures: Figures) -> float:
    """Estimate the seconds of all of them on the device, one after the other."""
    return times(works, figures).device_s


LAUNCH_S = 5e-6
"""The shortest time of a kernel, by judgement; no source or card has confirmed it."""
_OF_PEAK_MATMUL = 0.8
_OF_PEAK_BANDWIDTH = 0.85
"""Achievable shares of the peak rates without a published measurement: those of other cards, rounded down."""
_WITHOUT_KERNEL = frozenset(
    (
        *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh", "set_"),
        *("_record_function_enter_new", "_record_function_exit"),
    )
)
"""Operators that are no views and run nothing on a card: they allocate memory, or note where a profile begins."""
_MOST_COMMON_SMS = 108
"""Multiprocessors of an A100, for a card whose number is not known."""
_UNKNOWN_CARD = Card(
    name="cuda", memory_bytes=0, bandwidth_bytes_per_s=1555e9, matmul_flops={"fp32": 19.5e12, "bf16": 312e12}
)
"""Represents a card of which only the memory is known: an A100's rates, whose ratio of arithmetic to bandwidth is in
the middle of the catalogue's."""


class CardFigures:
    """Estimates times from a card's published rates, one operator at a time.

    A memory-bound kernel takes the time of its traffic. A product takes the time of its arithmetic at the rate that its
    shape reaches (`kernel_times`), and of its traffic, which overlap in part: the root of the sum of their squares.
    With it, 802816 x 192 x 768 reaches 161 TFLOP/s on an A100, where 157.8 were measured (source in `kernel_times`) and
    a roofline (Williams et al. 2009) gives 218. Attention takes the longer of both. No kernel is shorter than a launch.
    """

    step_s = 0.0
    """None: what Python takes beyond its calls, it takes while the card computes."""

    def __init__(self, card: Card | None) -> None:
        """Without a card, or for one whose rates are not known, those of an average card are used: see `is_known`."""
        self.card = card or _UNKNOWN_CARD
        self.is_known = card is not None and bool(card.matmul_flops and card.bandwidth_bytes_per_s)
        self._num_sms = self.card.num_sms or _MOST_COMMON_SMS
        self._capability = _capability(self.card)

    @property
    def source(self) -> str:
        """The source of the figures, in words."""
        if not self.is_known:
            return "the rates of an A100, since the card's are not known"
        return f"the published rates of {self.card.title}"

    def seconds(self, work: Work) -> float:
        """Estimate the seconds of one call on the card."""
        if work.kind == "view" or work.op in _WITHOUT_KERNEL:
            return 0.0
        if work.kind == "pointwise":
            return max(work.nbytes / (kernel_times.EAGER_BANDWIDTH_SHARE * self.bandwidth), LAUNCH_S)
        rate, traffic = self.matmul_rate(work.dtype), work.nbytes / self.bandwidth
        if work.kind == "attention":
            share = kernel_times.attention_share(
                work.op, work.dims, dtype=work.dtype, is_causal=work.is_causal, capability=self._capability
            )
            return max(work.flops / (share * rate), traffic, LAUNCH_S)
        return max(math.hypot(work.flops / (self.product_share(work) * rate), traffic), LAUNCH_S)

    def product_share(self, work: Work) -> float:
        """The share of the achievable rate that a product of this shape reaches."""
        return kernel_times.product_share(work.dims, dtype=work.dtype, num_sms=self._num_sms)

    def host_s(self, work: Work) -> float:
        """Estimate the seconds that Python takes to launch one call."""
        return kernel_times.host_s(work.caller, is_view=work.kind == "view")

    @property
    def bandwidth(self) -> float:
        """Achievable bandwidth of a plain copy, in bytes per second."""
        card = self._rates
        return card.achievable_bandwidth_bytes_per_s or _OF_PEAK_BANDWIDTH * (card.bandwidth_bytes_per_s or 0.0)

    def matmul_rate(self, dtype: str) -> float:
        """Achievable operations per second of the product of the best shape."""
        card = self._rates
        for name in (dtype, "fp32"):
            if name in card.achievable_matmul_flops:
                return card.achievable_matmul_flops[name]
            if name in card.matmul_flops:
                return _OF_PEAK_MATMUL * card.matmul_flops[name]
        return _OF_PEAK_MATMUL * max(card.matmul_flops.values())

    @property
    def _rates(self) -> Card:
        return self.card if self.is_known else _UNKNOWN_CARD


def _capability(card: Card) -> tuple[int, int] | None:
    """NVIDIA's compute capability of a card; None for other cards and where it is unknown."""
    major, _, minor = (card.compute_capability or "").partition(".")
    return (int(major), int(minor)) if major.isdecimal() and minor.isdecimal() else None
