"""The README's example: a classifier trained in bf16, in ten lines."""

import torch
import torch.nn.functional as F
from torch import nn

import mpgraph

model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 10))
model = mpgraph.convert(model, "bf16")  # same class, same parameters
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)

for _ in range(200):
    x = torch.randn(32, 64)
    logits = model(x).float()  # a model that ends in a linear layer returns bf16
    loss = F.cross_entropy(logits, x[:, :10].argmax(1))
    loss.backward()  # gradients arrive in fp32
    optimizer.step()
    optimizer.zero_grad()

print(f"loss {loss.item():.3f}")
print(mpgraph.explain(model).text())
