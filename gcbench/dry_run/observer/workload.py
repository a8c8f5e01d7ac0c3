"""Describes what a script trains, in the words of `gcbench plan`: model, batch, precision, optimizer, adapters."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any


class Workload:
    """What was seen of the training itself.

    Args:
        folder: where the model's config is written, if it is a Hugging Face model.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._module: Any = None
        self.found: dict[str, Any] = {}

    def see_forward(self, torch: Any, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the outermost module of a training step, its inputs and its precision."""
        shape = _shape_of_inputs(torch, args, kwargs)
        if shape is not None:
            rows, columns = shape
            self.found["batch_size"] = max(rows, self.found.get("batch_size", 0))
            self.found["seq_len"] = max(columns, self.found.get("seq_len", 0))
        if module is self._module:
            return
        self._module = module
        if torch.is_autocast_enabled("cuda"):
            self.found["autocast"] = str(torch.get_autocast_dtype("cuda")).removeprefix("torch.")
        parameters = list(module.parameters())
        sizes: Counter[str] = Counter()
        for each in parameters:
            sizes[str(each.dtype).removeprefix("torch.")] += each.numel()
        self.found |= {
            "model_class": type(_unwrapped(module)).__name__,
            "num_params": sum(sizes.values()),
            "num_trainable": sum(each.numel() for each in parameters if each.requires_grad),
            "dtype": sizes.most_common(1)[0][0] if sizes else None,
            "on_card": any(each.is_cuda for each in parameters),
            "num_layers": sum(_can_be_checkpointed(each) for each in module.modules()) or None,
        }
        self._see_config(module)

    def see_autocast(self, torch: Any) -> None:
        """Note autocast within the outermost module, which may wrap it there."""
        if "autocast" not in self.found and torch.is_autocast_enabled("cuda"):
            self.found["autocast"] = str(torch.get_autocast_dtype("cuda")).removeprefix("torch.")

    def see_optimizer(self, optimizer: Any) -> None:
        """Note the class of the optimizer and whether it is fused."""
        if "optimizer" in self.found:
            return
        self.found["optimizer"] = type(optimizer).__name__
        self.found["optimizer_module"] = type(optimizer).__module__
        group = optimizer.param_groups[0] if optimizer.param_groups else {}
        self.found["fused"] = bool(group.get("fused"))

    def _see_config(self, module: Any) -> None:
        model = _unwrapped(module)
        config = getattr(model, "config", None)
        to_dict = getattr(config, "to_dict", None)
        if config is None or to_dict is None or not getattr(config, "model_type", None):
            return
        self.found["model_type"] = config.model_type
        self.found["attn_implementation"] = getattr(config, "_attn_implementation", None)
        self.found["quantized"] = getattr(config, "quantization_config", None) is not None
        self.found["causal_lm"] = type(model).__name__.endswith(("ForCausalLM", "LMHeadModel"))
        path = self._folder / "config.json"
        try:
            path.write_text(json.dumps({**to_dict(), "architectures": [type(model).__name__]}), encoding="utf-8")
        except (TypeError, ValueError, OSError):
            return
        self.found["config"] = str(path)
        adapters = getattr(_outer_peft(module), "peft_config", None)
        adapter = next(iter(adapters.values()), None) if isinstance(adapters, dict) else None
        if adapter is not None:
            self.found["peft_type"] = str(getattr(adapter, "peft_type", "")).rpartition(".")[2]
            self.found["lora_r"] = getattr(adapter, "r", None)
            targets = getattr(adapter, "target_modules", None)
            self.found["lora_target_modules"] = (
                [targets] if isinstance(targets, str) else sorted(targets) if targets else None
            )


def _unwrapped(module: Any) -> Any:
    """Return the model within DistributedDataParallel, torch.compile and peft."""
    for _ in range(6):
        inner = (
            module.__dict__.get("_modules", {}).get("_orig_mod")
            or (module.module if type(module).__name__.endswith("DataParallel") else None)
            or (module.get_base_model() if hasattr(module, "get_base_model") else None)
        )
        if inner is None or inner is module:
            return module
        module = inner
    return module


def _outer_peft(module: Any) -> Any:
    for _ in range(4):
        if hasattr(module, "peft_config"):
            return module
        inner = module.__dict__.get("_modules", {}).get("_orig_mod") or getattr(module, "module", None)
        if inner is None:
            return module
        module = inner
    return module


def _can_be_checkpointed(module: Any) -> bool:
    return any(kind.__name__ == "GradientCheckpointingLayer" for kind in type(module).__mro__)


def _shape_of_inputs(torch: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int] | None:
    candidates = [kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args[:1]]
    for each in candidates:
        if isinstance(each, torch.Tensor) and each.dim() >= 2:
            return int(each.shape[0]), int(each.shape[1])
    return None
