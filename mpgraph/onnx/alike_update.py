"""The update of an optimizer, traced for one parameter of each kind and repeated for the others."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer

from mpgraph.passes.tensor_numbers import tensor_numbers
from mpgraph.pipeline import run_passes
from mpgraph.step.joint import StepContext, mark
from mpgraph.step.optimizer_places import state_tensors
from mpgraph.step.slots import StepSlot
from mpgraph.step.trace_update import Update, trace_update

# Their step is a loop over the parameters, each by itself ("_single_tensor_…" in torch/optim/).
LOOPS = frozenset(
    {
        torch.optim.Adadelta, torch.optim.Adagrad, torch.optim.Adam, torch.optim.AdamW,
        torch.optim.Adamax, torch.optim.ASGD, torch.optim.NAdam, torch.optim.RAdam,
        torch.optim.RMSprop, torch.optim.Rprop, torch.optim.SGD,
    }
)  # fmt: skip

Values = Mapping[str, torch.Tensor]


def trace_alike_update(
    optimizer: Optimizer, names: dict[int, str], gradients: dict[str, torch.Tensor],
    mode: FakeTensorMode, context: StepContext,
) -> Update:  # fmt: skip
    """As :func:`mpgraph.step.trace_update.trace_update`, in a time that grows with the kinds.

    Two parameters are of one kind if they are in one group, and they, their gradients and their
    states have the same dtypes, sizes and layouts. An optimizer that is not known to treat each
    parameter by itself is traced whole. What is repeated computes with tensors already, not with
    the numbers that came of the counter of the parameter that was traced.
    """
    kinds = _kinds(optimizer, names, gradients)
    if type(optimizer) not in LOOPS or len(kinds) == len(gradients):
        return trace_update(optimizer, names, gradients, mode)
    first = {alike[0]: gradients[alike[0]] for alike in kinds}
    update = trace_update(optimizer, names, first, mode)
    mark(update.graph_module.graph, "update")
    run_passes(update.graph_module, (tensor_numbers,), context)
    repeat = _Repeat(update.graph_module, _states(optimizer, names))
    if not repeat.is_apart(first):
        return trace_update(optimizer, names, gradients, mode)
    for name, *others in kinds:
        for other in others:
            repeat.add(name, other, gradients[other])
    repeat.finish(gradients)
    return update


def _kinds(optimizer: Optimizer, names: dict[int, str], gradients: Values) -> list[list[str]]:
    """The names of parameters that have gradients, kind by kind."""
    found: dict[Any, list[str]] = collections.defaultdict(list)
    for index, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            name = names[id(parameter)]
            if name in gradients:
                state = optimizer.state.get(parameter, {})
                entries = tuple((key, _kind(value)) for key, value in state.items())
                found[index, _kind(parameter), _kind(gradients[name]), entries].append(name)
    return list(found.values())


def _kind(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.dtype, value.device, value.layout, tuple(value.shape), value.stride()
    return type(value), repr(value)


def _states(optimizer: Optimizer, names: dict[int, str]) -> dict[str, dict[str, str]]:
    """By parameter and key, the name of the slot of a state tensor."""
    found: dict[str, dict[str, str]] = collections.defaultdict(dict)
    for parameter, key, place in state_tensors(optimizer, names):
        found[names[id(parameter)]][key] = place.slot.name
    return found


class _Repeat:
    """Repeats what a traced update does with one parameter."""

    def __init__(self, gm: fx.GraphModule, states: Mapping[str, Mapping[str, str]]) -> None:
        self.gm, self.states = gm, states
        self.graph = gm.graph
        self.places = {
            (node.meta["slot"].kind == "gradient", node.meta["slot"].name): node
            for node in self.graph.find_nodes(op="placeholder")
        }
        returned: Any = self.graph.output_node().args[0]
        self.new: dict[str, Any] = dict(returned)
        self.traced = [n for n in self.graph.nodes if n.op not in ("placeholder", "output")]
        self.own: dict[str, list[fx.Node]] = {}

    def is_apart(self, names: Iterable[str]) -> bool:
        """Whether no value depends on two parameters."""
        owner = {node: name for name in names for node in self._inputs(name)}
        self.own = {name: [] for name in names}
        for node in self.traced:
            owners = {owner[read] for read in node.all_input_nodes if read in owner}
            if len(owners) > 1 or (not owners and node.op == "get_attr"):
                return False
            for name in owners:
                owner[node] = name
                self.own[name].append(node)
        return True

    def _inputs(self, name: str) -> list[fx.Node]:
        states = (self.places[False, slot] for slot in self.states.get(name, {}).values())
        return [self.places[False, name], self.places[True, name], *states]

    def add(self, name: str, other: str, gradient: torch.Tensor) -> None:
        """Do with another parameter what is done with this one."""
        self._add_gradient(other, gradient)
        copies = dict(zip(self._inputs(name), self._inputs(other), strict=True))

        def copy_of(node: fx.Node) -> fx.Node:
            return copies.get(node, node)

        with self.graph.inserting_before(self.graph.output_node()):
            for node in self.own[name]:
                copies[node] = self.graph.node_copy(node, copy_of)
                copies[node].meta = dict(node.meta)
        self.new[other] = copy_of(self.new[name])
        for key, slot in self.states.get(name, {}).items():
            self.new[self.states[other][key]] = copy_of(self.new[slot])

    def _add_gradient(self, name: str, value: torch.Tensor) -> None:
        with self.graph.inserting_before(next(iter(self.graph.nodes))):
            place = self.graph.placeholder(f"gradient_{len(self.places)}")
        place.meta = {"slot": StepSlot("gradient", name), "val": value}
        self.places[True, name] = place

    def finish(self, gradients: Values) -> None:
        """Return the new values in the order that tracing all parameters would give them."""
        named = {name: self.new[name] for name in gradients}
        self.graph.output_node().args = ({**named, **self.new},)
        self.graph.lint()
        self.gm.recompile()
