"""Which of an optimizer's step counters are equal, known without asking the device each time."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from mpgraph.step.optimizer_places import counters_of, equal_counters, split_counters

Groups = tuple[frozenset[str], ...]


class EqualCounters:
    """What Inductor computes from one step counter, it computes for all that are equal to it.

    Their values are looked at, which the host waits for, where they may have come apart: another
    state was loaded, another step wrote to them, or one that updates other parameters.

    Attributes:
        groups: The names of equal ones, as last known.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.groups: Groups = ()
        self._token: tuple[Any, ...] | None = None
        self._keys: Any = None
        self._updated: frozenset[str] = frozenset()  # by the last step

    def now(self, keys: Any, names: dict[int, str]) -> Groups:
        """The equal ones at this moment; ``keys`` tells states of other kinds apart."""
        self._keys = keys
        token = self._token_now()
        if self._token is None or not _is_same(self._token, token):
            self._token, self.groups = token, equal_counters(self.optimizer, names)
        return self.groups

    def note(self, updated: frozenset[str]) -> None:
        """A step has updated these parameters: counters that it changed alike are still equal."""
        self._updated = updated
        if self._token is None:
            return
        parts = [part for group in self.groups for part in split_counters(group, updated)]
        self.groups = tuple(part for part in parts if len(part) > 1)
        self._token = self._token_now()

    def _token_now(self) -> tuple[Any, ...]:
        versions = [counter._version for counter in counters_of(self.optimizer)]
        return self.optimizer.state, self._keys, versions, self._updated


def _is_same(before: tuple[Any, ...], now: tuple[Any, ...]) -> bool:
    return before[0] is now[0] and before[1:] == now[1:]
