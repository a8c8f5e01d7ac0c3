"""Builds the models of a check: once for each setting, and a copy for each combination. Imports torch."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedConfig

from gcbench.check.cases import FROZEN_BASE, LORA, MODEL_DEFAULT, CheckSetting
from gcbench.checkpointing import apply as checkpointing
from gcbench.core.errors import UsageError, first_sentence
from gcbench.core.records import ALL_LINEAR, Lora
from gcbench.models import build as models
from gcbench.models.lora import default_targets, linear_names
from gcbench.models.sources import ModelSource
from gcbench.training.step import input_embeddings, parameter_dtype

_LORA_R = 4


@dataclass(frozen=True, kw_only=True)
class ModelMaker:
    """Builds a model from its config with weights drawn from `seed`."""

    source: ModelSource
    config: PreTrainedConfig
    device: str
    seed: int
    notices: list[str] = field(default_factory=list)
    """Decisions made for the user, in sentences."""

    def build(self, setting: CheckSetting) -> torch.nn.Module:
        """Build the model in a setting; raises NotImplementedError where peft finds no module to adapt."""
        model = self._with_adapters(setting) if setting.tuned == LORA else self._built(setting, None)
        if setting.tuned == FROZEN_BASE:
            _freeze_base(model)
        return model

    def fresh(self, pristine: torch.nn.Module, setting: CheckSetting) -> torch.nn.Module:
        """Return the model as it was before any step: a copy, or a new one where it contains what cannot be copied."""
        try:
            return _copied(pristine)
        except Exception:  # locks, handles and system generators raise errors of any type
            return self.build(setting)

    def _with_adapters(self, setting: CheckSetting) -> torch.nn.Module:
        """Build with LoRA on peft's default modules; where it has none for the model type, on all that it can adapt."""
        meta = models.build_meta(self.config, trust_remote_code=self.source.trust_remote_code)
        built, targets, why = None, None, ""
        for targets in (default_targets(meta), *((name,) for name in linear_names(meta))):
            try:
                built = self._built(setting, Lora(r=_LORA_R, target_modules=targets))
                break
            except UsageError as err:
                why = why or first_sentence(err.__context__ or err)
        if built is None:
            raise NotImplementedError(f"peft cannot add adapters to this model ({why}); leave lora out of --train")
        if targets is not None:
            where = "all linear layers" if targets == (ALL_LINEAR,) else ", ".join(targets)
            notice = (
                f"peft has no default LoRA target modules for a {self.config.model_type} model: with lora, adapters "
                f"are on {where}."
            )
            if notice not in self.notices:
                self.notices.append(notice)
        return built

    def _built(self, setting: CheckSetting, lora: Lora | None) -> torch.nn.Module:
        is_default = setting.attn_implementation == MODEL_DEFAULT
        return models.build(
            self.source,
            self.config,
            device=self.device,
            dtype=parameter_dtype(setting.precision),
            attn_implementation=None if is_default else setting.attn_implementation,
            seed=self.seed,
            lora=lora,
        )


def _copied(model: torch.nn.Module) -> torch.nn.Module:
    """Copy a model and its parameters; configs, which nothing changes, are shared."""
    configs = (value for module in model.modules() for value in vars(module).values())
    return copy.deepcopy(model, {id(value): value for value in configs if isinstance(value, PreTrainedConfig)})


def _freeze_base(model: torch.nn.Module) -> None:
    """Freeze the embeddings and the first half of the layers."""
    layers = checkpointing.layers_of(model)
    embeddings = input_embeddings(model)
    tables = (
        [embeddings] if embeddings is not None else [m for m in model.modules() if isinstance(m, torch.nn.Embedding)]
    )
    for module in (*layers[: len(layers) // 2], *tables):
        module.requires_grad_(False)
