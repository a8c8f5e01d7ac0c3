"""What a plan is made for and what it came to: a decision with all that it rests on. No torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from gcbench.core import model_changes as changes
from gcbench.core.model_changes import ChangedConfig
from gcbench.core.records import Machine, ModelFacts
from gcbench.devices.target import CPU, Target
from gcbench.export._handover import Handover, Rival
from gcbench.job.settings import Settings
from gcbench.models import sources
from gcbench.plan.additions import of_decision
from gcbench.plan.decision import FOUND, Candidate, Decision


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """What `plan` takes besides the workload and the device.

    Attributes:
        batch_sizes: None for all that may pay.
        reserve_frac: None for the default of the kind of device.
        emit: the tool to print settings for.
        measure: whether the best few are run before the answer.
    """

    batch_sizes: tuple[int, ...] | None
    reserve_frac: float | None
    emit: str | None
    measure: bool


@dataclass(frozen=True, kw_only=True)
class PlanResult:
    """A decision with all that it was made for.

    Attributes:
        hub_id: under which the model is found on the Hub; None where that is not known.
        source: the model; None for a decision from a stored run.
        plan_file: where the plan of the choice is stored; None where nothing was chosen, or nothing stored.
        changed: what `--layers` and `--set` came to in the model's config; None for the model itself.
        stored_where: the device in words, of a plan that was stored; None for one that was just made.
        model_notices: in what the model differs from what its config says, in sentences.
    """

    settings: Settings
    seq_len: int
    target: Target
    machine: Machine
    facts: ModelFacts
    decision: Decision
    command: str
    created: str
    hub_id: str | None
    source: sources.ModelSource | None = None
    plan_file: Path | None = None
    changed: ChangedConfig | None = None
    stored_where: str | None = None
    model_notices: tuple[str, ...] = ()

    @property
    def source_or_raise(self) -> sources.ModelSource:
        """The model; a decision from a stored run has none to run again."""
        assert self.source is not None
        return self.source

    @property
    def changes(self) -> str | None:
        """What `--layers` and `--set` changed about the model, in words."""
        return changes.describe(self.settings.layers, self.settings.set)

    @property
    def name(self) -> str:
        """The model, with what was changed about it."""
        return changes.named(self.settings.model, self.changes)

    @property
    def where(self) -> str:
        """What the plan is for; a card of which only the memory is known has no name."""
        card = self.target.card
        if self.stored_where is not None or card is not None:
            return self.stored_where or (card.title if card is not None else "")
        return self.machine.device_name if self.target.kind == CPU else "a CUDA device"

    @property
    def handover(self) -> Handover | None:
        """What a training tool is to be told; None where nothing fits."""
        choice = self.decision.choice
        if choice is None:
            return None

        def rival(candidate: Candidate) -> Rival:
            return Rival(
                strategy=candidate.strategy,
                plan=candidate.plan,
                batch_size=candidate.batch_size,
                peak_bytes=candidate.peak_bytes,
                tokens_per_s_frac=candidate.tokens_per_s / choice.tokens_per_s,
            )

        found = choice.strategy == FOUND and self.plan_file is not None
        chosen = replace(rival(choice), strategy=f"plan:{self.plan_file}" if found else choice.strategy)
        return Handover(
            model=self.settings.model,
            hub_id=self.hub_id,
            choice=chosen,
            rivals=tuple(rival(each) for each in self.decision.candidates if each.fits and each != choice),
            plan_file=str(self.plan_file) if self.plan_file else None,
            seq_len=self.seq_len,
            precision=self.settings.precision,
            optim=self.settings.optim,
            attn_implementation=self.settings.attn_implementation,
            lora_r=self.settings.lora_r,
            lora_target_modules=self.settings.lora_target_modules,
            model_changes=self.changes,
            config=self.changed,
            notes=of_decision(self.decision),
            model_notices=self.model_notices,
        )
