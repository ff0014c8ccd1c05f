"""Train a compiled model in fp16: one graph, with the loss scale as an input of it."""

import torch
import torch.nn.functional as F
from torch import nn

import mpgraph

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 4))
model = mpgraph.convert(model, "fp16")
optimizer = mpgraph.guard(torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True), model)


@torch.compile(fullgraph=True, backend="aot_eager")  # without backend=: Inductor, and faster
def loss_of(x, target):
    """The loss of one batch."""
    return F.cross_entropy(model(x), target)


for step in range(61):
    x = torch.randn(32, 16)
    loss = loss_of(x, x[:, :4].argmax(1))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 20 == 0:
        print(f"step {step:2}  loss {loss.item():5.3f}")

print(mpgraph.explain(model).graphs[0].label)
