"""Find the known cause of what went wrong in one combination of settings, and its remedy."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What was observed of one combination of settings.

    `off` is the same combination without checkpointing, compiled if this one is: compiled dropout draws other masks.

    Attributes:
        error_type, error_text: class name and full text of the exception that ended the step.
        grad_rel_diff: L2 norm of the difference from the gradients of `off`, relative to theirs.
        is_wrong: whether that difference is beyond noise.
        loss_identical: whether the loss equals that of `off`; None when it was not compared.
        layers_expected, layers_recomputed: number of layers that the strategy checkpoints, and that were recomputed.
        num_layers: number of layers of the model.
        params_without_grad: names of trained parameters that have a gradient in `off` and none here.
        buffers_differ: whether buffers differ from those after the same steps of `off`.
        memory_budget: torch.compile's activation_memory_budget; None when it was not set.
        training: whether the model was in training mode.
        draws_outside_torch: whether the forward pass draws from Python's or NumPy's generator.
        frozen_base: whether parameters of the model, including the embedding, are frozen.
        steps_in_backward: whether the optimizer updates each parameter as soon as its gradient is complete.
        sharded: whether the parameters are sharded by FSDP.
        warnings: texts of all warnings, Python's and logged ones.
    """

    error_type: str | None = None
    error_text: str | None = None
    grad_rel_diff: float | None = None
    is_wrong: bool = False
    loss_identical: bool | None = None
    layers_expected: int | None = None
    layers_recomputed: int | None = None
    num_layers: int | None = None
    params_without_grad: tuple[str, ...] = ()
    buffers_differ: bool = False
    strategy: str = "off"
    precision: str = "fp32"
    optim: str = "adamw_torch"
    reentrant: bool = False
    compiled: bool = False
    memory_budget: float | None = None
    training: bool = True
    use_cache: bool = False
    preserve_rng_state: bool = True
    has_dropout: bool = False
    draws_outside_torch: bool = False
    is_moe: bool = False
    frozen_base: bool = False
    quantised: bool = False
    steps_in_backward: bool = False
    sharded: bool = False
    warnings: tuple[str, ...] = ()

    @classmethod
    def of_strategy(cls, strategy: str, **more: Any) -> Observation:
        """Return an observation with the fields that the strategy's name determines filled in."""
        parts = strategy.split("+")
        budget = next((float(part.partition(":")[2]) for part in parts if part.startswith("compile:")), None)
        return cls(
            strategy=strategy,
            reentrant="reentrant" in parts,
            compiled=any(part.partition(":")[0] == "compile" for part in parts),
            memory_budget=budget,
            **more,
        )

    def failed_with(self, *texts: str) -> bool:
        """Whether the step ended in an exception whose text contains one of `texts`."""
        return self.error_text is not None and any(text in self.error_text for text in texts)

    def warned_of(self, text: str) -> bool:
        return any(text in warning for warning in self.warnings)

    @property
    def is_silent(self) -> bool:
        """Whether gradients are wrong without an error or missing gradients."""
        return self.is_wrong and self.error_text is None and not self.params_without_grad

    @property
    def is_checkpointed(self) -> bool:
        return self.strategy != "off"

    @property
    def lost_gradients(self) -> bool:
        """Whether gradients are missing; when all are, the backward pass raises an error."""
        return bool(self.params_without_grad) or self.failed_with(
            "does not require grad and does not have a grad_fn", "none of output has requires_grad=True"
        )


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """A known cause.

    Attributes:
        symptom: a sentence on what the user sees.
        cause: a sentence on why it happens.
        remedy: a sentence on what to do.
        link: URL of a public thread about it.
        fits: observation -> whether it has this cause.
    """

    name: str
    symptom: str
    cause: str
    remedy: str
    link: str
    fits: Callable[[Observation], bool] = field(repr=False, compare=False)


def diagnose(seen: Observation) -> Diagnosis | None:
    """Return the most specific known cause of an observation; None when nothing is wrong or the cause is unknown."""
    return next((diagnosis for diagnosis in known() if diagnosis.fits(seen)), None)


@cache
def known() -> tuple[Diagnosis, ...]:
    """Return all known causes, the most specific first."""
    text = resources.files("gcbench.diagnoses").joinpath("known_causes.toml").read_text(encoding="utf-8")
    return tuple(Diagnosis(**entry, fits=_FITS[entry["name"]]) for entry in tomllib.loads(text)["diagnosis"])


# Patterns in the error messages of torch and transformers

_SAVED = re.compile(
    r"saved metadata: \{'shape': torch\.Size\(\[(?P<saved>[\d, ]*)\]\), 'dtype': (?P<saved_dtype>[\w.]+).*?\n"
    r"recomputed metadata: \{'shape': torch\.Size\(\[(?P<again>[\d, ]*)\]\), 'dtype': (?P<again_dtype>[\w.]+)"
)
_SIZES = re.compile(r"size of tensor a \((\d+)\) must match the size of tensor b \((\d+)\)")
_LAYER = re.compile(r"\.(\d+)\.")


def _is_checkpoint_error(seen: Observation) -> bool:
    return seen.is_checkpointed and seen.failed_with(
        "have different metadata than during the forward pass",
        "A different number of tensors was saved",
        "trying to save more tensors during recomputation",
        "encountered during backward but not found in storage",
    )


def _differs_in_dtype(seen: Observation) -> bool:
    """Whether every mismatched tensor has the same shape and a different dtype."""
    pairs = list(_SAVED.finditer(seen.error_text or ""))
    return bool(pairs) and all(p["saved"] == p["again"] and p["saved_dtype"] != p["again_dtype"] for p in pairs)


def _doubles(seen: Observation) -> bool:
    """Whether one size has doubled and all others are unchanged."""
    sizes = _SIZES.search(seen.error_text or "")
    if sizes:
        small, large = sorted(map(int, sizes.groups()))
        return large == 2 * small
    pairs = [(p["saved"].split(", "), p["again"].split(", ")) for p in _SAVED.finditer(seen.error_text or "")]
    return any(
        len(saved) == len(again)
        and [int(b) / int(a) for a, b in zip(saved, again, strict=True) if a != b and int(a)] == [2.0]
        for saved, again in pairs
        if saved != [""]
    )


def _only_in_last_layer(seen: Observation) -> bool:
    """Whether all parameters without a gradient are in the model's last layer."""
    numbers = {match[1] if (match := _LAYER.search(name)) else None for name in seen.params_without_grad}
    return seen.num_layers is not None and numbers == {str(seen.num_layers - 1)}


def _recompute_differs_silently(seen: Observation) -> bool:
    """Whether the forward pass was the same as in `off` and the recomputation, in eager code, was not."""
    return seen.is_checkpointed and seen.is_silent and not seen.compiled and seen.loss_identical is not False


def _steps_in_backward(seen: Observation) -> bool:
    return seen.steps_in_backward or any(word in seen.optim for word in ("layerwise", "per_layer", "lomo"))


_TWICE = "Trying to backward through the graph a second time"

_FITS: dict[str, Callable[[Observation], bool]] = {
    "fp16-weights-with-scaler": lambda seen: seen.failed_with("Attempting to unscale FP16 gradients"),
    "ddp-marked-twice": lambda seen: seen.failed_with("mark a variable ready only once", "marked as ready twice"),
    "reentrant-with-autograd-grad": lambda seen: seen.failed_with(
        "torch.utils.checkpoint is incompatible with .grad()", "Checkpointing is not compatible with .grad()"
    ),
    "selective-kept-then-mutated": lambda seen: seen.failed_with(
        "Tensor cached during selective activation checkpoint has been mutated"
    ),
    "selective-autocast-cache": lambda seen: (
        seen.failed_with("not found in storage") and seen.failed_with("aten._to_copy")
    ),
    "reentrant-nested-inputs": lambda seen: seen.reentrant and seen.failed_with(_TWICE),
    "graph-kept-between-steps": lambda seen: seen.failed_with(_TWICE),
    "reentrant-by-omission": lambda seen: (
        seen.warned_of("the use_reentrant parameter should be passed explicitly")
        and (seen.lost_gradients or (seen.error_text is None and not seen.is_wrong))
    ),
    "own-way-reentrant": lambda seen: seen.strategy == "own" and seen.lost_gradients,
    "quantised-base-unprepared": lambda seen: seen.quantised and seen.lost_gradients,
    "last-layer-without-gradient": lambda seen: seen.reentrant and seen.frozen_base and _only_in_last_layer(seen),
    "reentrant-frozen-base": lambda seen: seen.reentrant and seen.frozen_base and seen.lost_gradients,
    "reentrant-shared-state": lambda seen: (
        seen.reentrant
        and seen.is_silent
        and not (seen.has_dropout or seen.draws_outside_torch or seen.steps_in_backward or "layerwise" in seen.optim)
    ),
    "reentrant-keyword-inputs": lambda seen: seen.reentrant and not seen.frozen_base and seen.lost_gradients,
    "memory-budget-dropout": lambda seen: (
        seen.is_silent
        and seen.compiled
        and seen.has_dropout
        and seen.memory_budget is not None
        and seen.memory_budget < 1
    ),
    "compiled-recompute-differs": lambda seen: seen.compiled and _is_checkpoint_error(seen),
    "eval-mode": lambda seen: (
        not seen.training and seen.error_text is None and bool(seen.layers_expected) and seen.layers_recomputed == 0
    ),
    "cache-grows-in-recompute": lambda seen: seen.use_cache and seen.is_checkpointed and _doubles(seen),
    "sharded-cast-skipped": lambda seen: seen.sharded and _is_checkpoint_error(seen) and _differs_in_dtype(seen),
    "autocast-differs": lambda seen: _is_checkpoint_error(seen) and _differs_in_dtype(seen),
    "rng-not-preserved": lambda seen: (
        _recompute_differs_silently(seen) and seen.has_dropout and not seen.preserve_rng_state
    ),
    "optimizer-in-backward": lambda seen: (
        _steps_in_backward(seen)
        and seen.is_checkpointed
        and (seen.is_silent or seen.failed_with("has been modified by an inplace operation"))
    ),
    "moe-router-flips": lambda seen: seen.is_moe and (_is_checkpoint_error(seen) or _recompute_differs_silently(seen)),
    "recompute-took-another-branch": _is_checkpoint_error,
    "state-gone-in-recompute": _recompute_differs_silently,
    "statistics-updated-twice": lambda seen: seen.is_checkpointed and seen.buffers_differ,
    "cache-left-on": lambda seen: seen.use_cache and seen.training and seen.error_text is None and not seen.is_wrong,
}
