"""``assert_policy``: what a model's tests say about its precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from mpgraph.errors import PolicyError
from mpgraph.policy_glob import matches_op, near_misses, op_names
from mpgraph.report.layout import count, name_counts, size_text
from mpgraph.report.records import SIXTEEN_BIT, Graph, Node
from mpgraph.report.report import Report, explain

Patterns = str | Sequence[str]

_MOST_SHOWN = 5
_DTYPES = ("bf16", "fp16", "fp32", "fp64")
_WIDE = frozenset({"fp32", "fp64", "c64", "c128"})


def assert_policy(
    model_or_report: Any,
    *,
    fp32: Patterns = (),
    lower: Patterns = (),
    forbid: Mapping[str, Patterns] | None = None,
    max_casts: int | None = None,
    max_cast_bytes: int | None = None,
    no_unknown: bool = False,
) -> None:
    """Fail unless the model's operators run in the dtypes that its tests rely on.

    Operators are globs, as in a policy: ``"softmax"``, ``"aten.sum.*"``. One that the model
    does not have is a failure too: such an assertion checks nothing. To ask about one part of a
    model, pass ``mpgraph.explain(model).filter(module="decoder.*")``.

    Args:
        model_or_report: What :func:`mpgraph.explain` takes, or what it returns.
        fp32: These operators must run in float32 (or float64).
        lower: These must run in bf16 or fp16.
        forbid: Operator to the dtype, or dtypes, that it must not run in.
        max_casts: The most casts that one call may make.
        max_cast_bytes: The most bytes that the casts of one call may read and write.
        no_unknown: Every operator must have a row in the operator table, or an override.

    Raises:
        PolicyError: Names every operator that breaks an assertion, its module, its line in the
            model's source, why it runs so, and what to do.

    Example:
        >>> import mpgraph, torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
        >>> model = mpgraph.convert(model, "bf16", example_inputs=(torch.ones(2, 4),))
        >>> mpgraph.assert_policy(model, fp32=["layer_norm"], lower=["linear"], max_casts=2)
    """
    report = explain(model_or_report)
    failures = [
        *_wrong_dtypes(report, "fp32", _as_list(fp32), lambda dtype: dtype in _WIDE),
        *_wrong_dtypes(report, "lower", _as_list(lower), lambda dtype: dtype in SIXTEEN_BIT),
        *_forbidden(report, forbid or {}),
        *_too_much(report, "max_casts", max_casts, lambda graph: len(graph.casts), "casts"),
        *_too_much(report, "max_cast_bytes", max_cast_bytes, lambda g: g.cast_bytes, "bytes"),
        *(_unknown(report) if no_unknown else ()),
    ]
    asked = fp32 or lower or forbid or no_unknown or (max_casts, max_cast_bytes) != (None, None)
    if not asked:
        raise PolicyError("assert_policy was asked for nothing; say fp32=['softmax'], for example")
    if failures:
        raise PolicyError("\n".join([_heading(report, len(failures)), *failures]))


def _heading(report: Report, number: int) -> str:
    policy = f"policy {report.policy}" if report.policy else ""
    about = ", ".join(filter(None, (report.precision, policy, report.selection)))
    name = f"{report.model} ({about})" if about else report.model
    return f"{name} fails {count(number, 'assertion')} of assert_policy:"


def _as_list(patterns: Any) -> list[Any]:
    return list(patterns) if isinstance(patterns, (list, tuple, set, frozenset)) else [patterns]


def _wrong_dtypes(
    report: Report, asked: str, patterns: Sequence[str], allowed: Callable[[str], bool]
) -> Iterator[str]:
    for pattern in patterns:
        nodes = _matching(report, pattern)
        wrong = [node for node in nodes if not allowed(node.runs_in)]
        claim = f"{asked}={pattern!r}"
        if not nodes:
            yield _no_match(report, claim, pattern)
        elif wrong:
            run = "fp32" if asked == "fp32" else "compute"
            yield _failure(claim, nodes, wrong, _remedy(report, wrong, pattern, run))


def _forbidden(report: Report, forbid: Mapping[str, Patterns]) -> Iterator[str]:
    for pattern, dtypes in forbid.items():
        banned = _as_list(dtypes)
        for dtype in banned:
            if dtype not in _DTYPES:
                near = near_misses(_short(dtype), _DTYPES)
                raise PolicyError(f"forbid takes {', '.join(_DTYPES)}, found {dtype!r}{near}")
        nodes = _matching(report, pattern)
        wrong = [node for node in nodes if node.runs_in in banned]
        claim = f"forbid={{{pattern!r}: {dtypes!r}}}"
        if not nodes:
            yield _no_match(report, claim, pattern)
        elif wrong:
            run = "fp32" if SIXTEEN_BIT.intersection(banned) else "compute"
            yield _failure(claim, nodes, wrong, _remedy(report, wrong, pattern, run))


def _short(dtype: object) -> str:
    """``bf16`` for ``"bfloat16"``, ``"torch.bfloat16"`` and the dtype itself."""
    name = str(dtype).removeprefix("torch.")
    return name.replace("bfloat", "bf").replace("float", "fp")


def _matching(report: Report, pattern: str) -> list[Node]:
    """The operators that a glob names and that compute on floating-point values."""
    return [node for node in report.nodes if node.runs_in and matches_op(pattern, node.operator)]


def _no_match(report: Report, claim: str, pattern: str) -> str:
    names = {name for node in report.nodes if node.runs_in for name in op_names(node.operator)}
    shown = near_misses(pattern, names) or f"; it has {name_counts(report.nodes)}"
    return f"- {claim}: the model has no such operator on floating-point values{shown}"


def _failure(claim: str, nodes: Sequence[Node], wrong: Sequence[Node], remedy: str) -> str:
    dtypes = ", ".join(sorted({node.runs_in for node in wrong}))
    verb = "runs" if len(wrong) == 1 else "run"
    head = f"- {claim}: {len(wrong)} of {count(len(nodes), 'operator')} {verb} in {dtypes}"
    return "\n".join([head, *_listed(wrong), f"  {remedy}"])


def _listed(nodes: Sequence[Node]) -> Iterator[str]:
    for node in nodes[:_MOST_SHOWN]:
        yield f"    {_place(node)}"
        yield f"      because: {'; '.join(filter(None, (node.reason, node.source)))}"
    if len(nodes) > _MOST_SHOWN:
        yield f"    and {len(nodes) - _MOST_SHOWN} more"


def _place(node: Node) -> str:
    module = f" in {node.module}" if node.module else ""
    return f"{node.name}{module}" + (f", from {node.line}" if node.line else "")


def _remedy(report: Report, wrong: Sequence[Node], pattern: str, run: str) -> str:
    if any("autocast" in node.region for node in wrong):
        return "The model's own torch.autocast region decides there: change it in the model."
    if run == "compute" and report.precision in ("fp32", "tf32"):
        return f"Precision {report.precision} lowers nothing: convert the model to bf16 or fp16."
    module = f", module={wrong[0].module!r}" if len(wrong) == 1 and wrong[0].module else ""
    return f"To change that: policy.pin(op={pattern!r}{module}, run={run!r})."


def _too_much(
    report: Report, name: str, limit: int | None, measure: Callable[[Graph], int], unit: str
) -> Iterator[str]:
    for number, graph in enumerate(report.graphs, start=1):
        if limit is None or (found := measure(graph)) <= limit:
            continue
        label = f"{number} ({graph.label})" if graph.label else str(number)
        head = f"- {name}={limit}: the casts of a call of graph {label} come to {found}"
        largest = sorted(graph.casts, key=lambda n: -n.cast.bytes if n.cast else 0)
        yield "\n".join(
            [
                f"{head} {unit}; the largest:" if unit == "bytes" else f"{head}; the largest:",
                *map(_cast_line, largest[:_MOST_SHOWN]),
                "  Casts stand where neighbours run in different dtypes: pin them to one, see "
                "'back to fp32' in mpgraph.explain(model).",
            ]
        )


def _cast_line(node: Node) -> str:
    assert node.cast is not None
    kind = "the model's own" if node.cast.kind == "model" else f"for {', '.join(node.cast.readers)}"
    change = f"{node.cast.source} -> {node.cast.target}, {size_text(node.cast.bytes)}"
    return f"    {change}, {kind}: {_place(node)}"


def _unknown(report: Report) -> Iterator[str]:
    unknown = [node for node in report.nodes if node.is_unknown and node.runs_in]
    if unknown:
        number = count(len(unknown), "operator")
        op = unknown[0].operator
        yield "\n".join(
            [
                f"- no_unknown: {number} without a row in the operator table",
                *_listed(unknown),
                f"  Say how it runs, for example: policy.pin(op={op!r}, run='fp32').",
            ]
        )
