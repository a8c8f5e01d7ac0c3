"""Combinations that go wrong, tried: what is observed of them and what they are called."""

from __future__ import annotations

import itertools
import logging
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import tiny
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging as transformers_logging

from gcbench.diagnoses.known_causes import Observation, diagnose

IDS = torch.arange(64).reshape(2, 32)
Step = Callable[[], torch.Tensor]


class Listener(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


class Trial:
    """One combination, tried: `step` runs forward and backward and returns the loss, `seen` is what came of it."""

    def __init__(
        self, model: nn.Module, step: Step, off: Trial | None = None, again: set[int] | None = None, **facts: object
    ) -> None:
        model.zero_grad()
        torch.manual_seed(1)
        listener, error, self.loss = Listener(), None, None
        logger = logging.getLogger("transformers")
        transformers_logging.warning_once.cache_clear()
        logger.addHandler(listener)
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                self.loss = step().detach()
        except Exception as err:
            error = err
        finally:
            logger.removeHandler(listener)
        self.grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        self.seen = Observation(
            error_type=type(error).__name__ if error else None,
            error_text=str(error) if error else None,
            layers_recomputed=None if again is None else len(again),
            warnings=(*(str(warning.message) for warning in caught), *listener.texts),
            **{"strategy": "per-layer", **facts},
        )
        if off is not None and error is None:
            difference = relative(self.grads, off.grads)
            self.seen = replace(
                self.seen,
                grad_rel_diff=difference,
                is_wrong=difference > 1e-4,
                loss_identical=torch.equal(self.loss, off.loss),
                params_without_grad=tuple(name for name in off.grads if name not in self.grads),
            )


def relative(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    both = ours.keys() & theirs.keys()
    squares = [((ours[name] - theirs[name]).square().sum(), theirs[name].square().sum()) for name in both]
    return float(sum(d for d, _ in squares) / sum(n for _, n in squares)) ** 0.5 if both else 0.0


def told(trial: Trial | Observation) -> str | None:
    found = diagnose(trial if isinstance(trial, Observation) else trial.seen)
    return None if found is None else found.name


def build(family: str, **changes: object) -> nn.Module:
    config = {**tiny.CONFIGS[family], **changes}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(config.pop("model_type"), **config)).train()


def layers_of(model: nn.Module) -> list[GradientCheckpointingLayer]:
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def checkpointed(model: nn.Module, **kwargs: object) -> set[int]:
    """Checkpoint every layer; the set fills with the numbers of those that are run again."""
    again: set[int] = set()

    def run(number: int, function: Callable[..., object], *args: object) -> object:
        calls = itertools.count()

        def counted(*inner: object) -> object:
            if next(calls):
                again.add(number)
            return function(*inner)

        return checkpoint(counted, *args, **kwargs)

    for number, layer in enumerate(layers_of(model)):
        layer._gradient_checkpointing_func = partial(run, number)
        layer.gradient_checkpointing = True
    return again


def train(model: nn.Module, **inputs: object) -> Step:
    def step() -> torch.Tensor:
        loss = model(input_ids=IDS, labels=IDS, **{"use_cache": False, **inputs}).loss
        loss.backward()
        return loss

    return step


def train_toy(function: Callable[[torch.Tensor], torch.Tensor], *, times: int = 1) -> Step:
    """`times` steps of the sum of `function` of a batch that has a gradient, shape (4, 8)."""

    def step() -> torch.Tensor:
        for _ in range(times):
            loss = function(torch.randn(4, 8, requires_grad=True)).float().square().sum()
            loss.backward()
        return loss

    return step


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(8, 8)


def with_lora(model: nn.Module) -> nn.Module:
    peft = pytest.importorskip("peft")
    targets = ["c_attn"] if model.config.model_type == "gpt2" else ["q_proj", "v_proj"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(
            model, peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")
        ).get_base_model()


class Block(GradientCheckpointingLayer):
    """A layer of a toy model, which `function` computes after its projection."""

    def __init__(self, function: Callable[..., torch.Tensor] = torch.tanh) -> None:
        super().__init__()
        self.linear = linear()
        self.function = function

    def forward(self, hidden: torch.Tensor, *args: object) -> torch.Tensor:
        return self.function(self.linear(hidden), *args)
