"""Train a classifier in bf16, write it as an ONNX file, run that without torch."""

import onnxruntime
import torch
import torch.nn.functional as F
from torch import nn

import mpgraph

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.LayerNorm(256), nn.Linear(256, 10))
model = mpgraph.convert(model, "bf16")
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
for _ in range(200):
    x = torch.randn(32, 64)
    loss = F.cross_entropy(model(x).float(), x[:, :10].argmax(1))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()

model.eval()
print(mpgraph.export_onnx(model, "classifier.onnx", x))

session = onnxruntime.InferenceSession("classifier.onnx", providers=["CPUExecutionProvider"])
x = torch.randn(500, 64)  # another batch size
(logits,) = session.run(None, {"input": x.numpy()})
right = (torch.from_numpy(logits).argmax(1) == x[:, :10].argmax(1)).float().mean()
print(f"{right:.0%} right")
