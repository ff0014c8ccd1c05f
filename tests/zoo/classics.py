"""Hand-written feed-forward, convolution, normalisation and generative models."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from .registry import Call, Case, call, quick

HIDDEN_IN_BILINEAR = (
    "torch.autocast lowers the matrix product inside the CPU kernel of torch.bilinear, and not "
    "that of its backward"
)


def images(batch: int, channels: int = 3, size: int = 16) -> Call:
    """Return a batch of square images."""
    return call(torch.randn(batch, channels, size, size))


def vectors(batch: int, width: int = 16) -> Call:
    """Return a batch of vectors."""
    return call(torch.randn(batch, width))


def vectors_with_gradient(batch: int) -> Call:
    """Return a batch of vectors whose gradient is wanted, too."""
    return call(torch.randn(batch, 16, requires_grad=True))


def mlp(*, activation: type[nn.Module] = nn.GELU, dropout: float = 0.0) -> nn.Module:
    """Return a perceptron of three layers with layer norm."""
    return nn.Sequential(
        nn.Linear(16, 32),
        activation(),
        nn.LayerNorm(32),
        nn.Dropout(dropout),
        nn.Linear(32, 32),
        activation(),
        nn.Linear(32, 4),
    )


def conv_net() -> nn.Module:
    """Return strided convolutions with BatchNorm, pooling and a classifier."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )


class ClassifierWithLoss(nn.Module):
    """Takes the labels and returns the loss with the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(dropout=0.1)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.net(x)
        return {"loss": F.cross_entropy(logits, labels, label_smoothing=0.1), "logits": logits}


class ManyLosses(nn.Module):
    """One head per loss function of torch.nn.functional that is on autocast's lists."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(16, 12)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.body(x)
        target = torch.ones_like(y) / 3
        sign = torch.ones(y.shape[0])
        return {
            "mse": F.mse_loss(y, target),
            "l1": F.l1_loss(y, target),
            "smooth_l1": F.smooth_l1_loss(y, target),
            "huber": F.huber_loss(y, target),
            "bce": F.binary_cross_entropy_with_logits(y, target),
            "kl": F.kl_div(y.log_softmax(-1), target.softmax(-1), reduction="batchmean"),
            "nll": F.nll_loss(y.log_softmax(-1), torch.zeros(y.shape[0], dtype=torch.long)),
            "soft": F.cross_entropy(y, target.softmax(-1)),
            "cosine": F.cosine_embedding_loss(y, target, sign),
            "hinge": F.hinge_embedding_loss(y, target),
            "margin": F.margin_ranking_loss(y[:, 0], y[:, 1], sign),
            "multi_margin": F.multi_margin_loss(y, torch.zeros(y.shape[0], dtype=torch.long)),
            "triplet": F.triplet_margin_loss(y, target, target.flip(-1)),
            "poisson": F.poisson_nll_loss(y, target),
            "soft_margin": F.soft_margin_loss(y, target),
        }


class ResidualBlock(nn.Module):
    """Two convolutions and a projected skip."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outer)
        self.skip = nn.Conv2d(inner, outer, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)), inplace=True)
        y = self.norm2(self.conv2(y))
        y += self.skip(x)
        return F.relu_(y)


class UNet(nn.Module):
    """Down, across and up again, with concatenated skips."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = ResidualBlock(3, 8, 1), ResidualBlock(8, 16, 2)
        self.middle = ResidualBlock(16, 16, 2)
        self.up2 = nn.ConvTranspose2d(16, 16, 2, stride=2)
        self.out2 = ResidualBlock(32, 8, 1)
        self.out1 = ResidualBlock(16, 8, 1)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.down1(x)
        b = self.down2(a)
        c = self.up2(self.middle(b))
        d = self.out2(torch.cat([b, c], 1))
        d = F.interpolate(d, scale_factor=2.0, mode="bilinear", align_corners=False)
        return self.head(self.out1(torch.cat([a, d], 1)))


class VAE(nn.Module):
    """Draws its latent in the forward and returns reconstruction and divergence."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(16, 16), nn.Linear(8, 16)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        mean, log_var = self.encoder(x).chunk(2, -1)
        z = mean + torch.randn_like(mean) * (0.5 * log_var).exp()
        rebuilt = torch.sigmoid(self.decoder(z))
        divergence = -0.5 * (1 + log_var - mean.pow(2) - log_var.exp()).sum(-1).mean()
        return {"loss": F.mse_loss(rebuilt, x.sigmoid()) + divergence, "rebuilt": rebuilt}


class NormalVAE(nn.Module):
    """As above with torch.distributions, which check and broadcast their parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(16, 16), nn.Linear(8, 16)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        mean, scale = self.encoder(x).chunk(2, -1)
        posterior = torch.distributions.Normal(mean, F.softplus(scale), validate_args=False)
        z = posterior.rsample()
        prior = torch.distributions.Normal(torch.zeros_like(z), torch.ones_like(z))
        divergence = torch.distributions.kl_divergence(posterior, prior).sum(-1).mean()
        return {"loss": F.mse_loss(self.decoder(z), x) + divergence}


class GAN(nn.Module):
    """Generator and discriminator in one module; the fake is judged detached and attached."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16), nn.Tanh())
        self.critic = nn.Sequential(nn.Linear(16, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))

    def forward(self, noise: Tensor, real: Tensor) -> dict[str, Tensor]:
        fake = self.generator(noise)
        real_score, fake_score = self.critic(real), self.critic(fake.detach())
        critic_loss = F.softplus(-real_score).mean() + F.softplus(fake_score).mean()
        return {"loss": critic_loss + F.softplus(-self.critic(fake)).mean(), "fake": fake}


class ConvZoo(nn.Module):
    """Grouped, depthwise, dilated, strided and transposed convolutions in one chain."""

    def __init__(self, padding_mode: str = "zeros") -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(4, 8, 3, padding=1, groups=2, padding_mode=padding_mode),
            nn.Conv2d(8, 8, 3, padding=1, groups=8),
            nn.Conv2d(8, 8, 3, padding=2, dilation=2, padding_mode=padding_mode),
            nn.Conv2d(8, 8, 3, padding="same", bias=False),
            nn.Conv2d(8, 8, (3, 1), stride=(2, 1), padding=(1, 0)),
            nn.ConvTranspose2d(8, 8, 3, stride=2, padding=1, output_padding=1, groups=2),
            nn.Conv2d(8, 4, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Conv1dNet(nn.Module):
    """1-d convolutions, plain and transposed, with pooling and instance norm."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv1d(4, 8, 5, stride=2, padding=2)
        self.norm = nn.InstanceNorm1d(8, affine=True)
        self.b = nn.ConvTranspose1d(8, 4, 4, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.avg_pool1d(F.silu(self.norm(self.a(x))), 3, 1, 1))


class Conv3dNet(nn.Module):
    """3-d convolutions, plain and transposed, with pooling and batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv3d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm3d(4)
        self.b = nn.ConvTranspose3d(4, 2, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.max_pool3d(F.elu(self.norm(self.a(x))), 2))


class Norms(nn.Module):
    """Every normalisation layer in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norms = nn.ModuleList(
            [
                nn.BatchNorm2d(8, momentum=0.3),
                nn.GroupNorm(4, 8),
                nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
                nn.LayerNorm([8, 16, 16]),
                nn.LocalResponseNorm(3),
                nn.BatchNorm2d(8, track_running_stats=False, affine=False),
            ]
        )
        self.rms = nn.RMSNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        for norm in self.norms:
            x = norm(x)
        return F.normalize(self.rms(x), dim=1)


class Activations(nn.Module):
    """Every activation once, each on its own slice."""

    LAYERS = (
        nn.ReLU, nn.ReLU6, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus,
        nn.Softsign, nn.Tanh, nn.Sigmoid, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.LogSigmoid,
        nn.PReLU, nn.LeakyReLU, nn.Tanhshrink, nn.Softshrink, nn.Hardshrink, nn.RReLU,
    )  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 8)
        self.layers = nn.ModuleList(layer() for layer in self.LAYERS)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        y = torch.cat([layer(x) for layer in self.layers], -1)
        return F.glu(y) + F.softmax(y, -1).chunk(2, -1)[0] + F.gumbel_softmax(y).chunk(2, -1)[1]


class Resampling(nn.Module):
    """Interpolation in every mode, grid_sample, pixel shuffle, unfold and pooling variants."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.angle = nn.Linear(3, 6)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.conv(x)
        theta = self.angle(x.mean((2, 3))).view(-1, 2, 3)
        grid = F.affine_grid(theta.float(), list(y.shape), align_corners=False)
        out = {m: F.interpolate(y, size=(24, 20), mode=m) for m in ("nearest", "bicubic", "area")}
        # antialias has no bfloat16 kernel on the CPU
        out["antialias"] = F.interpolate(y.float(), size=(9, 9), mode="bilinear", antialias=True)
        out["grid"] = F.grid_sample(y, grid.to(y.dtype), align_corners=False)
        out["shuffle"] = F.pixel_unshuffle(F.pixel_shuffle(y, 2), 2)
        out["fold"] = F.fold(F.unfold(y, 2, stride=2), (16, 16), 2, stride=2)
        out["lp"] = F.lp_pool2d(y.abs() + 1, 2.0, 2)
        out["adaptive"] = F.adaptive_max_pool2d(y, 3)
        return out


class Dropouts(nn.Module):
    """All kinds of dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.drops = nn.Sequential(
            nn.Dropout(0.2), nn.Dropout2d(0.2), nn.AlphaDropout(0.1), nn.FeatureAlphaDropout(0.1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.drops(self.conv(x)), 0.1, self.training)


class EmbeddingBags(nn.Module):
    """Embedding bags of every mode, an embedding with padding, bilinear and cosine heads."""

    def __init__(self) -> None:
        super().__init__()
        self.bags = nn.ModuleList(nn.EmbeddingBag(20, 8, mode=m) for m in ("sum", "mean", "max"))
        self.words = nn.Embedding(20, 8, padding_idx=0, scale_grad_by_freq=True)
        self.bilinear = nn.Bilinear(8, 8, 4)

    def forward(self, tokens: Tensor, offsets: Tensor) -> Tensor:
        bags = [bag(tokens, offsets) for bag in self.bags]
        word = self.words(tokens[: offsets.shape[0]])
        return self.bilinear(bags[0] + bags[2], bags[1] * word)


def bag_inputs(batch: int) -> Call:
    """Return ragged token lists, four or five tokens each."""
    return call(torch.randint(0, 20, (5 * batch,)), torch.arange(batch) * 4)


class WeightReuse(nn.Module):
    """One linear layer three times, and its weight once more, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(self.linear(x))
        return F.linear(x, self.linear.weight.t())


def _old_spectral_norm() -> nn.Module:
    conv = nn.utils.spectral_norm(nn.Conv2d(3, 8, 3))
    return nn.Sequential(conv, nn.ReLU(), nn.Flatten(), nn.utils.spectral_norm(nn.Linear(1568, 4)))


def _spectral_norm() -> nn.Module:
    conv = parametrizations.spectral_norm(nn.Conv2d(3, 8, 3))
    head = parametrizations.spectral_norm(nn.Linear(1568, 4))
    return nn.Sequential(conv, nn.ReLU(), nn.Flatten(), head)


def _weight_norm() -> nn.Module:
    return nn.Sequential(
        parametrizations.weight_norm(nn.Linear(16, 16)),
        nn.Tanh(),
        parametrizations.weight_norm(nn.Linear(16, 16), dim=None),
        nn.utils.weight_norm(nn.Linear(16, 4)),
    )


def _orthogonal() -> nn.Module:
    return nn.Sequential(parametrizations.orthogonal(nn.Linear(16, 16)), nn.Linear(16, 4))


def _channels_last() -> nn.Module:
    return conv_net().to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _labelled(batch: int) -> Call:
    return call(torch.randn(batch, 16), labels=torch.randint(0, 4, (batch,)))


CASES = (
    quick(Case("mlp", mlp, vectors)),
    Case("mlp-dropout", lambda: mlp(dropout=0.3), vectors),
    quick(Case("mlp-input-gradient", mlp, vectors_with_gradient)),
    quick(Case("classifier-with-loss", ClassifierWithLoss, _labelled)),
    Case("mlp-eval", lambda: mlp(dropout=0.3), vectors, train=False),
    quick(Case("losses", ManyLosses, vectors)),
    quick(Case("conv-net", conv_net, images)),
    Case("conv-net-eval", conv_net, images, train=False),
    Case("conv-net-channels-last", _channels_last, images),
    Case("residual-block", lambda: ResidualBlock(3, 8, 2), images),
    quick(Case("unet", UNet, images)),
    quick(Case("vae", VAE, vectors)),
    Case("vae-distributions", NormalVAE, vectors),
    Case("gan", GAN, lambda b: call(torch.randn(b, 16), real=torch.randn(b, 16))),
    quick(Case("conv-zoo", ConvZoo, lambda b: images(b, 4))),
    Case("conv-padding-reflect", lambda: ConvZoo("reflect"), lambda b: images(b, 4)),
    Case("conv-padding-replicate", lambda: ConvZoo("replicate"), lambda b: images(b, 4)),
    Case("conv-padding-circular", lambda: ConvZoo("circular"), lambda b: images(b, 4)),
    Case("conv1d", Conv1dNet, lambda b: call(torch.randn(b, 4, 20))),
    Case("conv3d", Conv3dNet, lambda b: call(torch.randn(b, 2, 6, 6, 6))),
    quick(Case("norms", Norms, images)),
    quick(Case("activations", Activations, vectors)),
    Case(
        "resampling",
        Resampling,
        images,
        known_difference="the backward of affine_grid builds its grid in bf16 under "
        "torch.autocast, and rounds the grid of the forward to bf16 here",
    ),
    Case("dropouts", Dropouts, images),
    Case("embedding-bag", EmbeddingBags, bag_inputs, known_difference=HIDDEN_IN_BILINEAR),
    quick(Case("weight-reuse", WeightReuse, vectors)),
    Case("spectral-norm-hook", _old_spectral_norm, images),
    Case("spectral-norm", _spectral_norm, images),
    Case("weight-norm", _weight_norm, vectors),
    Case("orthogonal", _orthogonal, vectors),
)
