"""Explains a predicted peak: what is allocated there, what would reduce it, and what was added outside the trace."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from typing import TYPE_CHECKING

from gcbench.core.prediction import LayerShare, Prediction, Share, Term
from gcbench.core.records import Report
from gcbench.core.units import counted, format_bytes, format_percent
from gcbench.report.predictions import NEGLIGIBLE_FRAC, PredictedCell, checkpointing_lever, where
from gcbench.report.sentences import listed

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType

REST = "all else"
"""The sum of the kinds that are too small to list."""
OUTSIDE_TRACE = "Added to every figure, because no operator of the traced step allocates it:"

_SMALL_FRAC, _INVISIBLE_FRAC = 0.005, 0.0005
"""Fractions of the peak: smaller kinds are summed up, and a sum that would read 0.0 % is left out."""
_MOST_AMOUNTS = 6
"""Up to so many different amounts that layers save are listed one by one."""
_MOST_NUMBERS = 4
"""Up to so many layers that are not consecutive are listed by number."""
_LONGEST_BAR, _SHORTEST_BAR = 24, 6
_GAP = 2
_LABEL_WIDTH = 15

_KIND_NAMES = {"boundaries": "layer inputs", "kept activations": "saved activations"}
"""Kinds of memory that stored reports have under another name than tables and plots."""

_SUBJECTS = {
    "parameters": "the parameters take",
    "inputs, buffers, workspaces": "inputs, buffers and workspaces take",
    "optimizer state": "the optimizer state takes",
    "gradients": "the gradients take",
    "layer inputs": "the layer inputs take",
    "saved activations": "the saved activations take",
    "logits and loss": "the logits take",
    "recomputed activations": "the recomputed activations take",
    "temporaries": "temporaries take",
}
_MOVES = {"a loss": "logits and loss", "checkpointing": "saved activations", "the fused optimizer": "temporaries"}
"""How the name of a lever begins -> the kind of memory that it reduces."""


@dataclass(frozen=True, kw_only=True)
class PeakExplanation:
    """The explanation of one cell's peak, or of several identical ones.

    Attributes:
        shares: what is allocated at the peak, largest first, with small kinds summed up.
        facts: (label, text).
    """

    strategies: tuple[str, ...]
    peak_bytes: int
    place: str
    shares: tuple[Share, ...]
    facts: tuple[tuple[str, str], ...]

    @property
    def heading(self) -> str:
        """`off: 3.45 GiB in the loss and logits (backward pass)`."""
        return f"{', '.join(self.strategies)}: {format_bytes(self.peak_bytes)} {self.place}"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        from rich.padding import Padding
        from rich.text import Text

        yield Text(self.heading, style="bold")
        yield Padding(Text(self._bars(options.max_width - _GAP)), (0, 0, 0, _GAP))
        for name, text in self.facts:
            yield Padding(_hanging(name, text), (0, 0, 0, _GAP))
        yield Text("")

    def _bars(self, width: int) -> str:
        """Return a line per share: kind, percent, size, and a bar where there is room."""
        rows = [(s.kind, format_percent(s.nbytes / self.peak_bytes), format_bytes(s.nbytes)) for s in self.shares]
        kind, percent, size = (max(len(row[place]) for row in rows) for place in range(3))
        room = min(width - kind - percent - size - 3 * _GAP, _LONGEST_BAR)
        largest = max(share.nbytes for share in self.shares)
        lines = []
        for share, row in zip(self.shares, rows, strict=True):
            bar = "▇" * round(room * share.nbytes / largest) or "▏" if room >= _SHORTEST_BAR else ""
            cells = (row[0].ljust(kind), row[1].rjust(percent), row[2].rjust(size), bar)
            lines.append((" " * _GAP).join(cells).rstrip())
        return "\n".join(lines)


def explanations(cells: Sequence[PredictedCell], *, tried: bool = True) -> list[PeakExplanation]:
    """Explain the peaks of one workload, identical ones once; `tried` says whether levers were searched for."""
    strategies: dict[PeakExplanation, list[str]] = {}
    for cell in cells:
        explained = _explained(cell, tried=tried)
        if explained is not None:
            strategies.setdefault(explained, []).append(cell.row.strategy)
    return [replace(explained, strategies=tuple(names)) for explained, names in strategies.items()]


def kind_name(kind: str) -> str:
    """Return the name that tables and plots use for a kind of memory."""
    return _KIND_NAMES.get(kind, kind)


def terms(report: Report) -> tuple[Term, ...]:
    """Return what was added to the figures for memory outside the trace, each term once."""
    predictions = [outcome.prediction for outcome in report.outcomes if outcome.prediction]
    return tuple(dict.fromkeys(term for prediction in predictions for term in prediction.terms))


def term_list(report: Report) -> list[RenderableType]:
    """Render the terms for the screen; empty where there are none."""
    from rich.padding import Padding
    from rich.text import Text

    parts: list[RenderableType] = []
    for source, group in groupby(terms(report), key=lambda term: term.source):
        lines = [f"{term.name}: {format_bytes(term.nbytes)}, {side(term)}" for term in group]
        parts.append(Padding(Text("\n".join(lines)), (0, 0, 0, _GAP)))
        parts.append(Padding(Text(source), (0, 0, 0, 2 * _GAP)))
    return [Text(OUTSIDE_TRACE), *parts, Text("")] if parts else []


def side(term: Term) -> str:
    """Return whether a term is part of the allocator's memory or only of the process's."""
    return "in the allocator" if term.in_allocator else "outside the allocator"


def lever_sentence(cell: PredictedCell, *, tried: bool = True) -> str | None:
    """Return which memory a change could reduce and what each change would save; None where nothing was tried."""
    prediction = cell.prediction
    explanation = prediction.explanation if prediction else None
    if prediction is None or explanation is None or not explanation.shares:
        return None
    now, shares = prediction.memory.allocated_bytes, _named(explanation.shares)
    sizes = {share.kind: share.nbytes for share in shares}
    by_gain = sorted(explanation.levers, key=lambda lever: (lever.peak_bytes, -sizes.get(_moved(lever.name) or "", 0)))
    gains = [_gain(lever.name, now - lever.peak_bytes, now) for lever in by_gain]
    effective = [lever for lever in by_gain if now - lever.peak_bytes >= NEGLIGIBLE_FRAC * now]
    subject = _subject(shares, effective[0].name if effective else None, now)
    already = checkpointing_lever(prediction) is None and 0 < cell.row.num_layers <= cell.row.layers_checkpointed
    if gains:
        return f"{subject}: {', '.join(gains)}" + ("; every layer is checkpointed already" if already else "")
    if not tried:
        return None
    return f"{subject}, and no change that was tried reduces it" + (": every layer is checkpointed" if already else "")


def saved_text(runs: Sequence[LayerShare]) -> str:
    """Return `layers 0 to 31: 32.0 MiB each`, with layers that save the same amount listed together."""
    by_size: dict[int, list[int]] = {}
    for run in runs:
        by_size.setdefault(run.nbytes, []).extend(range(run.first, run.last + 1))
    if len(by_size) > _MOST_AMOUNTS:
        least, most = min(by_size), max(by_size)
        total = sum(nbytes * len(layers) for nbytes, layers in by_size.items())
        return (
            f"from {format_bytes(least)} ({_layers(by_size[least])}) to {format_bytes(most)} "
            f"({_layers(by_size[most])}) each, {format_bytes(total)} in all"
        )
    return "; ".join(
        f"{_layers(layers)}: {format_bytes(nbytes)}{' each' if len(layers) > 1 else ''}"
        for nbytes, layers in by_size.items()
    )


def traced_text(prediction: Prediction, num_layers: int) -> str:
    """Return how many layers were traced, and why if it was every one."""
    if prediction.why_in_full is not None:
        return f"every layer: {prediction.why_in_full}"
    if prediction.layers_traced >= num_layers:
        return "every layer"
    return f"{prediction.layers_traced} of {num_layers} layers, which represent the rest"


def _explained(cell: PredictedCell, *, tried: bool) -> PeakExplanation | None:
    prediction = cell.prediction
    explanation = prediction.explanation if prediction else None
    if prediction is None or explanation is None:
        return None
    peak = prediction.memory.allocated_bytes
    attention = ", ".join(
        f"{kernel} ({counted(count, 'call')} traced)" for kernel, count in prediction.attention.items()
    )
    facts = (
        ("operator", explanation.op),
        ("saved by layers", saved_text(explanation.kept)),
        ("would reduce it", lever_sentence(cell, tried=tried)),
        ("attention", attention),
        ("traced", traced_text(prediction, cell.row.num_layers)),
    )
    return PeakExplanation(
        strategies=(),
        peak_bytes=peak,
        place=where(cell),
        shares=_with_small_ones_summed(_named(explanation.shares), peak),
        facts=tuple((name, text) for name, text in facts if text),
    )


def _named(shares: Sequence[Share]) -> tuple[Share, ...]:
    return tuple(replace(share, kind=kind_name(share.kind)) for share in shares)


def _with_small_ones_summed(shares: Sequence[Share], peak: int) -> tuple[Share, ...]:
    large = [share for share in shares if share.nbytes >= _SMALL_FRAC * peak]
    small = [share for share in shares if share.nbytes < _SMALL_FRAC * peak]
    rest = sum(share.nbytes for share in small)
    if rest < _INVISIBLE_FRAC * peak:
        return tuple(large)
    return (*large, *small) if len(small) == 1 else (*large, Share(kind=REST, nbytes=rest))


def _subject(shares: Sequence[Share], lever: str | None, peak: int) -> str:
    """Return `the logits take 61 % of the peak`, for the kind that the best lever reduces, or the largest."""
    moved = _moved(lever) if lever else None
    share = next((share for share in shares if share.kind == moved), shares[0])
    subject = _SUBJECTS.get(share.kind, f"{share.kind} take")
    return f"{subject} {format_percent(share.nbytes / peak)} of the peak"


def _moved(lever: str) -> str | None:
    """Return the kind of memory that a lever reduces."""
    return next((kind for start, kind in _MOVES.items() if lever.startswith(start)), None)


def _gain(name: str, saved: int, peak: int) -> str:
    """Return `a loss in 8 chunks saves 4.10 GiB`."""
    change = name.replace("a loss computed in", "a loss in")
    if saved >= NEGLIGIBLE_FRAC * peak:
        return f"{change} saves {format_bytes(saved)}"
    if saved > -NEGLIGIBLE_FRAC * peak:
        return f"{change.replace('checkpointing every layer', 'checkpointing more')} saves nothing"
    return f"{change} adds {format_bytes(-saved)}"


def _layers(layers: Sequence[int]) -> str:
    if len(layers) == 1:
        return f"layer {layers[0]}"
    steps = {later - earlier for earlier, later in pairwise(layers)}
    if steps == {1}:
        return f"layers {layers[0]} to {layers[-1]}"
    if len(layers) <= _MOST_NUMBERS:
        return f"layers {listed([str(layer) for layer in layers])}"
    if len(steps) == 1:
        return f"layers {layers[0]}, {layers[1]} … {layers[-1]}"
    return f"{len(layers)} of the layers {layers[0]} to {layers[-1]}"


def _hanging(name: str, text: str) -> RenderableType:
    """Render a label, and beside it a text that may take several lines."""
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, _GAP, 0, 0))
    grid.add_column(width=_LABEL_WIDTH)
    grid.add_column(overflow="fold")
    grid.add_row(Text(name), Text(text))
    return grid
