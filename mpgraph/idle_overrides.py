"""What to say of overrides that match nothing in a captured graph."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from mpgraph.policy_glob import (
    matches_op,
    module_glob,
    name_glob,
    near_misses,
    op_names,
    with_parents,
)

Nodes = Sequence[tuple[str, str, str]]
_MOST_SHOWN = 8


def why_idle(selectors: Mapping[str, str], nodes: Nodes, modules: Collection[str]) -> str:
    """Say which selector matches nothing, with the names that come close to it.

    Args:
        selectors: ``op``, ``module`` and ``node``, as far as the override has them.
        nodes: ``(op, module_path, node_name)`` of every node of the graph.
        modules: The paths of all modules of the model, those that compute nothing as well.
    """
    for key, value in selectors.items():
        if not any(_matches(key, value, node) for node in nodes):
            if key == "module" and any(module_glob(value).fullmatch(path) for path in modules):
                return f"module {value!r} computes nothing in this call"
            names = {*_names(key, nodes), *(modules if key == "module" else ())} - {""}
            return f"there is no {key} {value!r}{near_misses(value, names) or _some(key, names)}"
    return "each selector matches some node, but no node matches all of them"


def advice(selectors: Iterable[Mapping[str, str]]) -> str:
    """Where to look up the names that these overrides select by."""
    keys = {key for selected in selectors for key in selected}
    lines = ["Correct the override or remove it."]
    if "module" in keys:
        lines.append("Modules go by their paths in model.named_modules().")
    if keys & {"op", "node"}:
        lines.append(
            "To see operators and nodes, convert the model without the override, call it once and "
            "print mpgraph.explain(model).text(verbose=True)."
        )
    return " ".join(lines)


def _matches(key: str, value: str, node: tuple[str, str, str]) -> bool:
    op, module, name = node
    if key == "op":
        return matches_op(value, op)
    if key == "module":
        return module_glob(value).fullmatch(module) is not None
    return name_glob(value).fullmatch(name) is not None


def _names(key: str, nodes: Nodes) -> Iterator[str]:
    for op, module, name in nodes:
        if key == "op":
            yield from op_names(op)
        elif key == "module":
            yield from with_parents(module)
        else:
            yield name


def _some(key: str, names: Collection[str]) -> str:
    """A few of the names that there are: the shortest, so the outermost modules."""
    shown = sorted(names, key=lambda name: (name.count("."), name))[:_MOST_SHOWN]
    more = ", …" if len(names) > len(shown) else ""
    return f"; there are {', '.join(map(repr, shown))}{more}" if shown and key != "node" else ""
