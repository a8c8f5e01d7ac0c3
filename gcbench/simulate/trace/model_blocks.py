"""Describes a model on the meta device: the kind of each layer, and the memory of its tensors."""

from __future__ import annotations

from collections.abc import Hashable, Iterable

import torch


def kind(layer: torch.nn.Module) -> Hashable:
    """A key equal for layers that do the same: modules, shapes, dtypes, what is trained, attributes but the number."""
    return tuple(
        (
            path,
            type(module).__qualname__,
            tuple(
                (name, tuple(t.shape), t.dtype, t.requires_grad)
                for named in (module._parameters, module._buffers)
                for name, t in named.items()
                if t is not None
            ),
            tuple(
                (name, value)
                for name, value in sorted(vars(module).items())
                if isinstance(value, (str, int, float, bool, type(None)))
                and not name.startswith("_")
                and name != "gradient_checkpointing"
                and "idx" not in name
                and not name.endswith(("layer_id", "layer_number", "layer_index"))
            ),
        )
        for path, module in layer.named_modules()
    )


def blocks(model: torch.nn.Module) -> tuple[tuple[str, int, bool], ...]:
    """(name, bytes, whether it is a parameter) for each storage of a model on meta, tied weights once."""
    return tuple((name, storage.nbytes(), is_parameter) for name, storage, is_parameter in _named_storages(model))


def storages(model: torch.nn.Module) -> tuple[torch.UntypedStorage, ...]:
    """The storages in the order of `blocks`."""
    return tuple(storage for _, storage, _ in _named_storages(model))


def _named_storages(model: torch.nn.Module) -> Iterable[tuple[str, torch.UntypedStorage, bool]]:
    found: dict[int, tuple[str, torch.UntypedStorage, bool]] = {}
    for named, is_parameter in ((model.named_parameters(), True), (model.named_buffers(), False)):
        for name, tensor in named:
            storage = tensor.untyped_storage()
            found.setdefault(storage._cdata, (name, storage, is_parameter))
    return found.values()
