"""Find the value that overflows in fp16, pin it, and train."""

import torch
import torch.nn.functional as F
from torch import nn

import mpgraph


class Block(nn.Module):
    """A residual block whose activation squares: fp16 ends at 256 squared."""

    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        """Norm, widen, square, narrow, add."""
        hidden = F.relu(self.up(self.norm(x)))
        return x + self.down(hidden * hidden)


def batch():
    """Inputs, and the first of ten of them that is largest."""
    x = torch.randn(64, 32)
    return x, x[:, :10].argmax(1)


def train(model, scale=None):
    """Some steps; return the last loss and how many steps were skipped."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    mpgraph.guard(optimizer, model, scale=scale, blame_after=1000)
    skipped = 0
    for _ in range(100):
        x, target = batch()
        loss = F.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        skipped += bool(optimizer.last_step_skipped)
    return loss.item(), skipped


torch.manual_seed(0)
plain = nn.Sequential(nn.Linear(32, 64), *(Block(64) for _ in range(4)), nn.Linear(64, 10))
with torch.no_grad():
    plain[3].norm.weight.mul_(150)  # as outliers in a checkpoint may be

model = mpgraph.convert(plain, "fp16")
print("loss {:.3f}, {} of 100 steps skipped\n".format(*train(model)))

x, target = batch()
report = mpgraph.blame(model, x, loss_fn=lambda logits: F.cross_entropy(logits, target))
print(report)
report.plot("find_overflow.png")

policy = mpgraph.calibrate(
    plain, [batch() for _ in range(8)], lambda model, b: F.cross_entropy(model(b[0]), b[1])
)
print(f"\n{policy.to_toml()}", end="")

model = mpgraph.convert(plain, "fp16", policy=policy)
print("\nloss {:.3f}, {} of 100 steps skipped".format(*train(model, report.suggested_scale)))
