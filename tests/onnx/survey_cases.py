"""Operators, forward and backward, in several shapes: what exported steps have to compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .survey_row import Bools, Ints, Positive, Row, recurrent, row


def conv(**options: Any) -> Callable[..., Any]:
    """A convolution by the rank of its weight."""

    def run(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        call = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[w.dim()]
        return call(x, w, b, **options)

    return run


def up(**options: Any) -> Callable[..., Any]:
    """A transposed convolution by the rank of its weight."""

    def run(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        calls = {3: F.conv_transpose1d, 4: F.conv_transpose2d, 5: F.conv_transpose3d}
        return calls[w.dim()](x, w, b, **options)

    return run


_IMAGE = ((2, 4, 9, 8),)
_LINE = ((2, 4, 11),)
_VOLUME = ((2, 3, 6, 5, 7),)


def _sdpa(**options: Any) -> Callable[..., Any]:
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **options)


def _masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _batch_norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, w, b, training=True)


ROWS: tuple[Row, ...] = (
    # Products
    row("mm", torch.mm, ((3, 4), (4, 5)), ((1, 7), (7, 1)), quick=True),
    row("addmm", torch.addmm, ((5,), (3, 4), (4, 5)), fixed=True),
    row("bmm", torch.bmm, ((2, 3, 4), (2, 4, 5))),
    row("baddbmm", lambda a, b, c: torch.baddbmm(a, b, c, beta=0.5, alpha=2), ((2, 3, 5), (2, 3, 4), (2, 4, 5))),
    row("matmul", torch.matmul, ((2, 3, 4), (4, 5)), ((4,), (2, 4, 3)), ((3, 4), (4,))),
    row("linear", F.linear, ((3, 4), (5, 4), (5,)), ((2, 3, 4), (5, 4), (5,))),
    row("bilinear", F.bilinear, ((3, 2), (3, 4), (5, 2, 4), (5,))),
    row("einsum", lambda a, b: torch.einsum("bij,kj->bki", a, b), ((2, 3, 4), (5, 4))),
    row("outer", torch.outer, ((3,), (4,))),
    row("cdist", torch.cdist, ((2, 3, 4), (2, 5, 4))),
    # Convolutions
    row("conv", conv(), ((2, 3, 7), (4, 3, 3), (4,)), ((2, 3, 7, 6), (4, 3, 3, 2), (4,)), ((1, 2, 5, 6, 4), (3, 2, 2, 3, 2), (3,)), quick=True),
    row("conv strided", conv(stride=2), ((2, 3, 8), (4, 3, 3)), ((2, 3, 8, 9), (4, 3, 3, 3)), ((2, 2, 7, 6, 5), (3, 2, 2, 2, 2))),
    row("conv padded", conv(padding=2), ((2, 3, 7), (4, 3, 3)), ((2, 3, 7, 6), (4, 3, 3, 3)), quick=True),
    row("conv strided, padded, with a rest", conv(stride=3, padding=1), ((2, 3, 9), (4, 3, 2)), ((2, 3, 10, 11), (4, 3, 2, 3)), quick=True),
    row("conv dilated", conv(dilation=2), ((2, 3, 9), (4, 3, 3)), ((2, 3, 9, 8), (4, 3, 3, 2))),
    row("conv dilated, strided", conv(dilation=2, stride=3, padding=2), ((2, 3, 12, 11), (4, 3, 3, 2)), quick=True),
    row("conv grouped", conv(groups=2), ((2, 4, 7), (6, 2, 3)), ((2, 4, 7, 6), (6, 2, 3, 3)), quick=True),
    row("conv depthwise", conv(groups=4, padding=1), ((2, 4, 7, 6), (8, 1, 3, 3), (8,))),
    row("conv same", conv(padding="same"), ((2, 3, 7, 6), (4, 3, 3, 4))),
    row("conv transposed", up(), ((2, 3, 5), (3, 4, 3), (4,)), ((2, 3, 5, 4), (3, 4, 3, 2), (4,)), ((1, 2, 3, 4, 3), (2, 3, 2, 2, 3)), quick=True),
    row("conv transposed, strided", up(stride=2, padding=1), ((2, 3, 5), (3, 4, 3)), ((2, 3, 5, 4), (3, 4, 3, 4))),
    row("conv transposed, output padding", up(stride=3, padding=1, output_padding=2), ((2, 3, 5), (3, 4, 4)), ((2, 3, 5, 4), (3, 4, 4, 3)), quick=True),
    row("conv transposed, grouped", up(stride=2, groups=2), ((2, 4, 5, 4), (4, 3, 3, 2), (6,))),
    row("conv transposed, dilated", up(dilation=2, stride=2, output_padding=1), ((2, 3, 5, 4), (3, 2, 3, 2))),
    # Pools
    row("max_pool", lambda x: F.max_pool2d(x, 2), _IMAGE, quick=True),
    row("max_pool overlapping", lambda x: F.max_pool2d(x, 3, 2, 1), _IMAGE, quick=True),
    row("max_pool dilated", lambda x: F.max_pool2d(x, 2, 1, 0, 2), _IMAGE),
    row("max_pool ceil", lambda x: F.max_pool2d(x, 2, 2, ceil_mode=True), _IMAGE),
    row("max_pool1d", lambda x: F.max_pool1d(x, 3, 2, 1), _LINE),
    row("max_pool3d", lambda x: F.max_pool3d(x, 2, 2), _VOLUME),
    row("avg_pool", lambda x: F.avg_pool2d(x, 2), _IMAGE, quick=True),
    row("avg_pool padded", lambda x: F.avg_pool2d(x, 3, 2, 1), _IMAGE),
    row("avg_pool padding not counted", lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False), _IMAGE, quick=True),
    row("avg_pool ceil", lambda x: F.avg_pool2d(x, 2, 2, ceil_mode=True), _IMAGE),
    row("avg_pool ceil, padded", lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True), _IMAGE, ((1, 2, 10, 7),)),
    row("avg_pool divisor", lambda x: F.avg_pool2d(x, 2, divisor_override=3), _IMAGE),
    row("avg_pool1d", lambda x: F.avg_pool1d(x, 3, 2, 1), _LINE),
    row("avg_pool3d", lambda x: F.avg_pool3d(x, 2, 1, 1), _VOLUME),
    row("adaptive_avg_pool", lambda x: F.adaptive_avg_pool2d(x, (4, 3)), _IMAGE, quick=True),
    row("adaptive_avg_pool to 1", lambda x: F.adaptive_avg_pool2d(x, 1), _IMAGE),
    row("adaptive_avg_pool of channels last", lambda x: F.adaptive_avg_pool2d(x.to(memory_format=torch.channels_last), 1).flatten(1), _IMAGE),
    row("adaptive_avg_pool1d", lambda x: F.adaptive_avg_pool1d(x, 4), _LINE),
    row("adaptive_avg_pool3d", lambda x: F.adaptive_avg_pool3d(x, (2, 3, 4)), _VOLUME),
    row("adaptive_max_pool", lambda x: F.adaptive_max_pool2d(x, (4, 3)), _IMAGE, quick=True),
    row("adaptive_max_pool1d", lambda x: F.adaptive_max_pool1d(x, 4), _LINE),
    row("adaptive_max_pool3d", lambda x: F.adaptive_max_pool3d(x, (2, 3, 4)), _VOLUME),
    row("lp_pool", lambda x: F.lp_pool2d(x.abs() + 0.5, 2, 2), _IMAGE),
    # Padding
    row("pad constant", lambda x: F.pad(x, (1, 2, 0, 1), value=0.5), _IMAGE, quick=True),
    row("pad negative", lambda x: F.pad(x, (-1, 2, 1, -2)), _IMAGE),
    row("pad reflect", lambda x: F.pad(x, (2, 1, 1, 3), "reflect"), _IMAGE, quick=True),
    row("pad reflect 1d", lambda x: F.pad(x, (2, 1), "reflect"), _LINE),
    row("pad replicate", lambda x: F.pad(x, (2, 1, 1, 3), "replicate"), _IMAGE),
    row("pad replicate 1d", lambda x: F.pad(x, (2, 1), "replicate"), _LINE),
    row("pad replicate 3d", lambda x: F.pad(x, (1, 1, 2, 0, 1, 1), "replicate"), _VOLUME),
    row("pad circular", lambda x: F.pad(x, (2, 1, 1, 3), "circular"), _IMAGE),
    # Lookups
    row("embedding", lambda i, w: F.embedding(i, w), (Ints((2, 5), 7), (7, 3)), quick=True),
    row("embedding padded", lambda i, w: F.embedding(i, w, padding_idx=2), (Ints((2, 5), 7), (7, 3))),
    row("embedding by frequency", lambda i, w: F.embedding(i, w, scale_grad_by_freq=True), (Ints((2, 5), 4), (7, 3))),
    row("embedding_bag sum", lambda i, w: F.embedding_bag(i, w, mode="sum"), (Ints((2, 5), 7), (7, 3)), quick=True),
    row("embedding_bag mean", lambda i, w: F.embedding_bag(i, w, mode="mean"), (Ints((2, 5), 7), (7, 3))),
    row("embedding_bag max", lambda i, w: F.embedding_bag(i, w, mode="max"), (Ints((2, 5), 7), (7, 3))),
    row("gather", lambda x, i: x.gather(1, i), ((3, 5), Ints((3, 4), 5)), quick=True),
    row("scatter", lambda x, i, s: x.scatter(1, i.cumsum(1), s), ((3, 9), Ints((3, 4), 2), (3, 4))),
    row("scatter_add", lambda x, i, s: x.scatter_add(1, i, s), ((3, 5), Ints((3, 4), 5), (3, 4)), quick=True),
    row("scatter_reduce amax", lambda x, i, s: x.scatter_reduce(1, i, s, "amax"), ((3, 5), Ints((3, 4), 5), (3, 4))),
    row("index_select", lambda x, i: x.index_select(1, i), ((3, 5), Ints((4,), 5))),
    row("index", lambda x, i: x[:, i], ((3, 5, 2), Ints((4,), 5)), quick=True),
    row("index by two", lambda x, i, j: x[i, :, j], ((3, 5, 4), Ints((6,), 3), Ints((6,), 4))),
    row("index_put", lambda x, i, v: x.index_put((i,), v, accumulate=True), ((5, 3), Ints((4,), 5), (4, 3)), quick=True),
    row("index_add", lambda x, i, v: x.index_add(0, i, v), ((5, 3), Ints((4,), 5), (4, 3))),
    row("index_copy", lambda x, v: x.index_copy(0, torch.tensor([3, 1]), v), ((5, 3), (2, 3))),
    row("masked_fill", lambda x, m: x.masked_fill(m, -2.0), ((3, 5), Bools((3, 5))), quick=True),
    row("masked_scatter", lambda x, m, v: x.masked_scatter(m, v), ((3, 5), Bools((3, 5)), (15,)), fixed=True),
    row("take_along_dim", lambda x, i: x.take_along_dim(i, 1), ((3, 5), Ints((3, 2), 5)), fixed=True),
    row("where", lambda m, x, y: torch.where(m, x, y), (Bools((3, 5)), (3, 5), (5,))),
    row("one_hot", lambda i, x: F.one_hot(i, 7).to(x.dtype) @ x, (Ints((4,), 7), (7, 2))),
    # Order
    row("sort", lambda x: x.sort(-1)[0], ((3, 7),), ((2, 3, 4),), quick=True),
    row("sort descending", lambda x: x.sort(0, descending=True)[0], ((5, 3),)),
    row("argsort", lambda x: x.gather(1, x.argsort(1)), ((3, 7),)),
    row("topk", lambda x: x.topk(3, -1)[0], ((3, 7),), quick=True),
    row("topk smallest", lambda x: x.topk(2, 0, largest=False)[0], ((5, 3),)),
    row("kthvalue", lambda x: x.kthvalue(3, -1)[0], ((3, 7),)),
    row("median", lambda x: x.median(-1)[0], ((3, 7),), ((3, 6),)),
    row("median of all", lambda x: x.median(), ((3, 7),)),
    row("max", lambda x: x.max(1)[0], ((3, 7),), quick=True),
    row("amax", lambda x: x.amax((0, 2)), ((3, 4, 5),)),
    row("min of all", lambda x: x.min(), ((3, 7),)),
    row("maximum", torch.maximum, ((3, 5), (3, 5))),
    row("clamp", lambda x: x.clamp(-0.5, 0.7), ((3, 5),)),
    row("cummax", lambda x: x.cummax(1)[0], ((3, 5),)),
    # Sums
    row("sum", lambda x: x.sum((0, 2)), ((3, 4, 5),), quick=True),
    row("mean", lambda x: x.mean(1, keepdim=True), ((3, 4, 5),)),
    row("prod", lambda x: x.prod(1), (Positive((3, 4)),)),
    row("prod of all", lambda x: x.prod(), (Positive((3, 4)),)),
    row("cumsum", lambda x: x.cumsum(1), ((3, 5),), quick=True),
    row("cumprod", lambda x: x.cumprod(1), (Positive((3, 5)),)),
    row("logcumsumexp", lambda x: x.logcumsumexp(1), ((3, 5),)),
    row("logsumexp", lambda x: x.logsumexp((0, 1)), ((3, 5, 2),)),
    row("var", lambda x: x.var(1), ((3, 5),)),
    row("std", lambda x: x.std((0, 1), correction=0), ((3, 5, 2),)),
    row("norm", lambda x: x.norm(dim=1), ((3, 5),)),
    row("norm 1", lambda x: torch.linalg.vector_norm(x, 1, 0), ((3, 5),)),
    row("norm inf", lambda x: torch.linalg.vector_norm(x, float("inf"), 1), ((3, 5),)),
    row("renorm", lambda x: F.normalize(x, dim=1), ((3, 5),)),
    row("diff", lambda x: x.diff(dim=1), ((3, 5),)),
    row("trace", torch.trace, ((4, 4),)),
    # Activations
    *(
        row(name, function, ((3, 5),), quick=name in ("gelu", "silu"))
        for name, function in {
            "relu": F.relu, "gelu": F.gelu, "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
            "silu": F.silu, "mish": F.mish, "elu": F.elu, "selu": F.selu, "celu": F.celu,
            "softplus": F.softplus, "hardtanh": F.hardtanh, "hardswish": F.hardswish,
            "hardsigmoid": F.hardsigmoid, "leaky_relu": F.leaky_relu, "logsigmoid": F.logsigmoid,
            "tanh": torch.tanh, "sigmoid": torch.sigmoid, "softsign": F.softsign,
            "tanhshrink": F.tanhshrink, "softshrink": F.softshrink, "hardshrink": F.hardshrink,
            "relu6": F.relu6, "threshold": lambda x: F.threshold(x, 0.1, -1.0),
        }.items()
    ),
    row("prelu", F.prelu, ((3, 4, 5), (4,)), ((3, 4), (1,))),
    row("glu", lambda x: F.glu(x, 1), ((3, 6),)),
    row("softmax", lambda x: x.softmax(-1), ((3, 5),), quick=True),
    row("log_softmax", lambda x: x.log_softmax(1), ((3, 5, 2),)),
    # Norms
    row("layer_norm", lambda x, w, b: F.layer_norm(x, (5,), w, b), ((3, 4, 5), (5,), (5,)), quick=True),
    row("layer_norm plain", lambda x: F.layer_norm(x, (4, 5)), ((3, 4, 5),)),
    row("rms_norm", lambda x, w: F.rms_norm(x, (5,), w), ((3, 4, 5), (5,))),
    row("group_norm", lambda x, w, b: F.group_norm(x, 2, w, b), ((3, 4, 5, 6), (4,), (4,)), quick=True),
    row("batch_norm", _batch_norm, ((6, 4), (4,), (4,)), ((3, 4, 5, 6), (4,), (4,)), quick=True),
    row("instance_norm", lambda x: F.instance_norm(x), ((3, 4, 5, 6),)),
    row("local_response_norm", lambda x: F.local_response_norm(x, 3), ((2, 6, 4, 5),)),
    row("weight_norm", lambda v, g: torch._weight_norm(v, g, 0), ((4, 5), (4, 1))),
    # Attention
    row("sdpa", _sdpa(), ((2, 3, 5, 4), (2, 3, 6, 4), (2, 3, 6, 4)), quick=True),
    row("sdpa causal", _sdpa(is_causal=True), ((2, 3, 5, 4), (2, 3, 5, 4), (2, 3, 5, 4)), quick=True),
    row("sdpa masked", _masked, ((2, 3, 5, 4), (2, 3, 6, 4), (2, 3, 6, 4), Bools((2, 1, 5, 6)))),
    row("sdpa grouped", _sdpa(enable_gqa=True), ((2, 4, 5, 4), (2, 2, 6, 4), (2, 2, 6, 4))),
    # Recurrent layers
    row("lstm", recurrent(nn.LSTM, batch_first=True), ((2, 4, 3), (1,)), quick=True),
    row("lstm two ways", recurrent(nn.LSTM, bidirectional=True, num_layers=2), ((4, 2, 3), (1,)), fixed=True),
    row("gru", recurrent(nn.GRU), ((4, 2, 3), (1,)), fixed=True),
    row("rnn", recurrent(nn.RNN), ((4, 2, 3), (1,)), fixed=True),
    # Losses
    row("cross_entropy", lambda x, y: F.cross_entropy(x, y), ((4, 5), Ints((4,), 5)), ((2, 5, 3), Ints((2, 3), 5)), quick=True),
    row("cross_entropy ignoring", lambda x, y: F.cross_entropy(x, y, ignore_index=2), ((6, 5), Ints((6,), 5))),
    row("cross_entropy weighted", lambda x, y, w: F.cross_entropy(x, y, w.detach()), ((6, 5), Ints((6,), 5), Positive((5,)))),
    row("cross_entropy smoothed", lambda x, y: F.cross_entropy(x, y, label_smoothing=0.1), ((4, 5), Ints((4,), 5))),
    row("cross_entropy of probabilities", lambda x, y: F.cross_entropy(x, y.softmax(1)), ((4, 5), (4, 5))),
    row("nll_loss 2d", lambda x, y: F.nll_loss(x.log_softmax(1), y), ((2, 5, 3, 4), Ints((2, 3, 4), 5))),
    row("mse", F.mse_loss, ((3, 5), (3, 5))),
    row("l1", F.l1_loss, ((3, 5), (3, 5))),
    row("smooth_l1", lambda x, y: F.smooth_l1_loss(x, y, beta=0.7), ((3, 5), (3, 5))),
    row("huber", lambda x, y: F.huber_loss(x, y, delta=0.7), ((3, 5), (3, 5))),
    row("bce", lambda x, y: F.binary_cross_entropy(x.sigmoid(), y.sigmoid()), ((3, 5), (3, 5))),
    row("bce with logits", lambda x, y: F.binary_cross_entropy_with_logits(x, y.sigmoid()), ((3, 5), (3, 5))),
    row("kl_div", lambda x, y: F.kl_div(x.log_softmax(1), y.softmax(1), reduction="batchmean"), ((3, 5), (3, 5))),
    row("poisson", lambda x, y: F.poisson_nll_loss(x, y.abs()), ((3, 5), (3, 5))),
    row("hinge_embedding", lambda x, y: F.hinge_embedding_loss(x, 2.0 * y - 1), ((6,), Ints((6,), 2))),
    row("margin_ranking", lambda x, y: F.margin_ranking_loss(x, y, torch.ones(5), 0.3), ((5,), (5,)), fixed=True),
    row("triplet", F.triplet_margin_loss, ((4, 5), (4, 5), (4, 5))),
    row("cosine_similarity", F.cosine_similarity, ((4, 5), (4, 5))),
    # Sizes
    row("interpolate nearest", lambda x: F.interpolate(x, scale_factor=2), _IMAGE, quick=True),
    row("interpolate nearest down", lambda x: F.interpolate(x, size=(5, 3)), _IMAGE),
    row("interpolate nearest exact", lambda x: F.interpolate(x, size=(5, 11), mode="nearest-exact"), _IMAGE),
    row("interpolate nearest 1d", lambda x: F.interpolate(x, size=7), _LINE),
    row("interpolate nearest 3d", lambda x: F.interpolate(x, scale_factor=2), _VOLUME),
    row("interpolate linear", lambda x: F.interpolate(x, size=7, mode="linear"), _LINE),
    row("interpolate bilinear", lambda x: F.interpolate(x, size=(13, 5), mode="bilinear"), _IMAGE, quick=True),
    row("interpolate bilinear, corners", lambda x: F.interpolate(x, size=(13, 5), mode="bilinear", align_corners=True), _IMAGE),
    row("interpolate bicubic", lambda x: F.interpolate(x, scale_factor=1.5, mode="bicubic"), _IMAGE),
    row("interpolate trilinear", lambda x: F.interpolate(x, scale_factor=2, mode="trilinear"), _VOLUME),
    row("interpolate area", lambda x: F.interpolate(x, size=(4, 3), mode="area"), _IMAGE),
    row("grid_sample", lambda x, g: F.grid_sample(x, g.tanh(), align_corners=False), ((2, 3, 5, 6), (2, 4, 3, 2)), quick=True),
    row("grid_sample border", lambda x, g: F.grid_sample(x, g, padding_mode="border", align_corners=True), ((2, 3, 5, 6), (2, 4, 3, 2))),
    row("grid_sample nearest", lambda x, g: F.grid_sample(x, g.tanh(), mode="nearest", align_corners=False), ((2, 3, 5, 6), (2, 4, 3, 2))),
    row("affine_grid", lambda t: F.affine_grid(t, [2, 3, 4, 5], align_corners=False), ((2, 2, 3),), fixed=True),
    row("affine_grid of the batch", lambda t: F.affine_grid(t, [t.shape[0], 3, 4, 5], align_corners=True), ((2, 2, 3),)),
    row("pixel_shuffle", lambda x: F.pixel_shuffle(x, 2), ((2, 8, 3, 4),)),
    row("pixel_unshuffle", lambda x: F.pixel_unshuffle(x, 2), ((2, 3, 4, 6),)),
    row("unfold", lambda x: F.unfold(x, 3, padding=1, stride=2), _IMAGE),
    row("fold", lambda x: F.fold(x, (6, 5), 2), ((2, 12, 20),)),
    row("channel_shuffle", lambda x: F.channel_shuffle(x, 2), _IMAGE),
    # Shapes
    row("cat", lambda x, y: torch.cat([x, y, x], 1), ((3, 2), (3, 4)), quick=True),
    row("stack", lambda x, y: torch.stack([x, y], 1), ((3, 2), (3, 2))),
    row("split", lambda x: x.split([2, 3], 1)[1], ((3, 5),)),
    row("chunk", lambda x: torch.cat(x.chunk(3, 1)[::-1], 1), ((2, 7),)),
    row("unbind", lambda x: x.unbind(1)[2], ((2, 4, 3),)),
    row("expand", lambda x: x.expand(4, 3, 5), ((3, 1),), fixed=True),
    row("repeat", lambda x: x.repeat(2, 3), ((3, 2),)),
    row("repeat_interleave", lambda x: x.repeat_interleave(2, 1), ((3, 4),)),
    row("tile", lambda x: x.tile(2, 2), ((3, 2),)),
    row("roll", lambda x: x.roll((1, -2), (0, 1)), ((3, 5),)),
    row("flip", lambda x: x.flip(0, 2), ((3, 2, 4),)),
    row("rot90", lambda x: x.rot90(1, (0, 1)), ((3, 4),)),
    row("permute", lambda x: x.permute(2, 0, 1), ((3, 2, 4),)),
    row("slice", lambda x: x[1:, ::2, None, -1], ((3, 5, 4),), quick=True),
    row("select", lambda x: x.select(1, 2), ((3, 5),)),
    row("select scattered", lambda x, y: torch.select_scatter(x, y, 1, 2), ((3, 5), (3,))),
    row("slice scattered", lambda x, y: torch.slice_scatter(x, y, 1, 1, 5, 2), ((3, 5), (3, 2))),
    row("diagonal", lambda x: x.diagonal(1), ((4, 5),)),
    row("diag_embed", torch.diag_embed, ((3, 4),)),
    row("tril", lambda x: x.tril(1), ((4, 5),)),
    row("unfold of a tensor", lambda x: x.unfold(1, 3, 2), ((2, 9),)),
    row("as_strided", lambda x: x.as_strided((3, 2), (2, 1), 1), ((4, 3),), fixed=True),
    row("as_strided turned", lambda x: x.as_strided((x.shape[0], 4, 3), (12, 1, 4)), ((2, 3, 4),), quick=True),
    row("as_strided_scatter", lambda x, y: torch.as_strided_scatter(x, y, (3, 2), (2, 1), 1), ((4, 3), (3, 2)), fixed=True),
    row("squeeze", lambda x: x.squeeze((0, 2)), ((1, 3, 1),), fixed=True),
    row("squeeze of one axis", lambda x: x.squeeze(1), ((4, 1, 3),), ((4, 3, 3),)),
    row("squeeze of another size", lambda x: x.squeeze(1), ((4, 3, 3),), quick=True),
    row("squeeze of all axes", lambda x: x.squeeze(), ((4, 1, 3, 1),), ((4, 3),)),
    row("amax of all", lambda x: x.amax() + x.amin(), ((3, 5),), quick=True),
    row("divide by a count", lambda x: torch.divide(torch.subtract(x, 1), (x > 0).sum()), ((3, 5),)),
    row("scatter that adds", lambda x, i, y: x + x.detach().scatter(1, i, y.detach(), reduce="add"), ((3, 5), Ints((3, 2), 5), (3, 2))),
    row("scatter that multiplies", lambda x, i: x + x.detach().scatter(1, i, 2.0, reduce="multiply"), ((3, 5), Ints((3, 2), 5))),
    row("movedim", lambda x: x.movedim(0, -1), ((3, 2, 4),)),
    row("meshgrid", lambda x, y: torch.meshgrid(x, y, indexing="ij")[0] * 2, ((3,), (4,))),
    row("block_diag", torch.block_diag, ((2, 3), (1, 2)), fixed=True),
    # Arithmetic
    *(
        row(name, function, (Positive((3, 5)),))
        for name, function in {
            "exp": torch.exp, "log": torch.log, "log1p": torch.log1p, "log2": torch.log2,
            "expm1": torch.expm1, "sqrt": torch.sqrt, "rsqrt": torch.rsqrt, "sin": torch.sin,
            "cos": torch.cos, "tan": torch.tan, "atan": torch.atan, "sinh": torch.sinh,
            "erf": torch.erf, "erfc": torch.erfc, "reciprocal": torch.reciprocal,
            "square": torch.square, "abs": torch.abs, "neg": torch.neg, "pow 3": lambda x: x**3,
            "pow 0.3": lambda x: x**0.3, "pow of 2": lambda x: 2.0**x, "exp2": torch.exp2,
            "xlogy": lambda x: torch.xlogy(x, x + 1), "sinc": torch.sinc,
            "logit": lambda x: torch.logit(x / 2),
        }.items()
    ),
    row("add", lambda x, y: torch.add(x, y, alpha=0.3), ((3, 5), (5,)), quick=True),
    row("mul", torch.mul, ((3, 1, 5), (4, 1))),
    row("div", torch.div, ((3, 5), Positive((3, 5))), quick=True),
    row("pow", torch.pow, (Positive((3, 5)), (3, 5))),
    row("atan2", torch.atan2, ((3, 5), Positive((3, 5)))),
    row("remainder", lambda x: x.remainder(0.7), (Positive((3, 5)),)),
    row("lerp", torch.lerp, ((3, 5), (3, 5), (3, 5))),
    row("addcmul", lambda x, y, z: torch.addcmul(x, y, z, value=0.4), ((3, 5), (3, 5), (5,))),
    row("addcdiv", lambda x, y, z: torch.addcdiv(x, y, z, value=0.4), ((3, 5), (3, 5), Positive((3, 5)))),
    row("hypot", torch.hypot, (Positive((3, 5)), Positive((3, 5)))),
    row("logaddexp", torch.logaddexp, ((3, 5), (3, 5))),
    row("dist", torch.dist, ((3, 5), (3, 5))),
    row("floor, round, sign", lambda x: x.floor() + x.round() * x.sign() * x, ((3, 5),)),
    row("nan_to_num", lambda x: (x / (x > 0)).nan_to_num(0.5, 2.0, -2.0) * x, ((3, 5),)),
)  # fmt: skip
