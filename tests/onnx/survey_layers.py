"""The layers of torch.nn that survey_cases has not: options, ranks, whole blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .survey_row import Bools, Ints, Positive, Row, recurrent, row

_IMAGE = ((2, 4, 9, 8),)
_LINE = ((2, 4, 11),)
_VOLUME = ((2, 3, 6, 5, 7),)
_FIRST = torch.tensor([0, 3, 3, 6])


def layer(module: nn.Module, *shapes: Any) -> Callable[..., Any]:
    """A layer whose weights come from one tensor, a factor, given last."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        n: torch.randn(p.shape, generator=generator) * 0.3 for n, p in module.named_parameters()
    }

    def run(*inputs: Tensor) -> Any:
        *given, factor = inputs
        cast = {n: w.to(factor.dtype) * factor for n, w in weights.items()}
        return torch.func.functional_call(module, cast, tuple(given))

    return run


class _Call(nn.Module):
    def __init__(self, inner: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.inner, self.call = inner, call

    def forward(self, *given: Tensor) -> Any:
        return self.call(self.inner, *given)


def call(module: nn.Module, function: Callable[..., Any]) -> Callable[..., Any]:
    """A layer, called in a way of its own."""
    return layer(_Call(module, function))


def _attention(**options: Any) -> nn.MultiheadAttention:
    return nn.MultiheadAttention(8, 2, batch_first=True, **options)


def _masked(attention: Any, x: Tensor, mask: Tensor) -> Any:
    return attention(x, x, x, key_padding_mask=mask & (torch.arange(mask.shape[1]) > 0))


def _grid(**options: Any) -> Callable[..., Any]:
    return lambda x, g: F.grid_sample(
        x,
        g * 0.7,
        align_corners=options.get("align_corners", False),
        **{k: v for k, v in options.items() if k != "align_corners"},
    )


_GRID = (((2, 3, 5, 6), (2, 4, 3, 2)),)
_GRID3 = (((2, 3, 4, 5, 6), (2, 3, 4, 2, 3)),)


def _unpool(rank: int) -> Callable[..., Tensor]:
    pools = {
        1: (F.max_pool1d, F.max_unpool1d),
        2: (F.max_pool2d, F.max_unpool2d),
        3: (F.max_pool3d, F.max_unpool3d),
    }
    pool, unpool = pools[rank]

    def run(x: Tensor) -> Tensor:
        values, places = pool(x, 2, return_indices=True)
        return unpool(values * values, places, 2, output_size=x.shape[-rank:])

    return run


def _bag(**options: Any) -> Callable[..., Tensor]:
    return lambda i, w: F.embedding_bag(i, w, _FIRST, **options)


ROWS: tuple[Row, ...] = (
    # Activations
    row("elu alpha", lambda x: F.elu(x, 0.7), ((3, 5),)),
    row("celu alpha", lambda x: F.celu(x, 0.7), ((3, 5),)),
    row("softplus beta", lambda x: F.softplus(x * 8, 2.0, 3.0), ((3, 5),)),
    row("hardtanh bounds", lambda x: F.hardtanh(x, -0.3, 0.6), ((3, 5),)),
    row("leaky_relu slope", lambda x: F.leaky_relu(x, 0.3), ((3, 5),)),
    row("softmin", lambda x: F.softmin(x, 1), ((3, 5),)),
    row("softmax2d", lambda x: nn.Softmax2d()(x), ((2, 3, 4, 5),)),
    row("rrelu in evaluation", lambda x: F.rrelu(x), ((3, 5),)),
    row("relu in place", lambda x: F.relu_(x * 1), ((3, 5),)),
    row("adaptive_log_softmax", call(nn.AdaptiveLogSoftmaxWithLoss(6, 9, [3, 6]), lambda m, v: m.log_prob(v)), ((4, 6), (1,))),
    # Pools
    row("max_pool1d ceil, dilated", lambda x: F.max_pool1d(x, 2, 3, dilation=2, ceil_mode=True), _LINE),
    row("max_pool3d overlapping", lambda x: F.max_pool3d(x, 3, 2, 1, ceil_mode=True), _VOLUME),
    row("max_pool uneven", lambda x: F.max_pool2d(x, (3, 2), (1, 2), (1, 0)), _IMAGE),
    row("max_pool without batch", lambda x: F.max_pool2d(x, 2), ((4, 9, 8),)),
    row("max_unpool1d", _unpool(1), ((2, 4, 10),)),
    row("max_unpool", _unpool(2), _IMAGE),
    row("max_unpool3d", _unpool(3), _VOLUME),
    row("avg_pool1d ceil", lambda x: F.avg_pool1d(x, 3, 2, 1, ceil_mode=True, count_include_pad=False), ((2, 4, 12),)),
    row("avg_pool3d ceil", lambda x: F.avg_pool3d(x, 2, 2, 1, ceil_mode=True, count_include_pad=False), _VOLUME),
    row("avg_pool3d divisor", lambda x: F.avg_pool3d(x, 2, divisor_override=3), _VOLUME),
    row("adaptive_avg_pool kept", lambda x: F.adaptive_avg_pool2d(x, (None, 3)), _IMAGE),
    row("adaptive_avg_pool larger", lambda x: F.adaptive_avg_pool2d(x, (11, 3)), _IMAGE),
    row("lp_pool1d", lambda x: F.lp_pool1d(x, 3, 2), (Positive((2, 4, 11)),)),
    row("lp_pool3d", lambda x: F.lp_pool3d(x, 2, 2), (Positive((2, 3, 6, 5, 7)),)),
    row("lp_pool odd", lambda x: F.lp_pool2d(x, 3, 2, ceil_mode=True), (Positive((2, 4, 9, 8)),)),
    # Padding
    row("pad constant 1d", lambda x: F.pad(x, (2, 1), value=-1.5), _LINE),
    row("pad constant 3d", lambda x: F.pad(x, (2, 1, 0, 1, 1, 1)), _VOLUME),
    row("pad reflect 3d", lambda x: F.pad(x, (2, 1, 1, 2, 3, 1), "reflect"), _VOLUME),
    row("pad circular 1d", lambda x: F.pad(x, (2, 1), "circular"), _LINE),
    row("pad circular 3d", lambda x: F.pad(x, (2, 1, 0, 3, 1, 1), "circular"), _VOLUME),
    row("pad replicate, negative", lambda x: F.pad(x, (2, -1, -2, 3), "replicate"), _IMAGE),
    row("pad reflect, without batch", lambda x: F.pad(x, (2, 1, 1, 2), "reflect"), ((4, 6, 5),)),
    row("conv circular", layer(nn.Conv2d(4, 3, 3, padding=1, padding_mode="circular")), (*_IMAGE, (1,))),
    row("conv reflected", layer(nn.Conv2d(4, 3, 3, padding=1, padding_mode="reflect")), (*_IMAGE, (1,))),
    row("conv without batch", F.conv2d, ((3, 7, 6), (4, 3, 3, 2)), fixed=True),
    row("conv transposed without batch", F.conv_transpose1d, ((3, 5), (3, 4, 3))),
    # Norms
    row("batch_norm 1d", lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True), ((6, 4), (4,), (4,)), ((3, 4, 5), (4,), (4,))),
    row("batch_norm 3d", layer(nn.BatchNorm3d(3, track_running_stats=False)), (*_VOLUME, (1,))),
    row("batch_norm in evaluation", layer(nn.BatchNorm2d(4).eval()), (*_IMAGE, (1,))),
    row("batch_norm without statistics", layer(nn.BatchNorm2d(4, track_running_stats=False, affine=False)), (*_IMAGE, (1,))),
    row("group_norm of lines", lambda x: F.group_norm(x, 2), _LINE, ((3, 6),)),
    row("group_norm of one each", lambda x, w, b: F.group_norm(x, 4, w, b), (*_IMAGE, (4,), (4,))),
    row("instance_norm affine", layer(nn.InstanceNorm2d(4, affine=True)), (*_IMAGE, (1,))),
    row("instance_norm 3d", lambda x: F.instance_norm(x), _VOLUME),
    row("layer_norm without bias", layer(nn.LayerNorm(5, bias=False)), ((3, 4, 5), (1,))),
    row("layer_norm of pictures", layer(nn.LayerNorm((4, 9, 8))), (*_IMAGE, (1,))),
    row("rms_norm plain", lambda x: F.rms_norm(x, (4, 5), eps=1e-3), ((3, 4, 5),)),
    row("local_response_norm 1d", lambda x: F.local_response_norm(x, 2, 0.1, 0.5, 2.0), ((2, 6, 4),)),
    row("local_response_norm 3d", lambda x: F.local_response_norm(x, 3), _VOLUME),
    row("spectral_norm", layer(torch.nn.utils.parametrizations.spectral_norm(nn.Linear(5, 4, bias=False)).eval()), ((3, 5), (4, 1))),
    row("weight_norm layer", layer(torch.nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 3, 3))), (*_LINE, (1,))),
    row("normalize 1", lambda x: F.normalize(x, 1, dim=0), ((3, 5),)),
    row("norm 3", lambda x: torch.linalg.vector_norm(x, 3, 1), ((3, 5),)),
    row("norm 0", lambda x: torch.linalg.vector_norm(x, 0, 1) * x[:, 0], ((3, 5),)),
    row("norm of a matrix", lambda x: torch.linalg.matrix_norm(x), ((2, 3, 5),)),
    row("norm 1 of a matrix", lambda x: torch.linalg.matrix_norm(x, 1), ((2, 3, 5),), fixed=True),
    # Recurrent layers
    row("lstm without bias", recurrent(nn.LSTM, bias=False), ((4, 2, 3), (1,)), fixed=True),
    row("lstm projected", recurrent(nn.LSTM, proj_size=2), ((4, 2, 3), (1,)), fixed=True),
    row("lstm without batch", recurrent(nn.LSTM), ((4, 3), (1,)), fixed=True),
    row("gru two ways", recurrent(nn.GRU, bidirectional=True, num_layers=2, batch_first=True), ((2, 4, 3), (1,))),
    row("gru without bias", recurrent(nn.GRU, bias=False), ((4, 2, 3), (1,)), fixed=True),
    row("rnn relu, two ways", recurrent(nn.RNN, nonlinearity="relu", bidirectional=True, num_layers=2), ((4, 2, 3), (1,)), fixed=True),
    row("lstm cell", layer(nn.LSTMCell(3, 4)), ((2, 3), (1,))),
    row("gru cell", layer(nn.GRUCell(3, 4)), ((5, 3), (1,))),
    row("rnn cell", layer(nn.RNNCell(3, 4, nonlinearity="relu")), ((2, 3), (1,))),
    row("lstm with state", call(nn.LSTM(3, 4), lambda m, x, h, c: m(x, (h, c))), ((5, 2, 3), (1, 2, 4), (1, 2, 4), (1,)), fixed=True),
    # Attention
    row("multihead attention", call(_attention(), lambda a, q, k: a(q, k, k, need_weights=False)), ((2, 5, 8), (2, 6, 8), (1,))),
    row("multihead attention masked", call(_attention(), _masked), ((2, 5, 8), Bools((2, 5)), (1,))),
    row("multihead attention, other sizes", layer(_attention(kdim=6, vdim=4, bias=False)), ((2, 5, 8), (2, 6, 6), (2, 6, 4), (1,))),
    row("multihead attention, bias of keys", call(_attention(add_bias_kv=True, add_zero_attn=True), lambda a, q, k: a(q, k, k)), ((2, 5, 8), (2, 6, 8), (1,))),
    row("transformer encoder layer", layer(nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)), ((2, 5, 8), (1,))),
    row("transformer encoder layer, norm first", layer(nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, activation="gelu", norm_first=True)), ((5, 2, 8), (1,))),
    row("transformer decoder layer", layer(nn.TransformerDecoderLayer(8, 2, 12, dropout=0.0, batch_first=True)), ((2, 4, 8), (2, 5, 8), (1,))),
    row("sdpa scaled", lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m, scale=0.3), ((2, 3, 5, 4), (2, 3, 6, 4), (2, 3, 6, 4), (5, 6))),
    # Bags
    row("embedding_bag offsets", _bag(), (Ints((8,), 7), (7, 3))),
    row("embedding_bag mean, offsets", _bag(mode="mean"), (Ints((8,), 7), (7, 3))),
    row("embedding_bag max, offsets", _bag(mode="max"), (Ints((8,), 7), (7, 3))),
    row("embedding_bag padded", _bag(mode="mean", padding_idx=2), (Ints((8,), 4), (7, 3))),
    row("embedding_bag max padded", _bag(mode="max", padding_idx=2), (Ints((8,), 4), (7, 3))),
    row("embedding_bag last offset", _bag(include_last_offset=True), (Ints((6,), 7), (7, 3)), fixed=True),
    row("embedding_bag sum, last offset", _bag(mode="sum", include_last_offset=True), (Ints((6,), 7), (7, 3)), fixed=True),
    row("embedding_bag sum padded", _bag(mode="sum", padding_idx=2), (Ints((8,), 4), (7, 3))),
    row("embedding_bag weighted", lambda i, w, s: F.embedding_bag(i, w, per_sample_weights=s, mode="sum"), (Ints((2, 5), 7), (7, 3), (2, 5))),
    # Sizes
    row("interpolate linear, corners", lambda x: F.interpolate(x, size=7, mode="linear", align_corners=True), _LINE),
    row("interpolate nearest exact 3d", lambda x: F.interpolate(x, size=(3, 7, 9), mode="nearest-exact"), _VOLUME),
    row("interpolate bicubic, corners", lambda x: F.interpolate(x, size=(13, 5), mode="bicubic", align_corners=True), _IMAGE),
    row("interpolate bicubic to a scale", lambda x: F.interpolate(x, scale_factor=(1.3, 0.7), mode="bicubic", recompute_scale_factor=True), _IMAGE),
    row("interpolate trilinear, corners", lambda x: F.interpolate(x, size=(3, 7, 9), mode="trilinear", align_corners=True), _VOLUME),
    row("interpolate linear by a fraction", lambda x: F.interpolate(x, scale_factor=1.7, mode="linear"), _LINE),
    row("interpolate bilinear, antialiased", lambda x: F.interpolate(x, size=(5, 3), mode="bilinear", antialias=True), _IMAGE),
    row("interpolate bicubic, antialiased", lambda x: F.interpolate(x, size=(5, 3), mode="bicubic", antialias=True), _IMAGE, fixed=True),
    row("interpolate bilinear, antialiased, corners", lambda x: F.interpolate(x, size=(5, 3), mode="bilinear", antialias=True, align_corners=True), _IMAGE),
    row("interpolate bicubic, antialiased, by a fraction", lambda x: F.interpolate(x, scale_factor=0.45, mode="bicubic", antialias=True), _IMAGE, fixed=True),
    row("interpolate area 3d", lambda x: F.interpolate(x, size=(4, 3, 2), mode="area"), _VOLUME),
    row("interpolate by a fraction", lambda x: F.interpolate(x, scale_factor=0.7, mode="bilinear"), _IMAGE),
    row("interpolate by a fraction that fp32 rounds down", lambda x: F.interpolate(x, scale_factor=2.3), ((2, 3, 20),)),
    row("grid_sample reflection", _grid(padding_mode="reflection"), *_GRID),
    row("grid_sample reflection, corners", _grid(padding_mode="reflection", align_corners=True), *_GRID),
    row("grid_sample bicubic", _grid(mode="bicubic"), *_GRID, quick=True),
    row("grid_sample bicubic, corners", _grid(mode="bicubic", align_corners=True), *_GRID),
    row("grid_sample bicubic border", _grid(mode="bicubic", padding_mode="border"), *_GRID),
    row("grid_sample bicubic reflection", _grid(mode="bicubic", padding_mode="reflection"), *_GRID),
    row("grid_sample 3d", _grid(), *_GRID3, quick=True),
    row("grid_sample 3d border, corners", _grid(padding_mode="border", align_corners=True), *_GRID3),
    row("grid_sample 3d reflection", _grid(padding_mode="reflection"), *_GRID3),
    row("grid_sample 3d nearest", _grid(mode="nearest"), *_GRID3),
    row("affine_grid 3d", lambda t: F.affine_grid(t, [2, 3, 4, 5, 2], align_corners=True), ((2, 3, 4),), fixed=True),
    row("unfold dilated", lambda x: F.unfold(x, (2, 3), dilation=2, padding=(0, 1), stride=(1, 2)), _IMAGE),
    row("fold overlapping", lambda x: F.fold(x, (5, 6), 3, dilation=1, padding=1, stride=2), ((2, 18, 9),)),
    row("dropout in evaluation", lambda x: F.dropout(x, 0.5, training=False), ((3, 5),)),
)  # fmt: skip
