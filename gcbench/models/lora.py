"""Add LoRA adapters to a model with peft; the only module that uses peft. Imports torch."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence

import torch
from transformers.pytorch_utils import Conv1D

from gcbench.core.errors import UnavailableError, UsageError, first_sentence
from gcbench.core.records import ALL_LINEAR, Lora
from gcbench.models import refusals
from gcbench.training.step import output_embeddings


def with_adapters(model: torch.nn.Module, lora: Lora) -> torch.nn.Module:
    """Freeze the causal LM `model`, add trainable adapters, and return it without peft's wrapper.

    The model is changed in place, on any device, including meta. Rank and targets are those of `lora`; the rest is
    peft's default: alpha, no dropout, fp32 adapters in a 16-bit model.

    Raises UnavailableError when peft cannot be imported; UsageError when a target is not a module of the model or
    cannot have an adapter, and when none is named and peft has no default for this model.
    """
    try:
        from peft import LoraConfig, TaskType, get_peft_model
    except ImportError as err:
        raise UnavailableError(
            f"--lora-r needs the package peft, which is missing or broken ({first_sentence(err)}); "
            "install it with pip install 'gcbench[lora]'"
        ) from None
    names = lora.target_modules
    targets: str | list[str] | None = None
    if names is not None:
        targets = ALL_LINEAR if names == (ALL_LINEAR,) else list(names)
    config = LoraConfig(r=lora.r, target_modules=targets, task_type=TaskType.CAUSAL_LM)
    modules = [path for path, _ in model.named_modules()]  # as they are before peft replaces some of them
    linear = linear_names(model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about defaults that peft corrects by itself
            adapted = get_peft_model(model, config)
    except (MemoryError, RuntimeError):  # of the device, and not of the names
        raise
    except Exception as err:  # of many kinds, and modelling code may raise anything
        raise _refusal(err, model, lora, modules, linear) from None
    # peft passes over a name that fits nothing as long as another one does. It writes those it puts others in the
    # place of (the experts' w1 and w3, which transformers holds as one) out of its config.
    kept = config.target_modules if isinstance(config.target_modules, (list, set)) else ()
    lost = [name for name in names or () if name in kept and not _fits(name, modules)]
    if lost:
        raise _no_such_module(lost, modules, linear)
    return adapted.get_base_model()  # type: ignore[no-any-return]


def _refusal(
    err: Exception, model: torch.nn.Module, lora: Lora, modules: Sequence[str], linear: Sequence[str]
) -> UsageError:
    """Turn an exception of peft into an error with a remedy."""
    text = first_sentence(err).removeprefix("[PEFT:PeftType.LORA] ")
    kind = getattr(model.config, "model_type", type(model).__name__)
    remedy = refusals.name_targets(str(kind), linear)
    if lora.target_modules is None:
        if "target_modules" in text:
            return refusals.no_default_targets(str(kind), linear)
        return UsageError(f"--lora-r: peft says: {text}; {remedy}")
    lost = [name for name in lora.target_modules if not _fits(name, modules)]
    if lost and "not found in the base model" in text:
        return _no_such_module(lost, modules, linear)
    unsuited = re.match(r"Target module (\w+).* is not supported", str(err), flags=re.DOTALL)
    why = f"has no adapter for a {unsuited[1]}" if unsuited else f"says: {text}"
    if lora.target_modules == (ALL_LINEAR,) and refusals.possible_targets(str(kind), linear) == (ALL_LINEAR,):
        remedy = f"name some of its linear layers: {refusals.some_of(linear)}"
    return UsageError(
        f"--lora-target-modules {','.join(lora.target_modules)}: peft {why}; {remedy.replace('add ', 'use ', 1)}"
    )


def _no_such_module(lost: Sequence[str], modules: Sequence[str], linear: Sequence[str]) -> UsageError:
    return refusals.no_such_module(lost, dict.fromkeys(path.rpartition(".")[2] for path in modules), linear)


def default_targets(model: torch.nn.Module) -> tuple[str, ...] | None:
    """Return None when peft has default targets for this type of model, else all modules that it can adapt."""
    try:
        from peft.utils import constants
    except ImportError:
        return None  # `with_adapters` reports what is missing
    kind = str(getattr(model.config, "model_type", ""))
    known = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    return None if kind in known else refusals.possible_targets(kind, linear_names(model))


def _fits(name: str, modules: Iterable[str]) -> bool:
    """Return whether peft finds a module by this name: its full path, or the end of it after a dot."""
    return any(path == name or path.endswith(f".{name}") for path in modules)


def linear_names(model: torch.nn.Module) -> list[str]:
    """Return the last parts of the names of linear layers, each once, in the model's order, less the output layer."""
    head = output_embeddings(model)
    names = (
        path.rpartition(".")[2]
        for path, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, Conv1D)) and module is not head
    )
    return [name for name in dict.fromkeys(names) if not name.isdecimal()]
