"""A whole training step as one graph: fp16, clipped, with a learning rate that changes."""

import torch
import torch.nn.functional as F
from torch import nn

import mpgraph

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(10, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 10))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)


def loss_fn(model, x, target):
    """The loss of one batch."""
    return F.cross_entropy(model(x), target)


step = mpgraph.TrainStep(model, optimizer, loss_fn, precision="fp16", max_grad_norm=1.0)
for _ in range(100):
    x = torch.randn(64, 10)
    loss = step(x, x.argmax(1))  # forward, backward, check, clipping, update, loss scale
    scheduler.step()

print(step.explain())
print(f"loss {loss:.3f}")
