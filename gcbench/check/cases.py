"""The combinations that `gcbench check` tests, their results and verdicts. No torch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Final, Literal

from gcbench.job.settings import PRECISION_NAMES
from gcbench.training import optimizers

IDENTICAL: Final = "identical"
WITHIN_NOISE: Final = "within noise"
WRONG: Final = "WRONG"
FAILED: Final = "failed"
NOT_REPEATABLE: Final = "not repeatable"
UNSUPPORTED: Final = "unsupported"
RUNS: Final = "runs"
"""On an emulated card: it ran and recomputed the planned layers; its gradients have no values to compare."""
Verdict = Literal["identical", "within noise", "WRONG", "failed", "not repeatable", "unsupported", "runs"]

FULL, LORA, FROZEN_BASE = "full", "lora", "frozen-base"
TUNED = (FULL, LORA, FROZEN_BASE)
"""What is trained: all parameters, LoRA adapters, or the second half of the layers and what follows them."""
MODEL_DEFAULT = "default"
"""The attention implementation that the model chooses."""

DEFAULT_STRATEGIES = (
    "per-layer",
    "every:2",
    "segment:2",
    "first:1",
    "selective:attention",
    "selective:matmul",
    "reentrant",
)
COMPILED = ("compile", "per-layer+compile", "selective:matmul+compile")
"""Strategies that only the plain setting is tested with; each compiles for some ten seconds."""
SHOWN_ONLY = "reentrant"
"""Tested for comparison: its failures are known, and do not fail a check."""
_CUDA_STRATEGIES = ("offload",)


@dataclass(frozen=True, kw_only=True)
class CheckSetting:
    """What is trained, and how: all combinations of one setting are compared with one reference run of `off`."""

    precision: str = "fp32"
    optim: str = "adamw_torch"
    attn_implementation: str = MODEL_DEFAULT
    tuned: str = FULL

    @property
    def label(self) -> str:
        """What differs from the plain setting: `bf16, lora`."""
        different = [getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default]
        return ", ".join(different) or "plain"


@dataclass(frozen=True, kw_only=True)
class Combination:
    """One strategy in one setting."""

    setting: CheckSetting
    strategy: str

    @property
    def counts(self) -> bool:
        """Whether a check fails when this combination does."""
        return SHOWN_ONLY not in self.strategy


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """The result of one combination.

    Attributes:
        number: its index in `Check.combinations`.
        grad_rel_diff: L2 norm of (the first step's gradients minus those of `off`), relative to the norm of the latter.
        worst_param: the parameter that contributes most to it.
        noise: the same difference between two runs of `off`; the largest over all runs.
        layers_expected, layers_recomputed: planned layers that a gradient passes back through, and layers that were
            really recomputed in one step; None where layers are compiled, or no step ran.
        params_without_grad: trained parameters without a gradient that have one in `off`.
        message: what is wrong, or why there is no verdict, in a sentence.
        cause, remedy, link: those of the known cause; None where nothing is wrong or no cause is known.
        steps_s: seconds in training steps, without those of the reference.
    """

    number: int
    verdict: Verdict
    grad_rel_diff: float | None = None
    worst_param: str | None = None
    noise: float | None = None
    layers_expected: int | None = None
    layers_recomputed: int | None = None
    params_without_grad: tuple[str, ...] = ()
    message: str | None = None
    cause: str | None = None
    remedy: str | None = None
    link: str | None = None
    steps_s: float = 0.0

    @property
    def is_bad(self) -> bool:
        return self.verdict in (WRONG, FAILED)

    @property
    def is_shown(self) -> bool:
        """Whether the gradients are shown to equal those of `off`."""
        return self.verdict in (IDENTICAL, WITHIN_NOISE)


@dataclass(frozen=True, kw_only=True)
class CheckRow:
    """One combination as it appears in tables and JSON; the field order is the column order."""

    model: str
    strategy: str
    precision: str
    optim: str
    attn_implementation: str
    tuned: str
    verdict: str
    grad_rel_diff: float | None
    worst_param: str | None
    grad_noise_floor: float | None
    layers_expected: int | None
    layers_recomputed: int | None
    params_without_grad: str | None
    message: str | None
    cause: str | None
    remedy: str | None
    link: str | None
    model_changes: str | None = None
    model_notice: str | None = None
    source: str = "measured"
    """`emulated` where the steps ran on an emulated card, which computes nothing."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """A check: which combinations were tested on which model, and their results.

    Attributes:
        scaled: how the model was made smaller, in words; None at full size.
        num_params, num_layers: sizes of the model that was trained; None where the check ended before they were known.
        steps_s: seconds in training steps, including those of references.
        wall_s: seconds from the first test to the end.
        notices: how the model differs from what its config says, and what was decided for the user, in sentences.
    """

    model: str
    command: str
    device: str
    versions: dict[str, str]
    scaled: str | None
    num_params: int | None
    num_layers: int | None
    combinations: tuple[Combination, ...]
    results: tuple[CheckResult, ...] = ()
    steps_s: float = 0.0
    wall_s: float = 0.0
    notices: tuple[str, ...] = ()
    model_changes: str | None = None
    """What `--layers` and `--set` changed about the model."""
    is_emulated: bool = False
    """Whether the steps ran on an emulated card."""

    @property
    def failures(self) -> tuple[Combination, ...]:
        """The combinations that make the check fail."""
        return tuple(
            self.combinations[r.number] for r in self.results if r.is_bad and self.combinations[r.number].counts
        )

    @property
    def open_questions(self) -> tuple[Combination, ...]:
        """The combinations without a verdict, because `off` does not repeat itself."""
        return tuple(self.combinations[r.number] for r in self.results if r.verdict == NOT_REPEATABLE)

    @property
    def is_empty(self) -> bool:
        """Whether no combination was really tested."""
        return all(result.verdict == UNSUPPORTED for result in self.results)


def rows(check: Check) -> tuple[CheckRow, ...]:
    """Return one row for each result."""
    table = []
    for result in check.results:
        combination = check.combinations[result.number]
        table.append(
            CheckRow(
                model=check.model,
                strategy=combination.strategy,
                precision=combination.setting.precision,
                optim=combination.setting.optim,
                attn_implementation=combination.setting.attn_implementation,
                tuned=combination.setting.tuned,
                verdict=result.verdict,
                grad_rel_diff=result.grad_rel_diff,
                worst_param=result.worst_param,
                grad_noise_floor=result.noise,
                layers_expected=result.layers_expected,
                layers_recomputed=result.layers_recomputed,
                params_without_grad=", ".join(result.params_without_grad) or None,
                message=result.message,
                cause=result.cause,
                remedy=result.remedy,
                link=result.link,
                model_changes=check.model_changes,
                model_notice=" ".join(check.notices) or None,
                source="emulated" if check.is_emulated else "measured",
            )
        )
    return tuple(table)


def combinations(
    *,
    chosen_strategies: Sequence[str] | None = None,
    precisions: Sequence[str] | None = None,
    optims: Sequence[str] | None = None,
    attentions: Sequence[str] | None = None,
    tuned: Sequence[str] | None = None,
    compiled: bool = True,
    on_cuda: bool = False,
) -> tuple[Combination, ...]:
    """List the combinations to test.

    By default the settings are the plain one and those that differ from it in one thing. Where any of `precisions`,
    `optims`, `attentions` or `tuned` is chosen, they are all products of what is chosen. `compiled` adds compiled
    layers to the first setting.
    """
    if any(choice is not None for choice in (precisions, optims, attentions, tuned)):
        settings = [
            CheckSetting(precision=precision, optim=optim, attn_implementation=attention, tuned=what)
            for precision, optim, attention, what in itertools.product(
                precisions or ("fp32",), optims or ("adamw_torch",), attentions or (MODEL_DEFAULT,), tuned or (FULL,)
            )
        ]
    else:
        settings = _one_thing_changed()
    named = tuple(chosen_strategies or (*DEFAULT_STRATEGIES, *(_CUDA_STRATEGIES if on_cuda else ())))
    products = [Combination(setting=setting, strategy=strategy) for setting in settings for strategy in named]
    if compiled and chosen_strategies is None:
        products += [Combination(setting=settings[0], strategy=strategy) for strategy in COMPILED]
    return tuple(dict.fromkeys(products))


def _one_thing_changed() -> list[CheckSetting]:
    return [
        CheckSetting(),
        *(CheckSetting(precision=precision) for precision in PRECISION_NAMES if precision != "fp32"),
        *(CheckSetting(optim=optim) for optim in optimizers.names() if optim != "adamw_torch"),
        CheckSetting(attn_implementation="eager"),
        CheckSetting(tuned=LORA),
        CheckSetting(tuned=FROZEN_BASE),
        CheckSetting(precision="bf16-mixed", tuned=LORA),
    ]
