"""Evaluates and saves within training, with two micro-batches a step."""

import sys
from pathlib import Path

import torch
from torch import nn

folder = Path(sys.argv[1])
model = nn.Sequential(nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 256)).to("cuda")
optimizer = torch.optim.AdamW(model.parameters())
for epoch in range(2):
    model.train()
    for _ in range(3):
        for _ in range(2):
            (model(torch.randn(32, 256).to("cuda")).pow(2).mean() / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        model(torch.randn(4096, 256).to("cuda"))
    torch.save(model.state_dict(), folder / f"epoch-{epoch}.pt")
print("allocated", torch.cuda.max_memory_allocated(), "reserved", torch.cuda.max_memory_reserved())
