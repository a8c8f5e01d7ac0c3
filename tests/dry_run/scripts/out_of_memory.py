"""Runs out of memory on a small card, in the phase that is named; can catch it and go on with a smaller batch."""

import argparse

import torch
from torch import nn

parser = argparse.ArgumentParser()
parser.add_argument("where", choices=("forward", "backward", "optimizer", "caught", "swallowed"))
where = parser.parse_args().where


class Wide(nn.Module):
    """A hidden layer that is much wider than its input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(1024, width)
        self.down = nn.Linear(width, 1024)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.nn.functional.gelu(self.up(x)))


class Twice(torch.autograd.Function):
    """The identity, with a backward pass that needs much memory."""

    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, gradient: torch.Tensor) -> torch.Tensor:
        torch.empty(2 * 1024**3, dtype=torch.uint8, device="cuda")
        return gradient


def train(batch: int) -> None:
    x = torch.randn(batch, 1024).to("cuda")
    out = model(x)
    loss = (Twice.apply(out) if where == "backward" else out).pow(2).mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


model = Wide(60_000 if where == "optimizer" else 8192).to("cuda")
optimizer = torch.optim.AdamW(model.parameters())
for batch in (16, 64_000, 16) if where in ("forward", "caught", "swallowed") else (16,):
    try:
        train(batch)
    except torch.OutOfMemoryError:
        if where not in ("caught", "swallowed"):
            raise
        if where == "swallowed":
            break
