"""The options and the result of `gcbench plan`: a decision with the workload and target that it is for. No torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from gcbench.core import model_changes as changes
from gcbench.core.model_changes import ChangedConfig
from gcbench.core.records import Machine, ModelFacts
from gcbench.devices.target import CPU, Target
from gcbench.export._handover import SEARCHED, Handover, Rival
from gcbench.job.settings import Settings
from gcbench.models import sources
from gcbench.plan.additions import of_decision
from gcbench.plan.decision import Candidate, Decision


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Options of `gcbench plan` besides the workload and the device.

    Attributes:
        batch_sizes: None to search all useful sizes.
        reserve_frac: fraction of the device memory held back; None for the default of the kind of device.
        emit: the tool to print settings for.
        measure: whether the leading candidates are benchmarked before choosing.
        emulate: whether the choice is run on an emulated card of the target's name before it is shown.
    """

    batch_sizes: tuple[int, ...] | None
    reserve_frac: float | None
    emit: str | None
    measure: bool
    emulate: bool = False


@dataclass(frozen=True, kw_only=True)
class PlanResult:
    """A decision with its workload, target and origin.

    Attributes:
        hub_id: the name of the model on the Hub; None where unknown.
        source: the model; None for a decision from a stored run.
        plan_file: the stored plan of the choice; None where nothing was chosen or stored.
        changed: the changes of `--layers` and `--set` to the model's config; None without any.
        stored_where: the device in words, for a plan that was loaded; else None.
        model_notices: how the model differs from its config, in sentences.
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
        """The model; only a decision from a search has it."""
        assert self.source is not None
        return self.source

    @property
    def changes(self) -> str | None:
        """The changes of `--layers` and `--set` to the model, in words."""
        return changes.describe(self.settings.layers, self.settings.set)

    @property
    def name(self) -> str:
        """The model's name with its changes."""
        return changes.named(self.settings.model, self.changes)

    @property
    def where(self) -> str:
        """The name of the device; a card known only by its memory has none."""
        card = self.target.card
        if self.stored_where is not None or card is not None:
            return self.stored_where or (card.title if card is not None else "")
        return self.machine.device_name if self.target.kind == CPU else "a CUDA device"

    @property
    def handover(self) -> Handover | None:
        """The record from which settings for a training tool are written; None where nothing fits."""
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

        has_file = choice.strategy == SEARCHED and self.plan_file is not None
        chosen = replace(rival(choice), strategy=f"plan:{self.plan_file}" if has_file else choice.strategy)
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
