"""Why a predicted peak is what it is: what is alive there, which change would move it, and what was added unseen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from typing import TYPE_CHECKING

from gcbench.core.prediction import LayerShare, Prediction, Share, Term
from gcbench.core.records import Report
from gcbench.core.units import counted, format_bytes, format_percent
from gcbench.report.predictions import NOTHING, PredictedCell, checkpointing_lever, where
from gcbench.report.sentences import listed

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType

REST = "all else"
"""Together, the kinds that are too small to be told apart."""
UNSEEN = "Added to every figure, as no operator of the step shows it:"

_TOO_SMALL, _NOT_WRITTEN = 0.005, 0.0005
"""Of the peak: what is told together, and what would read 0.0 %."""
_MOST_AMOUNTS = 6
"""Different amounts that layers keep, told one by one."""
_MOST_NUMBERS = 4
"""Layers told by their numbers, where these are not in a row."""
_LONGEST_BAR, _SHORTEST_BAR = 24, 6
_GAP = 2
_LABEL_WIDTH = 12

_SUBJECTS = {
    "parameters": "the parameters take",
    "inputs, buffers, workspaces": "inputs, buffers and workspaces take",
    "optimizer state": "the optimizer state takes",
    "gradients": "the gradients take",
    "boundaries": "the boundaries take",
    "kept activations": "the kept activations take",
    "logits and loss": "the logits take",
    "recomputed activations": "the recomputed activations take",
    "temporaries": "temporaries take",
}
_MOVES = {"a loss": "logits and loss", "checkpointing": "kept activations", "the fused optimizer": "temporaries"}
"""How a lever's name begins, and the kind of memory that it moves."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """What is told of one cell, or of several that are alike.

    Attributes:
        shares: what is alive at the peak, largest first, with what is too small to matter as one.
        facts: (what it is about, text).
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
        """A line per share: its kind, percent and size, and a bar where there is room."""
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


def blocks(cells: Sequence[PredictedCell], *, tried: bool = True) -> list[Block]:
    """What is told of the cells of one workload, alike ones once; `tried` where levers were looked for."""
    found: dict[Block, list[str]] = {}
    for cell in cells:
        block = _block(cell, tried=tried)
        if block is not None:
            found.setdefault(block, []).append(cell.row.strategy)
    return [replace(block, strategies=tuple(strategies)) for block, strategies in found.items()]


def terms(report: Report) -> tuple[Term, ...]:
    """What was added to the figures that the trace cannot see, each once."""
    said = [outcome.prediction for outcome in report.outcomes if outcome.prediction]
    return tuple(dict.fromkeys(term for prediction in said for term in prediction.terms))


def term_list(report: Report) -> list[RenderableType]:
    """The terms as a list for the screen; empty where there are none."""
    from rich.padding import Padding
    from rich.text import Text

    parts: list[RenderableType] = []
    for source, alike in groupby(terms(report), key=lambda term: term.source):
        lines = [f"{term.name}: {format_bytes(term.nbytes)}, {side(term)}" for term in alike]
        parts.append(Padding(Text("\n".join(lines)), (0, 0, 0, _GAP)))
        parts.append(Padding(Text(source), (0, 0, 0, 2 * _GAP)))
    return [Text(UNSEEN), *parts, Text("")] if parts else []


def side(term: Term) -> str:
    """Whether it counts for the allocator, or for the process alone."""
    return "in the allocator" if term.in_allocator else "outside the allocator"


def lever_sentence(cell: PredictedCell, *, tried: bool = True) -> str | None:
    """What takes most that a change could move, and what each change would save; None where there is nothing to say."""
    prediction = cell.prediction
    said = prediction.explanation if prediction else None
    if prediction is None or said is None or not said.shares:
        return None
    now = prediction.memory.allocated_bytes
    sizes = {share.kind: share.nbytes for share in said.shares}
    by_gain = sorted(said.levers, key=lambda lever: (lever.peak_bytes, -sizes.get(_moved(lever.name) or "", 0)))
    gains = [_gain(lever.name, now - lever.peak_bytes, now) for lever in by_gain]
    effective = [lever for lever in by_gain if now - lever.peak_bytes >= NOTHING * now]
    subject = _subject(said.shares, effective[0].name if effective else None, now)
    already = checkpointing_lever(prediction) is None and 0 < cell.row.num_layers <= cell.row.layers_checkpointed
    if gains:
        return f"{subject}: {', '.join(gains)}" + ("; every layer is checkpointed already" if already else "")
    if not tried:
        return None
    return f"{subject}, and no change that was tried lowers it" + (": every layer is checkpointed" if already else "")


def kept_text(kept: Sequence[LayerShare]) -> str:
    """`layers 0 to 31: 32.0 MiB each`, with the layers that keep the same told together."""
    by_size: dict[int, list[int]] = {}
    for run in kept:
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
    """How many layers the answer was made from."""
    if prediction.why_in_full is not None:
        return f"every layer traced: {prediction.why_in_full}"
    if prediction.layers_traced >= num_layers:
        return "every layer traced"
    return f"{prediction.layers_traced} of {num_layers} layers traced for all"


def _block(cell: PredictedCell, *, tried: bool) -> Block | None:
    prediction = cell.prediction
    said = prediction.explanation if prediction else None
    if prediction is None or said is None:
        return None
    peak = prediction.memory.allocated_bytes
    attention = ", ".join(
        f"{kernel} ({counted(count, 'call')} traced)" for kernel, count in prediction.attention.items()
    )
    facts = (
        ("operator", said.op),
        ("layers keep", kept_text(said.kept)),
        ("levers", lever_sentence(cell, tried=tried)),
        ("attention", attention),
        ("made from", traced_text(prediction, cell.row.num_layers)),
    )
    return Block(
        strategies=(),
        peak_bytes=peak,
        place=where(cell),
        shares=_told_apart(said.shares, peak),
        facts=tuple((name, text) for name, text in facts if text),
    )


def _told_apart(shares: Sequence[Share], peak: int) -> tuple[Share, ...]:
    large = [share for share in shares if share.nbytes >= _TOO_SMALL * peak]
    small = [share for share in shares if share.nbytes < _TOO_SMALL * peak]
    rest = sum(share.nbytes for share in small)
    if rest < _NOT_WRITTEN * peak:
        return tuple(large)
    return (*large, *small) if len(small) == 1 else (*large, Share(kind=REST, nbytes=rest))


def _subject(shares: Sequence[Share], lever: str | None, peak: int) -> str:
    """`the logits take 61 % of the peak`: the kind that the best lever moves, or the largest."""
    moved = _moved(lever) if lever else None
    share = next((share for share in shares if share.kind == moved), shares[0])
    subject = _SUBJECTS.get(share.kind, f"{share.kind} take")
    return f"{subject} {format_percent(share.nbytes / peak)} of the peak"


def _moved(lever: str) -> str | None:
    """The kind of memory that a lever moves."""
    return next((kind for start, kind in _MOVES.items() if lever.startswith(start)), None)


def _gain(name: str, saved: int, peak: int) -> str:
    """`a loss in 8 chunks saves 4.10 GiB`."""
    change = name.replace("a loss computed in", "a loss in")
    if saved >= NOTHING * peak:
        return f"{change} saves {format_bytes(saved)}"
    if saved > -NOTHING * peak:
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
    """A name, and beside it a text that may take several lines."""
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, _GAP, 0, 0))
    grid.add_column(width=_LABEL_WIDTH)
    grid.add_column(overflow="fold")
    grid.add_row(Text(name), Text(text))
    return grid
