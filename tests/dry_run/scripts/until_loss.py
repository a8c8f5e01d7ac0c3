"""Trains until the loss is small, which never happens where nothing is computed."""

import torch
from torch import nn

model = nn.Linear(64, 64).to("cuda")
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
loss = torch.tensor(float("inf"))
try:
    while loss > 0.01:
        loss = model(torch.randn(8, 64).to("cuda")).pow(2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
finally:
    print("cleaned up")
