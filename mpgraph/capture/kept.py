"""Calls that a rewritten graph keeps whole: what autograd does in them must stay as it was.

Turning the body of a custom ``autograd.Function``, a tensor hook or a checkpoint into plain
operators would silently change its backward pass. Each of them stays one node, whose target is
one of the operators below. A body is held in a :class:`Body`, out of the reach of the passes
that run over the graph around it: it has been rewritten by itself, or must not be rewritten.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch._ops import HigherOrderOperator
from torch.utils.checkpoint import checkpoint

from mpgraph import ir

_higher_order = torch.ops.higher_order
FUNCTION = _higher_order.autograd_function_apply
CHECKPOINT = _higher_order.tag_activation_checkpoint


def _hook_operator() -> Any:
    try:
        from torch._higher_order_ops.register_hook import register_hook_op
    except ImportError:  # older releases break the graph at a tensor hook
        return None
    return register_hook_op


HOOK = _hook_operator()
_CHECKPOINT_OPTIONS = frozenset(
    {"use_reentrant", "preserve_rng_state", "determinism_check", "debug", "early_stop"}
)


class Body(nn.Module):
    """A graph inside a kept node."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__()
        # In a tuple, so that it is no submodule: the printed graph shows one name for it.
        self._held = (graph_module,)

    @property
    def graph_module(self) -> fx.GraphModule:
        """The graph."""
        return self._held[0]

    def forward(self, *args: Any) -> Any:
        """Run the graph."""
        return self.graph_module(*args)


class Kept(HigherOrderOperator):
    """An operator that runs a body; autograd sees what the body does."""

    def __init__(self, name: str, run: Callable[..., Any]) -> None:
        super().__init__(f"mpgraph_{name}")  # type: ignore[no-untyped-call]
        self._run = run

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """Run it."""
        return self._run(*args, **kwargs)


def _run_function(forward: Body, backward: Body, *args: Any, **options: Any) -> Any:
    return FUNCTION(forward.graph_module, backward.graph_module, *args, **options)


def _run_hook(tensor: torch.Tensor, hook: Body, *freevars: Any) -> torch.Tensor:
    # Without a gradient to come, eager's register_hook raises; the traced model did not.
    if tensor.requires_grad:
        tensor.register_hook(lambda g: hook(g, *freevars))  # type: ignore[no-untyped-call]
    return tensor


def run_checkpoint(body: Any, *args: Any, **options: Any) -> Any:
    """``torch.utils.checkpoint`` with the model's own options.

    What torch runs for its traced operator leaves the random state alone and is never
    reentrant: right under torch.compile's own handling of both, wrong in eager mode.
    """
    graph_module = body.graph_module if isinstance(body, Body) else body
    chosen = {name: value for name, value in options.items() if name in _CHECKPOINT_OPTIONS}
    selective = graph_module.meta.get("_checkpoint_context_fn")
    if selective is not None:
        chosen["context_fn"] = selective
    if chosen.get("use_reentrant", True):
        return _run_reentrant(graph_module, args, chosen)
    return checkpoint(graph_module, *args, **chosen)


def _run_reentrant(body: fx.GraphModule, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Parameters are no arguments of the user's function: Dynamo has made them some.

    If no argument needs a gradient, a reentrant checkpoint gives its parameters none.
    """
    own = [isinstance(argument, nn.Parameter) for argument in args]

    def run(*given: Any) -> Any:
        left = iter(given)
        return body(*[a if mine else next(left) for a, mine in zip(args, own, strict=True)])

    return checkpoint(run, *[a for a, mine in zip(args, own, strict=True) if not mine], **options)


def _run_under_autocast(
    body: Body, device: str, dtype: torch.dtype | None, enabled: bool, *args: Any
) -> Any:
    with torch.autocast(device, dtype=dtype, enabled=enabled):
        return body(*args)


KEPT_FUNCTION = Kept("function", _run_function)
KEPT_CHECKPOINT = Kept("checkpoint", run_checkpoint)
KEPT_HOOK = Kept("hook", _run_hook)
UNDER_AUTOCAST = Kept("under_autocast", _run_under_autocast)


def bodies(node: fx.Node, gm: fx.GraphModule) -> dict[int, fx.GraphModule]:
    """The sub-graphs among a higher-order node's arguments, by position."""
    found = {}
    for index, argument in enumerate(node.args):
        if isinstance(argument, fx.Node) and argument.op == "get_attr":
            value = getattr(gm, str(argument.target), None)
            if isinstance(value, (fx.GraphModule, Body)):
                found[index] = value.graph_module if isinstance(value, Body) else value
    return found


def written_positions(node: fx.Node, body: fx.GraphModule) -> tuple[int, ...]:
    """Which arguments of a kept node its body writes to; the last arguments are the body's."""
    writes = ir.Writes(body.graph)
    placeholders = body.graph.find_nodes(op="placeholder")
    first = len(node.args) - len(placeholders)
    return tuple(first + i for i, p in enumerate(placeholders) if writes.anywhere(p))


def repair_checkpoints(gm: fx.GraphModule) -> None:
    """Let every checkpoint of a graph from Dynamo run as in eager mode, at any depth."""
    for body in ir.all_graphs(gm):
        for node in body.graph.find_nodes(op="call_function", target=CHECKPOINT):
            node.target = KEPT_CHECKPOINT
        body.recompile()
