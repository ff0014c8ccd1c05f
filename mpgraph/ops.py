"""The scaled casts: operators at which gradients enter the fp16 region, and leave it again.

Inside the region a gradient is ``scale`` times its true value; outside it is true.

* ``lower(x, dtype, scale)`` casts into the region. Its backward is ``unscale``:
  ``g.to(x.dtype) / scale``.
* ``widen(x, dtype, scale)`` casts out of it. Its backward is ``scale``:
  ``(g * scale).to(x.dtype)``.

The backward of ``unscale`` is ``lower``, and that of ``scale`` is ``widen``: a gradient of a
gradient obeys the same rule, to any order. With ``dtype=x.dtype`` they copy, and only the
gradient changes. The tensor ``scale`` is kept from the forward pass, so that a backward pass leaves
the region by the scale that it entered it with, whatever the scale has become in between. One that
was changed in place is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch._functorch.utils import enable_single_level_autograd_function
from torch._ops import OpOverload
from torch.autograd.function import _SingleLevelFunction

Kernel = Callable[[torch.Tensor, torch.dtype, torch.Tensor], torch.Tensor]

_SCHEMA = "(Tensor x, ScalarType dtype, Tensor scale) -> Tensor"
_library: Any = cast(Any, torch.library).Library("mpgraph", "DEF")


def _on_values(kernel: Kernel) -> Kernel:
    """``kernel`` for sparse gradients too, such as ``nn.Embedding(sparse=True)`` yields."""

    def run(x: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor) -> torch.Tensor:
        if x.layout is not torch.sparse_coo:
            return kernel(x, dtype, scale)
        values = kernel(x._values(), dtype, scale)
        whole = bool(x.is_coalesced())
        return torch.sparse_coo_tensor(
            x._indices(), values, x.shape, is_coalesced=whole, check_invariants=False
        )

    return run


@_on_values
def _cast(x: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor) -> torch.Tensor:
    return x.to(dtype, copy=True)


@_on_values
def _multiply(x: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor) -> torch.Tensor:
    # One kernel, in the dtype of x, which is the wider one.
    return torch.mul(x, beside(x, scale), out=torch.empty_like(x, dtype=dtype))


@_on_values
def _divide(x: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor) -> torch.Tensor:
    # A scale with one dimension makes torch compute in float32, whatever x is, in one kernel.
    if x.dim() and dtype is torch.float32:
        return torch.div(x, beside(x, scale).view(1))
    # A kernel that computes in fp16 would make a scale above 65504 infinite.
    return x.to(torch.promote_types(dtype, torch.float32)).div(beside(x, scale)).to(dtype)


def beside(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The scale on the device of ``x``."""
    return scale if scale.device == x.device else scale.to(x.device)


def _define(name: str, kernel: Kernel) -> OpOverload:
    _library.define(name + _SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, kernel, "CompositeExplicitAutograd")
    operator: OpOverload = getattr(torch.ops.mpgraph, name).default
    torch.library.register_vmap(operator, _vmap(operator))
    return operator


def _vmap(operator: OpOverload) -> Callable[..., Any]:
    def batched(
        _: Any, dims: Any, x: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor
    ) -> tuple[Any, Any]:
        if dims[2] is not None:
            raise NotImplementedError("vmap over the loss scale: a graph has one scale")
        return operator(x, dtype, scale), dims[0]

    return batched


LOWER = _define("lower", _cast)
WIDEN = _define("widen", _cast)
UNSCALE = _define("unscale", _divide)
SCALE = _define("scale", _multiply)


TENSORS = (torch.Tensor, torch.nn.Parameter)
_count_modes = torch._C._len_torch_dispatch_stack
_is_transformed = torch._C._are_functorch_transforms_active
_has_key = torch._C._dispatch_tls_is_dispatch_key_included
_PRE_DISPATCH = torch._C.DispatchKey.PreDispatch  # there while modes see what comes before autograd


def is_plain(x: torch.Tensor) -> bool:
    """Whether nothing but the kernel would see a call of the operator on ``x``."""
    return type(x) in TENSORS and not is_watched()


def is_watched() -> bool:
    """Whether a mode or a transform sees every operator that runs."""
    return bool(_count_modes() or _is_transformed() or _has_key(_PRE_DISPATCH))


def remember(ctx: Any, x: torch.Tensor, scale: torch.Tensor) -> None:
    """Keep on ``ctx`` what the backward pass needs."""
    # Not save_for_backward: the first backward pass frees what that holds, and the 16-bit copy
    # of a parameter serves several.
    ctx.dtype, ctx.scale = x.dtype, scale
    ctx.version = None if scale.is_inference() else scale._version


def recall(ctx: Any) -> torch.Tensor:
    """The scale that ``ctx`` keeps, unless somebody has written to it."""
    scale: torch.Tensor = ctx.scale
    if ctx.version is not None and scale._version != ctx.version:
        raise RuntimeError(
            "mpgraph: the loss scale was modified in place between a forward pass and its backward "
            "pass. Replace it by a new one: mpgraph.guard does, and LossScale.next returns one."
        )
    return scale


def _differentiable(operator: OpOverload, kernel: Kernel, derivative: Kernel) -> Kernel:
    """``operator`` gets a backward pass, which runs ``derivative``; return a function like it.

    Calling the function goes straight to the kernel where nobody would notice: a graph runs a
    scaled cast for every weight, and each way through torch's dispatcher costs as much as a small
    kernel.
    """

    class ScaledCast(_SingleLevelFunction):
        @staticmethod
        def forward(ctx: Any, x: Any, dtype: Any, scale: Any) -> Any:
            remember(ctx, x, scale)
            if is_plain(x):
                return kernel(x, dtype, scale)
            with torch._C._AutoDispatchBelowAutograd():
                return operator(x, dtype, scale)

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            return derivative(gradients[0], ctx.dtype, recall(ctx)), None, None

    class PlainCast(ScaledCast):
        @staticmethod
        def forward(ctx: Any, x: Any, dtype: Any, scale: Any) -> Any:
            remember(ctx, x, scale)
            return kernel(x, dtype, scale)

    apply = cast(Kernel, cast(Any, ScaledCast).apply)
    apply_plainly = cast(Kernel, cast(Any, PlainCast).apply)

    def direct(x: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling() or not is_plain(x):
            return operator(x, dtype, scale)  # type: ignore[no-any-return]
        if x.requires_grad and torch.is_grad_enabled():
            return apply_plainly(x, dtype, scale)
        return kernel(x, dtype, scale)

    def run(x: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            if torch._C._are_functorch_transforms_active():
                with enable_single_level_autograd_function():
                    return apply(x, dtype, scale)
            return apply(x, dtype, scale)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(x, dtype, scale)  # type: ignore[no-any-return]

    _library.impl(operator._schema.name, run, "Autograd")
    return direct


def _direct(operator: OpOverload, kernel: Kernel) -> Kernel:
    """``operator`` in a backward pass: the kernel alone, if nobody differentiates or watches."""

    def run(x: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled() and is_plain(x):
            return kernel(x, dtype, scale)
        return operator(x, dtype, scale)  # type: ignore[no-any-return]

    return run


unscale = _direct(UNSCALE, _divide)
lower = _differentiable(LOWER, _cast, unscale)
widen = _differentiable(WIDEN, _cast, _direct(SCALE, _multiply))
_differentiable(UNSCALE, _divide, LOWER)
_differentiable(SCALE, _multiply, WIDEN)

DIRECT: dict[Any, Kernel] = {LOWER: lower, WIDEN: widen}


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: torch.Tensor, writable: bool) -> torch.Tensor:
        remember(ctx, x, scale)
        # torch refuses a write to a view that a Function has made.
        return x.detach() if writable else x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return UNSCALE(gradients[0], ctx.dtype, recall(ctx)), None, None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        remember(ctx, h, scale)
        return h.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return SCALE(gradients[0].float(), ctx.dtype, recall(ctx)), None


Hooks = list[Mapping[int, Callable[[torch.Tensor], torch.Tensor | None]]]


class _Hooked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: torch.Tensor, scale: torch.Tensor, hooks: Hooks) -> torch.Tensor:
        remember(ctx, h, scale)
        ctx.hooks = hooks
        return h.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        g: torch.Tensor = UNSCALE(gradients[0], torch.float32, recall(ctx))
        for hook in [hook for hooks in ctx.hooks for hook in hooks.values()]:
            changed = hook(g)
            g = g if changed is None else changed
        return SCALE(g.float(), ctx.dtype, recall(ctx)), None, None


class _Follow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, h: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        remember(ctx, h, scale)
        ctx.mark_dirty(x)
        ctx.is_view = x._is_view()
        return x

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (g,) = gradients
        # Of a view, torch puts the first gradient into that of the whole.
        before = torch.zeros_like(g) if ctx.is_view else None
        return before, SCALE(g.float(), ctx.dtype, recall(ctx)), None


def enter(x: torch.Tensor, scale: torch.Tensor, writable: bool = False) -> torch.Tensor:
    """``x`` itself, as a value of the region: for an fp16 tensor that a graph is given.

    With ``writable``, the graph may write to it; ``x`` must then :func:`follow`.
    """
    if not (torch.is_grad_enabled() and x.requires_grad):
        return x
    return cast(torch.Tensor, cast(Any, _Enter).apply(x, scale, writable))


def leave(h: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """``h`` itself, outside of the region: its gradient is true, in fp16, so it may vanish."""
    return cast(torch.Tensor, cast(Any, _Leave).apply(h, scale))


def hooked(h: torch.Tensor, scale: torch.Tensor, hooks: Hooks) -> torch.Tensor:
    """``h`` itself, whose gradient hooks see on its way: true, in fp32."""
    return cast(torch.Tensor, cast(Any, _Hooked).apply(h, scale, hooks))


def follow(x: torch.Tensor, h: torch.Tensor, scale: torch.Tensor) -> None:
    """After a write to ``h`` in the region, let ``x``, the same memory outside, come from it."""
    # The write is counted already; counting another would spoil what its operator has saved.
    with cast(Any, torch.autograd)._unsafe_preserve_version_counter(x):
        cast(Any, _Follow).apply(x, h, scale)
