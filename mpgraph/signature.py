"""The arguments of a call in one form, however the caller has written them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from mpgraph.errors import CallError


class Signature:
    """Arguments in one canonical form: whatever has a name by name, defaults left out."""

    def __init__(self, forward: Callable[..., Any], owner: str) -> None:
        self.owner = owner
        signature = inspect.signature(forward)
        parameters = list(signature.parameters.values())
        bound = inspect.ismethod(forward)
        self.parameters = parameters if bound else parameters[1:]
        self.signature = signature.replace(parameters=self.parameters)
        kinds = {p.kind for p in self.parameters}
        self.names = [p.name for p in self.parameters]
        self.defaults = {
            p.name: p.default for p in self.parameters if p.default is not inspect.Parameter.empty
        }
        self.required = [
            p.name
            for p in self.parameters
            if p.default is inspect.Parameter.empty
            and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        ]
        # *args and positional-only arguments keep their places.
        self.by_name = not kinds & {
            inspect.Parameter.VAR_POSITIONAL,
            inspect.Parameter.POSITIONAL_ONLY,
        }
        self.open = inspect.Parameter.VAR_KEYWORD in kinds

    def bind(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of one call in that form.

        Raises:
            CallError: ``forward`` does not take them.
        """
        if not self.by_name:
            self._check(args, kwargs)
            return args, kwargs
        if len(args) > len(self.names) or not self._is_complete(args, kwargs):
            self._check(args, kwargs)
        merged = dict(zip(self.names, args, strict=False))
        merged.update(kwargs)
        defaults = self.defaults
        return (), {
            name: merged[name]
            for name in (*self.names, *merged)
            if name in merged
            and not (name in defaults and _is_default(merged[name], defaults[name]))
        }

    def _is_complete(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        given = self.names[: len(args)]
        if any(name in kwargs for name in given):
            return False
        if not self.open and any(name not in self.names for name in kwargs):
            return False
        return all(name in kwargs or name in given for name in self.required)

    def _check(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        try:
            self.signature.bind(*args, **kwargs)
        except TypeError as error:
            raise CallError(
                f"{self.owner}.forward{self.signature}: {error}. "
                f"Found {len(args)} positional arguments and {sorted(kwargs) or 'no keywords'}."
            ) from None


def _is_default(value: Any, default: Any) -> bool:
    return value is default or (
        isinstance(value, (bool, int, float, str))
        and type(value) is type(default)
        and value == default
    )
