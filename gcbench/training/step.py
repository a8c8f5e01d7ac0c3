"""The training step: what the worker times, and what every other part of gcbench means by "a step"."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from gcbench.core.records import Phase
from gcbench.training import optimizers
from gcbench.training.seeding import seed_generators

PRECISIONS = {
    "fp32": (torch.float32, None),
    "bf16": (torch.bfloat16, None),
    "bf16-mixed": (torch.float32, torch.bfloat16),
    "fp16-mixed": (torch.float32, torch.float16),
}
"""precision -> (dtype of the parameters, dtype of autocast or None)."""

OnPhase = Callable[[Phase], None]


def parameter_dtype(precision: str) -> torch.dtype:
    """Return the dtype that parameters, gradients and optimizer states have."""
    return PRECISIONS[precision][0]


class TrainingStep:
    """Forward, loss, backward, optimizer step, gradients freed: one call, one step.

    The model is trained as it is (in `train()` mode, dropout on), on one fixed batch, with labels equal to the
    inputs. Before each step Python's, NumPy's and torch's generators are seeded with `seed` plus the step's number, so
    that two processes with the same weights compute the same step.
    """

    def __init__(self, model: torch.nn.Module, *, batch: torch.Tensor, precision: str, optim: str, seed: int) -> None:
        """`batch` holds token ids, shape (batch_size, seq_len), int64, on the model's device."""
        self.model = model
        self.update = Update(
            [p for p in model.parameters() if p.requires_grad],
            precision=precision,
            optim=optim,
            device_type=batch.device.type,
        )
        self.inputs = forward_inputs(model, batch)
        self.autocast_dtype = PRECISIONS[precision][1]
        self.seed = seed
        self.num_steps = 0
        self.device_type = batch.device.type

    def __call__(self, on_phase: OnPhase = lambda phase: None) -> None:
        """Run one step; `on_phase` is called as each phase begins."""
        seed_generators(self.seed + self.num_steps)
        on_phase("forward")
        with self._autocast():
            loss = _loss(self.model(**self.inputs))  # held to the end, as a training loop holds it
        on_phase("backward")
        self.update.scaled(loss).backward()  # type: ignore[no-untyped-call]
        on_phase("optimizer")
        self.update()
        self.num_steps += 1

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.update.optimizer

    @property
    def has_optimizer_state(self) -> bool:
        """False until the optimizer really stepped (an fp16 scaler skips steps whose gradients overflow).

        Always true for an optimizer that keeps no state.
        """
        return bool(self.optimizer.state) or type(self.optimizer) is torch.optim.SGD

    def _autocast(self) -> AbstractContextManager[object]:
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.device_type, dtype=self.autocast_dtype)


def _loss(outputs: Any) -> torch.Tensor:
    """Return the model's loss from where transformers' Trainer takes it: old code returns a tuple or a dict."""
    if isinstance(outputs, tuple) and not hasattr(outputs, "loss"):
        return outputs[0]  # type: ignore[no-any-return]
    return outputs["loss"] if type(outputs) is dict else outputs.loss  # type: ignore[no-any-return]


class Update:
    """The optimizer phase of a step: the optimizer, with a gradient scaler for fp16, then the gradients freed."""

    def __init__(self, params: list[torch.nn.Parameter], *, precision: str, optim: str, device_type: str) -> None:
        self.optimizer = optimizers.build(optim, params)
        needs_scaler = PRECISIONS[precision][1] is torch.float16
        self.scaler = torch.amp.GradScaler(device_type) if needs_scaler else None

    def scaled(self, loss: torch.Tensor) -> torch.Tensor:
        """Return the loss to differentiate."""
        return loss if self.scaler is None else self.scaler.scale(loss)

    def __call__(self) -> None:
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)


def random_batch(model: torch.nn.Module, *, batch_size: int, seq_len: int, seed: int) -> torch.Tensor:
    """Draw token ids, shape (batch_size, seq_len), int64, on the model's device.

    Ids with a meaning of their own (padding, image placeholders) are left out: they change what a model does.
    """
    vocab_size = num_token_ids(model)
    special = _special_ids(model.config, vocab_size)
    allowed = torch.ones(vocab_size, dtype=torch.bool)
    if len(special) < vocab_size:
        allowed[sorted(special)] = False
    choices = allowed.nonzero().flatten()
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(choices), (batch_size, seq_len), generator=generator)
    return choices[picks].to(next(model.parameters()).device)


def num_token_ids(model: torch.nn.Module) -> int:
    """Return the number of token ids that a model takes, from its embeddings or else from its config."""
    embeddings = input_embeddings(model)
    if embeddings is not None:
        return len(embeddings.weight)  # type: ignore[arg-type]
    vocab_size = getattr(model.config.get_text_config(), "vocab_size", None)  # type: ignore[operator, union-attr]
    tables = [module.num_embeddings for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    # A table of another size is for something else, such as positions.
    known = [size for size in tables if vocab_size is None or size >= vocab_size]
    return vocab_size or max(known, default=2)


def input_embeddings(model: torch.nn.Module) -> torch.nn.Module | None:
    """Return the input embeddings; None where the model's code does not name them."""
    return _told(model, "get_input_embeddings")


def output_embeddings(model: torch.nn.Module) -> torch.nn.Module | None:
    """Return the layer that computes the logits; None where there is none, or the code does not name it."""
    return _told(model, "get_output_embeddings")


def _told(model: torch.nn.Module, method: str) -> torch.nn.Module | None:
    try:
        found = getattr(model, method)()
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(getattr(found, "weight", None), torch.Tensor) else None


def _special_ids(config: object, vocab_size: int) -> set[int]:
    special: set[int] = set()
    for part in (config, config.get_text_config()):  # type: ignore[attr-defined]
        for name, value in vars(part).items():
            if name.endswith(("token_id", "token_index")):
                special.update(value if isinstance(value, list) else [value])
    return {token for token in special if isinstance(token, int) and 0 <= token < vocab_size}


def forward_inputs(model: torch.nn.Module, batch: torch.Tensor) -> dict[str, object]:
    """Return the keyword arguments of the model's forward for training on `batch`, shape (batch_size, seq_len)."""
    inputs: dict[str, object] = {"input_ids": batch, "labels": batch}
    accepted = inspect.signature(model.forward).parameters
    # A cache is built in training when checkpointing is off and not when it is on: never build one.
    if "use_cache" in accepted or any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
        inputs["use_cache"] = False
    # Multimodal models want to know which tokens are text before they train: all of them.
    if hasattr(model.config, "vision_config"):
        for name in ("token_type_ids", "mm_token_type_ids"):
            if name in accepted:
                inputs[name] = torch.zeros_like(batch)
    return inputs
