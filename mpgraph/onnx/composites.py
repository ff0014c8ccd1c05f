"""Composite operators: which stay whole until they are translated, and which are opened before.

A step is traced below autograd, where torch has opened them all. The graph of an inference file
has them as the model calls them: ``linear``, ``layer_norm`` and attention become the ONNX operators
of these names, and each rounds once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._C import DispatchKey

from mpgraph.onnx.registry import registry

aten = torch.ops.aten

_ARITHMETIC = aten.divide, aten.true_divide, aten.multiply, aten.subtract
_ALIASES = (
    *(packet.Tensor for packet in _ARITHMETIC), *(packet.Scalar for packet in _ARITHMETIC),
    aten.greater.Tensor, aten.greater_equal.Tensor, aten.less.Tensor, aten.less_equal.Tensor,
)  # fmt: skip
# Composite operators that torchlib translates to something else, and to what.
OPENED: dict[Any, str] = {
    aten.conv3d.default: "takes a number for the bias where there is none",
    aten.cross_entropy_loss.default: "takes class probabilities for class numbers",
    aten.nll_loss.default: "takes no size for ignore_index",
    aten.embedding_bag.default: "loops over the bags",
    aten.embedding_bag.padding_idx: "loops over the bags",
    **dict.fromkeys(_ALIASES, "an operator that takes operands of one dtype alone"),
}


def stays_whole(node: fx.Node, opset: int) -> bool:
    """Whether a node calls a composite operator that is translated as it is."""
    target: Any = node.target
    if target in _OPENED_IF and _OPENED_IF[target](node):
        return False
    return _is_known(target, opset)


def _is_known(target: Any, opset: int) -> bool:
    return target not in OPENED and bool(registry(opset).is_registered(target))


def _has_projections(lstm: fx.Node) -> bool:
    _, _, weights, biases, layers, _, _, bidirectional, *_ = lstm.args
    return len(weights) != (4 if biases else 2) * layers * (1 + bidirectional)  # type: ignore


def _has_no_heads_or_is_turned(attention: fx.Node) -> bool:
    scale: Any = attention.kwargs.get("scale")
    is_turned = isinstance(scale, (int, float)) and scale < 0  # torchlib takes its square root
    return is_turned or bool(attention.args[0].meta["val"].dim() != 4)  # type: ignore[union-attr]


def _has_exact_sizes(resize: fx.Node) -> bool:
    """Whether factors give whole sizes; onnxruntime multiplies in fp32 and would round down.

    Opened, a call has the sizes themselves. They would not do if a factor and a size disagree.
    """
    x, size, *_, factors = resize.args
    if size is not None or not isinstance(factors, (list, tuple)):
        return False
    sizes = x.meta["val"].shape[2:]  # type: ignore[union-attr]
    pairs: Any = [*zip(sizes, factors, strict=True)]
    return all(isinstance(n, int) and (n * factor).is_integer() for n, factor in pairs)


_RESIZES = (
    aten.upsample_linear1d.vec, aten.upsample_bilinear2d.vec, aten.upsample_trilinear3d.vec,
    aten.upsample_bicubic2d.vec, aten.upsample_nearest1d.vec, aten.upsample_nearest2d.vec,
    aten.upsample_nearest3d.vec,
)  # fmt: skip
# What torchlib does not translate all calls of, and which calls it does not.
_OPENED_IF: dict[Any, Callable[[fx.Node], bool]] = {
    **dict.fromkeys(_RESIZES, _has_exact_sizes),
    aten.lstm.input: _has_projections,
    aten.scaled_dot_product_attention.default: _has_no_heads_or_is_turned,
}


def opened(opset: int, *, half_products: bool = False) -> dict[Any, Callable[..., Any]]:
    """What torch itself runs for each composite operator that does not stay whole.

    Args:
        opset: The version of the ai.onnx operators.
        half_products: Matrix products are to run in 16 bit: ``linear`` on more than two
            dimensions becomes one product that adds the bias before it rounds, where torch.onnx
            makes a product and an addition of it.
    """
    return {**_opened(opset), **(_FOR_HALF_PRODUCTS if half_products else {})}


@functools.cache
def _opened(opset: int) -> dict[Any, Callable[..., Any]]:
    composite = [
        target
        for target in torch.export.default_decompositions()
        if isinstance(target, torch._ops.OpOverload) and target._can_decompose()
    ]
    made = {target: _composite(target) for target in composite if not _is_known(target, opset)}
    return {**made, **RESIZED}


def _composite(target: Any) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("kernel", None)
        return target._op_dk(DispatchKey.CompositeImplicitAutograd, *args, **kwargs)

    return run


def _resized(resize: Any) -> Callable[..., Any]:
    """As torch's own, which asks for the numbers of sizes."""

    def run(x: Tensor, size: Any, *rest: Any) -> Any:
        *align, factors = rest
        if size is None:
            sym_int: Any = torch.sym_int
            size = [sym_int(n * f) for n, f in zip(x.shape[2:], factors, strict=True)]
        return resize(x, size, *align, *(factors or ()))

    return run


# By operator: what torch's own does with numbers alone, for symbolic sizes too.
RESIZED: dict[Any, Callable[..., Any]] = {
    packet.vec: _resized(packet.default)
    for packet in (
        aten.upsample_linear1d, aten._upsample_nearest_exact1d, aten._upsample_nearest_exact2d,
        aten._upsample_nearest_exact3d, aten._upsample_bilinear2d_aa, aten._upsample_bicubic2d_aa,
    )
}  # fmt: skip


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    flat = x.reshape(-1, x.shape[-1]) if x.dim() != 2 else x
    product = flat @ weight.t() if bias is None else torch.addmm(bias, flat, weight.t())
    return product.reshape(*x.shape[:-1], weight.shape[0])


_FOR_HALF_PRODUCTS: dict[Any, Callable[..., Any]] = {aten.linear.default: _linear}
