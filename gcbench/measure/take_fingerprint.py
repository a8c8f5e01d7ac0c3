"""Computes the fingerprint of a model's gradients, on their device."""

from __future__ import annotations

import zlib

import torch

from gcbench.core.gradient_fingerprint import SKETCH_SIZE, Fingerprint, ParameterPrint, pack

_ROWS = 2**13
_TILE_ROWS = 2**6
_CHUNK = _ROWS * SKETCH_SIZE
"""Elements processed at a time: bounds temporary tensors to about 25 MB."""
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def take(model: torch.nn.Module, *, step: int, seed: int) -> Fingerprint:
    """Compute the fingerprint of `model`'s gradients, between a backward pass and the optimizer's step."""
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return Fingerprint(
        step=step,
        parameters=tuple(_print(name, p.grad, seed) for name, p in trainable if p.grad is not None),
        missing=tuple(name for name, p in trainable if p.grad is None),
    )


def names(model: torch.nn.Module, *, step: int, seed: int) -> Fingerprint:
    """Note which parameters have no gradient, where gradients have no values."""
    missing = (name for name, p in model.named_parameters() if p.requires_grad and p.grad is None)
    return Fingerprint(step=step, parameters=(), missing=tuple(missing))


@torch.no_grad()
def _print(name: str, grad: torch.Tensor, seed: int) -> ParameterPrint:
    flat = _flat(grad)
    device = flat.device
    generator = torch.Generator().manual_seed(seed ^ zlib.crc32(name.encode()))
    place = torch.arange(min(_CHUNK, len(flat)), device=device, dtype=torch.int64)
    weights = (place * 0x1E3779B97F4A7C15) | 1
    checksum = len(flat)
    # Signs by row alone would be the same in all buckets: a difference that is equal everywhere would then cancel in
    # all of them at once. So each sign is that of its row times that of its place in a tile.
    tile = _signs(_TILE_ROWS, SKETCH_SIZE, generator=generator, device=device)
    sketch = torch.zeros(SKETCH_SIZE, dtype=torch.float64, device=device)
    for start in range(0, len(flat), _CHUNK):
        chunk = flat[start : start + _CHUNK]
        bits = chunk.view(_WORDS[chunk.element_size()]).to(torch.int64)
        # Integer sums wrap modulo 2**64 and are exact in any order, unlike sums of floats.
        part = int((bits * weights[: len(chunk)]).sum().item()) % 2**64
        checksum = (checksum * 0x100000001B3 + part) % 2**64
        tiles = -(-len(chunk) // tile.numel())
        padded = torch.zeros(tiles * tile.numel(), dtype=torch.float32, device=device)
        padded[: len(chunk)] = chunk
        signed = padded.view(tiles, *tile.shape).mul_(tile).view(-1, SKETCH_SIZE)
        sketch += (_signs(len(signed), generator=generator, device=device) @ signed).double()
    return ParameterPrint(name=name, checksum=f"{checksum:016x}", sketch=pack(sketch.tolist()))


def _signs(*shape: int, generator: torch.Generator, device: torch.device) -> torch.Tensor:
    """Draw +1 and -1 at random, on the CPU so that they are the same for every device."""
    return torch.randint(2, shape, generator=generator).mul_(2).sub_(1).to(device, torch.float32)


def _flat(grad: torch.Tensor) -> torch.Tensor:
    """Flatten a gradient, in memory order where that needs no copy."""
    grad = grad.detach()
    order = sorted(range(grad.dim()), key=grad.stride, reverse=True)
    dense = grad.permute(order)
    return dense.reshape(-1)
