"""Stops for a loss that is NaN, infinite or zero; selects by a mask."""

import math

import torch
from torch import nn

model = nn.Linear(64, 64).to("cuda")
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
scaler = torch.amp.GradScaler("cuda")
for _ in range(3):
    out = model(torch.randn(8, 64, device="cuda"))
    chosen = out[out > 0]
    loss = out.pow(2).mean()
    if torch.isnan(loss) or torch.isinf(loss).any():
        raise SystemExit("the loss is not finite")
    if not torch.isfinite(out).all():
        raise SystemExit("the output is not finite")
    if loss != loss:
        raise SystemExit("the loss is NaN")
    if loss == 0 or loss.item() == 0.0:
        raise SystemExit("the loss is zero")
    assert not math.isnan(loss.item()) and math.log(loss.detach().cpu().item()) < 10
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    top = out.argmax().item()
    if top > 3:
        print("never")
