"""The report of ``blame``: a value, as text, as data and as a picture."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mpgraph.errors import MPGraphError
from mpgraph.ranges.layout import finding_lines, headline, node_table, summary
from mpgraph.ranges.records import Finding, NodeRange, finding_from, node_from
from mpgraph.report.records import to_plain
from mpgraph.report.render import Line, Page, Part, to_text
from mpgraph.whole_files import load_json, to_json

SCHEMA = 1


@dataclasses.dataclass(frozen=True, repr=False)
class RangeReport:
    """The range of every value and gradient of one step. A value: plain text and numbers.

    ``print(report)`` shows the finding and the layers that come closest to the ends of fp16.

    Attributes:
        model: The name of the model's class.
        precision: As given to ``mpgraph.convert``.
        policy: The policy in one line.
        scale: The loss scale of the step; None where the precision has none.
        loss: The loss; None if none was computed.
        nodes: Every floating-point value in order: see :class:`mpgraph.ranges.records.NodeRange`.
        finding: What left the range first, and its cure; None if the step is finite.
        suggested_scale: The largest loss scale that leaves the largest gradient a factor of two
            below fp16's end, within the limits of :class:`mpgraph.LossScale`; None if there is no
            such scale or no gradient.
        notes: What could not be seen.
    """

    model: str
    precision: str = ""
    policy: str = ""
    scale: float | None = None
    loss: float | None = None
    nodes: tuple[NodeRange, ...] = ()
    finding: Finding | None = None
    suggested_scale: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def is_finite(self) -> bool:
        """Whether an optimizer could take the step."""
        return self.finding is None

    @property
    def would_fit_fp16(self) -> bool:
        """Whether fp16 holds every true value, and every true gradient at the suggested scale.

        Of a model without 16-bit values, all of them are asked; some need not be in fp16.
        """
        held = [n for n in self.nodes if n.dtype in ("fp16", "bf16")] or self.nodes
        values = [n.true_forward or n.forward for n in held]
        has_gradients = any(n.true_gradient for n in held)
        return not any(v.overflows() for v in values if v) and (
            self.suggested_scale is not None or not has_gradients
        )

    def text(self, *, verbose: bool = False, width: int = 100) -> str:
        """The report as plain text; with ``verbose``, with a line for every node."""
        return to_text(list(self._parts(verbose)), width)

    def __repr__(self) -> str:
        return f"<Ranges of {self.model}, {len(self.nodes)} values: print() shows them>"

    def __str__(self) -> str:
        """The finding, and the layers closest to the ends of fp16."""
        return self.text()

    def __rich__(self) -> Page:
        return Page(list(self._parts(False)))

    def print(self, *, verbose: bool = False) -> None:
        """Print the report to the terminal, in colour."""
        from rich.console import Console

        Console().print(Page(list(self._parts(verbose))))

    def _parts(self, verbose: bool) -> Iterator[Part]:
        yield Line(headline(self), heading=True)
        yield from finding_lines(self)
        yield from summary(self)
        if verbose:
            yield Line("")
            yield node_table(self.nodes, self.scale)
        for note in self.notes:
            yield Line("")
            yield Line(note)

    def to_dict(self) -> dict[str, Any]:
        """The report as dictionaries, lists, text and numbers; what is empty is left out.

        ``{"schema": 1, "model", "precision", "policy", "scale", "loss", "suggested_scale",
        "notes", "finding": {...}, "nodes": [{"name", "operator", "module", "line", "dtype",
        "graph", "role", "forward", "gradient", "true_forward", "true_gradient"}]}``; each range
        is ``{"count", "zeros", "infinite", "nan", "largest", "exponents"}``. The attributes of the
        classes in :mod:`mpgraph.ranges.records` say what each is. A loss that is not finite is
        text: "nan", "inf" or "-inf".
        """
        values = {key: getattr(self, key) for key in _PLAIN}
        if self.loss is not None and not abs(self.loss) < float("inf"):
            values["loss"] = str(self.loss)
        finding = None if self.finding is None else to_plain(self.finding)
        nodes = [to_plain(node) for node in self.nodes]
        rest = {"notes": list(self.notes), "finding": finding, "nodes": nodes}
        return {"schema": SCHEMA, **values, **rest}

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """:meth:`to_dict` as JSON text; with a path, also written there, whole or not at all."""
        return to_json(self.to_dict(), path)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RangeReport:
        """The inverse of :meth:`to_dict`."""
        if values.get("schema") != SCHEMA:
            raise MPGraphError(
                f"expected a range report with schema {SCHEMA}, found {values.get('schema')!r}. "
                "Write it again with the mpgraph that reads it: mpgraph.blame(…).to_json(path)"
            )
        plain = {key: values[key] for key in _PLAIN if key in values}
        if isinstance(plain.get("loss"), str):
            plain["loss"] = float(plain["loss"])
        finding = values.get("finding")
        return cls(
            **plain,
            notes=tuple(values.get("notes", ())),
            finding=None if finding is None else finding_from(finding),
            nodes=tuple(map(node_from, values.get("nodes", ()))),
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RangeReport:
        """Read a report that :meth:`to_json` wrote."""
        return cls.from_dict(load_json(path))

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Write a picture: the range of every layer, forward and backward, between fp16's limits.

        Args:
            path: Where to; the ending says the format: ``.png``, ``.svg``, ``.pdf``. It is written
                whole or not at all.

        Raises:
            MPGraphError: matplotlib is not installed.
        """
        from mpgraph.ranges.picture import draw

        draw(self, Path(path))


_PLAIN = ("model", "precision", "policy", "scale", "loss", "suggested_scale")
