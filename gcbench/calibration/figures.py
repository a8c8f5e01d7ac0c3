"""Chooses where operator times come from: a card's measured table, its published rates, or this machine. No torch.

`gcbench plan`, `predict` and `dry-run` all estimate times with what this returns.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from gcbench.calibration import card_tables, op_times
from gcbench.calibration.op_times import Calibration
from gcbench.core.records import Machine
from gcbench.devices import cards
from gcbench.devices.cards import Card
from gcbench.devices.target import CPU, Target
from gcbench.simulate.costs import CardFigures, Figures, Work


@dataclass(frozen=True, kw_only=True)
class TableFigures:
    """Times from a card's measured operator table; from its published rates for kinds of calls that the table lacks."""

    card: Card
    table: Calibration

    step_s = 0.0
    is_known = True

    @property
    def source(self) -> str:
        """The source of the figures, in words."""
        return f"the measured operator table of {self.card.title}, {self.table.created[:10]}"

    def seconds(self, work: Work) -> float:
        """Estimate the seconds of one call on the card."""
        if work.kind == "view" or not self.table.covers(work):
            return self._rates.seconds(work)
        return self.table.by_itself(work)

    def host_s(self, work: Work) -> float:
        """Estimate the seconds that Python takes to launch one call."""
        return self._rates.host_s(work)

    @cached_property
    def _rates(self) -> CardFigures:
        return CardFigures(self.card)


def figures_of_card(card: Card | None, folder: Path | None = None) -> CardFigures | TableFigures:
    """The figures of a card; of an average one where it is None. `folder` is that of the user's own tables."""
    table = None if card is None else card_tables.load(card, folder)
    return CardFigures(card) if card is None or table is None else TableFigures(card=card, table=table)


def figures_of_target(target: Target, here: Machine | None, folder: Path | None = None) -> Figures | None:
    """The figures of a target without measuring anything; None where nothing is known of its times.

    Args:
        here: this machine, if the target is its device; its stored calibration counts.
        folder: the folder of calibrations; None for `default_folder`.
    """
    known = None if here is None else op_times.load(op_times.machine_key(here), folder)
    if known is not None and known.points:
        return known
    if target.kind == CPU or target.card is None:
        return None
    card = target.card if target.card.matmul_flops else cards.known(target.card.title) or target.card
    found = figures_of_card(card, None if folder is None else folder / "rates")
    return found if found.is_known else None
