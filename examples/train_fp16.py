"""fp16 without a GradScaler: guard the optimizer, then train as in fp32."""

import torch
import torch.nn.functional as F
from torch import nn

import mpgraph

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.LayerNorm(256), nn.Linear(256, 10))
model = mpgraph.convert(model, "fp16")
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
mpgraph.guard(optimizer, model, scale=mpgraph.LossScale(growth_interval=50), max_grad_norm=1.0)

for step in range(200):
    x = torch.randn(32, 64)
    target = x[:, :10].argmax(1)
    if step == 120:
        x[0, 0] = 1e6  # beyond what fp16 can hold
    loss = F.cross_entropy(model(x), target)
    loss.backward()  # gradients are true, and in fp32
    optimizer.step()
    optimizer.zero_grad()
    if step % 40 == 0 or optimizer.last_step_skipped:
        scale = optimizer.state_dict()["mpgraph"]["scales"][0]["scale"].item()
        note = "  skipped" if optimizer.last_step_skipped else ""
        print(f"step {step:3}  loss {loss.item():5.3f}  scale {scale:g}{note}")
