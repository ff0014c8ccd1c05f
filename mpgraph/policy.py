"""A policy: which dtype every operator of a model runs in.

A ``Policy`` is a preset (``mpgraph.op_table``) and overrides, by operator, by module and by
graph node. The last override that matches wins. Policies are values: ``pin`` returns a new
one; they compare, round-trip through TOML and print as one line. Nothing here imports torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from mpgraph import policy_text
from mpgraph.errors import PolicyError
from mpgraph.idle_overrides import advice, why_idle
from mpgraph.op_table import MOVES_DATA, PRESETS, OpRule, Rule, rule_for
from mpgraph.policy_glob import matches_op, module_glob, name_glob, near_misses
from mpgraph.whole_files import write_whole

RUN_VALUES = ("fp32", "compute", "bf16", "fp16", "follow")
ON_UNKNOWN_VALUES = ("follow", "fp32", "error")
_SELECTORS = ("op", "module", "node")


@dataclass(frozen=True)
class RuleChoice:
    """What a policy decided for one node, and where the decision comes from.

    Attributes:
        rule: What happens to the node's inputs.
        reason: Why, from the operator table or the override.
        source: ``"preset default"``, ``"override 2: module=decoder.*"`` or ``"no row: ..."``.
        dtype: ``"bf16"`` or ``"fp16"`` where an override or a row names the dtype of a LOWER.
        set_dtype: See ``OpRule``.
        append_dtype: See ``OpRule``.
    """

    rule: Rule
    reason: str
    source: str
    dtype: str | None = None
    set_dtype: bool = False
    append_dtype: bool = False


@dataclass(frozen=True)
class Override:
    """One exception to a preset: what its selectors match runs as ``run`` says.

    At least one selector is needed; where there are several, a node must match all of them.

    An override by ``module`` alone changes what computes: matrix products, additions, norms.
    It leaves alone explicit casts, factory functions, in-place operators, views and copies,
    which have the dtype of the call or of what they are given. Name them by ``op`` or
    ``node`` to change them too.

    Attributes:
        op: A glob over operators: ``"aten.softmax.int"``, ``"aten.softmax"``, ``"softmax"``.
        module: A glob over dotted module paths; ``*`` stays within one segment, ``**`` spans
            several, and a module includes everything below it: ``"decoder.layers.*.mlp"``.
        node: A glob over the names of graph nodes, as ``mpgraph.explain`` prints them.
        run: ``"fp32"``; ``"compute"``, the policy's 16-bit dtype; ``"bf16"`` or ``"fp16"``, that
            one; ``"follow"``, the widest dtype among the inputs.
        reason: Why, for people: ``explain`` and TOML files show it. Overrides that differ in it
            alone are equal, and the one-line text leaves it out.
    """

    op: str | None = None
    module: str | None = None
    node: str | None = None
    run: str = "fp32"
    reason: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        """Refuse an override that selects nothing or that cannot be read."""
        _check_value("run", self.run, RUN_VALUES)
        if not isinstance(self.reason, str):
            raise PolicyError(f"reason must be text, found {self.reason!r}")
        if self.op is None and self.module is None and self.node is None:
            raise PolicyError(
                "an override needs a selector: op=..., module=... or node=... "
                '(module="**" selects the whole model)'
            )
        for key in _SELECTORS:
            _check_glob(key, getattr(self, key))

    def __str__(self) -> str:
        """The override in one line: ``module=decoder.* run=fp32``."""
        return policy_text.override_line(self.to_dict())

    def to_dict(self) -> dict[str, str]:
        """Return the selectors that are set, ``run``, and the reason if there is one."""
        values = ((f.name, getattr(self, f.name)) for f in fields(self))
        return {name: value for name, value in values if value is not None and value != ""}

    def selectors(self) -> dict[str, str]:
        """Return the selectors that are set."""
        return {key: value for key, value in self.to_dict().items() if key in _SELECTORS}

    def matches(self, op: str, module_path: str, node_name: str) -> bool:
        """Whether every selector matches the node."""
        return self.matches_place(op, module_path) and (
            self.node is None or name_glob(self.node).fullmatch(node_name) is not None
        )

    def matches_place(self, op: str, module_path: str) -> bool:
        """Whether the selectors other than ``node`` match."""
        if self.module is not None and not module_glob(self.module).fullmatch(module_path):
            return False
        return self.op is None or matches_op(self.op, op)

    def reaches(self, op: str, row: OpRule | None) -> bool:
        """Whether the override may change ``op``: a module glob leaves some operators alone."""
        if self.op is not None or self.node is not None:
            return True
        return op not in MOVES_DATA and (row is None or row.rule is not Rule.KEEP)


@dataclass(frozen=True)
class Policy:
    """A preset and its overrides; the last override that matches a node wins.

    Attributes:
        preset: ``"default"``, ``"lean"``, ``"autocast-cpu"`` or ``"autocast-cuda"``.
        overrides: Exceptions, in order.
        on_unknown: What an operator without a row does: ``"follow"`` its inputs, run in
            ``"fp32"``, or raise an ``"error"``.

    Example:
        >>> policy = Policy().pin(module="decoder.layers.*.mlp").pin(op="softmax", run="compute")
        >>> print(policy)
        default; module=decoder.layers.*.mlp run=fp32; op=softmax run=compute
        >>> Policy.parse(str(policy)) == policy
        True
    """

    preset: str = "default"
    overrides: tuple[Override, ...] = ()
    on_unknown: str = "follow"

    def __post_init__(self) -> None:
        """Refuse unknown presets and values, and name near misses."""
        _check_value("preset", self.preset, tuple(PRESETS))
        _check_value("on_unknown", self.on_unknown, ON_UNKNOWN_VALUES)
        overrides = tuple(self.overrides)
        for override in overrides:
            if not isinstance(override, Override):
                raise PolicyError(f"overrides must be mpgraph.Override, found {override!r}")
        object.__setattr__(self, "overrides", overrides)

    def __str__(self) -> str:
        """The policy in one line, which ``Policy.parse`` reads back."""
        return policy_text.to_line(self.to_dict())

    @cached_property
    def _choices(self) -> dict[tuple[str, str], list[tuple[re.Pattern[str] | None, RuleChoice]]]:
        """Per operator and module: the choices in order of precedence, each with its node glob."""
        return {}

    def choose(self, op: str, module_path: str, node_name: str) -> RuleChoice:
        """Decide one node.

        Args:
            op: The operator's text, ``"aten.softmax.int"``.
            module_path: The dotted path of the module that the node comes from.
            node_name: The node's name in the graph.

        Raises:
            PolicyError: The operator has no row, no override matches, and ``on_unknown`` is
                ``"error"``.
        """
        key = (op, module_path)
        choices = self._choices.get(key)
        if choices is None:
            choices = self._choices[key] = self._choices_at(op, module_path)
        for node_glob, choice in choices:
            if node_glob is None or node_glob.fullmatch(node_name):
                return choice
        raise self.unknown_op_error(op, module_path, node_name)

    def _choices_at(
        self, op: str, module_path: str
    ) -> list[tuple[re.Pattern[str] | None, RuleChoice]]:
        row = rule_for(self.preset, op)
        choices: list[tuple[re.Pattern[str] | None, RuleChoice]] = [
            (
                None if override.node is None else name_glob(override.node),
                _overridden(override, number, row),
            )
            for number, override in enumerate(self.overrides, start=1)
            if override.matches_place(op, module_path) and override.reaches(op, row)
        ]
        choices.reverse()
        if row is not None:
            choices.append((None, _from_row(row, self.preset)))
        elif self.on_unknown != "error":
            choices.append((None, _UNKNOWN[self.on_unknown]))
        return choices

    def unknown_op_error(self, op: str, module_path: str = "", node_name: str = "") -> PolicyError:
        """Return the error for an operator without a row, for the caller to raise."""
        node = f" (node {node_name!r})" if node_name else ""
        module = f" in module {module_path!r}" if module_path else ""
        return PolicyError(
            f"no precision rule for operator {op}{node}{module} in preset {self.preset!r}, and the "
            f"policy has on_unknown='error'. Say how it runs with "
            f"policy.pin(op={op!r}, run='fp32'), or use on_unknown='follow'."
        )

    def pin(
        self,
        *,
        op: str | None = None,
        module: str | None = None,
        node: str | None = None,
        run: str = "fp32",
        reason: str = "",
    ) -> Policy:
        """Return a new policy with one more override, which wins over the earlier ones."""
        override = Override(op=op, module=module, node=node, run=run, reason=reason)
        return replace(self, overrides=(*self.overrides, override))

    def check_overrides(
        self, nodes: Iterable[tuple[str, str, str]], modules: Collection[str] = ()
    ) -> None:
        """Raise where an override matches none of the nodes, and name near misses.

        Args:
            nodes: ``(op, module_path, node_name)`` of every node of the graph.
            modules: The paths of all modules of the model, those that compute nothing as well.
        """
        seen = list(nodes) if self.overrides else []
        idle = {
            number: override
            for number, override in enumerate(self.overrides, start=1)
            if not any(override.matches(*node) for node in seen)
        }
        if idle:
            lines = [
                f"override {number} ({override}) matches nothing: "
                f"{why_idle(override.selectors(), seen, modules)}."
                for number, override in idle.items()
            ]
            raise PolicyError("\n".join([*lines, advice(o.selectors() for o in idle.values())]))

    def diff(self, other: Policy) -> list[str]:
        """Return what changes from this policy to ``other``, one line each."""
        lines = [
            f"{key}: {before} -> {after}"
            for key in ("preset", "on_unknown")
            if (before := getattr(self, key)) != (after := getattr(other, key))
        ]
        lines += [f"- override {o}" for o in self.overrides if o not in other.overrides]
        lines += [f"+ override {o}" for o in other.overrides if o not in self.overrides]
        if len(lines) == 0 and self.overrides != other.overrides:
            lines.append("the overrides are in another order, or repeated")
        return lines + _row_changes(self.preset, other.preset)

    def to_dict(self) -> dict[str, Any]:
        """Return the policy as plain strings, lists and dictionaries."""
        return {
            "preset": self.preset,
            "on_unknown": self.on_unknown,
            "overrides": [override.to_dict() for override in self.overrides],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Policy:
        """Build a policy from ``to_dict``'s form; keys left out have their defaults."""
        _check_keys("policy", values, tuple(f.name for f in fields(cls)))
        overrides = values.get("overrides", ())
        if not isinstance(overrides, (list, tuple)):
            raise PolicyError(f"overrides must be a list of overrides, found {overrides!r}")
        return cls(**{**values, "overrides": tuple(_override_from(o) for o in overrides)})

    def to_toml(self) -> str:
        """Return the policy as TOML."""
        return policy_text.to_toml(self.to_dict())

    @classmethod
    def from_toml(cls, text: str) -> Policy:
        """Build a policy from TOML text."""
        return cls.from_dict(policy_text.from_toml(text))

    @classmethod
    def parse(cls, line: str) -> Policy:
        """Build a policy from one line, as ``str(policy)`` prints it."""
        return cls.from_dict(policy_text.from_line(line))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the policy as TOML; an interrupted write leaves the old file whole."""
        text = self.to_toml()
        write_whole(path, lambda file: file.write_text(text, encoding="utf-8", newline="\n"))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Policy:
        """Read a policy that ``save`` wrote, or that was written by hand."""
        try:
            return cls.from_toml(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, PolicyError) as error:
            raise PolicyError(f"cannot load a policy from {os.fspath(path)!r}: {error}") from error

    @classmethod
    def coerce(cls, value: Policy | str | Mapping[str, Any] | os.PathLike[str]) -> Policy:
        """Return ``value`` as a policy.

        Args:
            value: A policy; a preset's name or another one-line text; a dictionary; the path of a
                ``.toml`` file.
        """
        if isinstance(value, Policy):
            return value
        if isinstance(value, str):
            is_file = value.endswith(".toml") and ";" not in value
            return cls.load(value) if is_file else cls.parse(value)
        if isinstance(value, Mapping):
            return cls.from_dict(value)
        if isinstance(value, os.PathLike):
            return cls.load(value)
        raise PolicyError(
            f"expected a Policy, a preset ({', '.join(PRESETS)}), a one-line policy, a dictionary "
            f"or a path, found {type(value).__name__}"
        )


_UNKNOWN = {
    "follow": RuleChoice(
        Rule.FOLLOW, "the operator table has no row", "no row: follows its inputs"
    ),
    "fp32": RuleChoice(Rule.WIDEN, "the operator table has no row", "no row: on_unknown='fp32'"),
}


def _from_row(row: OpRule, preset: str) -> RuleChoice:
    return RuleChoice(
        row.rule,
        row.reason,
        f"preset {preset}",
        dtype=row.dtype,
        set_dtype=row.set_dtype,
        append_dtype=row.append_dtype,
    )


def _overridden(override: Override, number: int, row: OpRule | None) -> RuleChoice:
    run = override.run
    because = f": {override.reason}" if override.reason else ""
    return RuleChoice(
        _override_rule(run, row),
        f"the policy says {run}{because}",
        f"override {number}: {policy_text.override_line(override.selectors())}",
        dtype=run if run in ("bf16", "fp16") else None,
        set_dtype=run == "fp32" and row is not None and row.set_dtype,
        append_dtype=run == "fp32" and row is not None and row.append_dtype,
    )


def _override_rule(run: str, row: OpRule | None) -> Rule:
    if run == "fp32":
        return Rule.WIDEN
    if run != "follow":
        return Rule.LOWER
    # torch does not promote these by itself: a 16-bit input and a float32 weight would raise.
    wants_one_dtype = row is not None and row.rule in (Rule.LOWER, Rule.PROMOTE)
    return Rule.PROMOTE if wants_one_dtype else Rule.FOLLOW


def _override_from(value: Any) -> Override:
    if isinstance(value, Override):
        return value
    if not isinstance(value, Mapping):
        raise PolicyError(f"an override must be a table of selectors and run, found {value!r}")
    _check_keys("override", value, tuple(f.name for f in fields(Override)))
    return Override(**value)


def _row_changes(before: str, after: str) -> list[str]:
    ops = sorted(PRESETS[before].keys() | PRESETS[after].keys())
    changes = ((op, _summary(before, op), _summary(after, op)) for op in ops)
    return [f"{op}: {old} -> {new}" for op, old, new in changes if old != new]


def _summary(preset: str, op: str) -> str:
    row = PRESETS[preset].get(op)
    if row is None:
        return "no row"
    return row.rule.value + " by dtype=" * (row.set_dtype or row.append_dtype)


def _check_value(key: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        near = near_misses(value, allowed) if isinstance(value, str) else ""
        raise PolicyError(f"{key} must be one of {', '.join(allowed)}, found {value!r}{near}")


def _check_keys(what: str, values: Mapping[str, Any], allowed: tuple[str, ...]) -> None:
    for key in values:
        if key not in allowed:
            raise PolicyError(
                f"unknown key {key!r} in the {what}: expected {', '.join(allowed)}"
                f"{near_misses(str(key), allowed)}"
            )


def _check_glob(key: str, pattern: object) -> None:
    if pattern is None:
        return
    if not isinstance(pattern, str) or not pattern:
        raise PolicyError(f"{key} must be a glob, such as 'decoder.*', found {pattern!r}")
    try:
        (module_glob if key == "module" else name_glob)(pattern)
    except re.error as error:
        raise PolicyError(f"{key} {pattern!r} is not a glob: {error}") from error
