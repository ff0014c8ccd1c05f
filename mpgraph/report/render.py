"""Lines and tables as plain text of a fixed width, or in colour by way of rich."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

COLOURS = {"bf16": "green", "fp16": "cyan", "fp32": "yellow", "fp64": "red"}
_GAP = "  "


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of text; a heading stands out."""

    text: str
    heading: bool = False
    indent: int = 0


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        header: Its name.
        least: How narrow it may become where the page is too narrow; 0 to keep its width.
        wrap: Break long cells into several lines; otherwise they are cut.
        keep_end: Cut long cells at their start.
        right: Align to the right.
    """

    header: str
    least: int = 0
    wrap: bool = False
    keep_end: bool = False
    right: bool = False


@dataclasses.dataclass(frozen=True)
class Row:
    """The cells of a row, and the dtype that gives it its colour."""

    cells: tuple[str, ...]
    dtype: str = ""


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows under headers."""

    columns: tuple[Column, ...]
    rows: Sequence[Row]
    indent: int = 2


Part = Line | Table


def to_text(parts: Sequence[Part], width: int) -> str:
    """The parts as plain text, no line longer than ``width`` where its words allow."""
    return "\n".join(line for line, _ in _lines(parts, width))


class Page:
    """The same for rich: in colour, as wide as the terminal."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = parts

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        """Rich's protocol: what to print, for a console of this width."""
        from rich.text import Text

        for line, style in _lines(self.parts, options.max_width):
            yield Text(line, style=style, no_wrap=True, overflow="ignore")


def _lines(parts: Sequence[Part], width: int) -> Iterator[tuple[str, str]]:
    """Every line and its style."""
    for part in parts:
        if isinstance(part, Table):
            yield from _table_lines(part, width)
        else:
            style = "bold" if part.heading else ""
            for line in _wrapped(part.text, width, " " * part.indent) or [""]:
                yield line, style


def _wrapped(text: str, width: int, indent: str) -> list[str]:
    return textwrap.wrap(
        text,
        width,
        initial_indent=indent,
        subsequent_indent=indent + "  ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _table_lines(table: Table, width: int) -> Iterator[tuple[str, str]]:
    widths = _widths(table, width - table.indent - len(_GAP) * (len(table.columns) - 1))
    header = tuple(column.header for column in table.columns)
    styled = [(header, "dim"), *((row.cells, COLOURS.get(row.dtype, "")) for row in table.rows)]
    for cells, style in styled:
        for line in _row_lines(cells, table.columns, widths):
            yield (" " * table.indent + _GAP.join(line)).rstrip(), style


def _widths(table: Table, room: int) -> list[int]:
    """Natural widths, then the widest column that may shrink gives way until all fit."""
    rows = [tuple(c.header for c in table.columns), *(row.cells for row in table.rows)]
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    # A page narrower than the columns' least widths still has to hold them somehow.
    for scale in (1.0, 0.5, 0.25):
        _shrink(widths, [int(column.least * scale) for column in table.columns], room)
    return widths


def _shrink(widths: list[int], least: Sequence[int], room: int) -> None:
    while sum(widths) > room:
        spare = [(width, i) for i, width in enumerate(widths) if 0 < least[i] < width]
        if not spare:
            return
        widths[max(spare)[1]] -= 1


def _row_lines(
    cells: Sequence[str], columns: Sequence[Column], widths: Sequence[int]
) -> Iterator[tuple[str, ...]]:
    stacks = [
        _fitted(cell, column, width)
        for cell, column, width in zip(cells, columns, widths, strict=True)
    ]
    for level in range(max(map(len, stacks))):
        yield tuple(
            _aligned(stack[level] if level < len(stack) else "", column, width)
            for stack, column, width in zip(stacks, columns, widths, strict=True)
        )


def _fitted(cell: str, column: Column, width: int) -> list[str]:
    if len(cell) <= width:
        return [cell]
    if column.wrap:
        return textwrap.wrap(cell, width, break_on_hyphens=False)
    return ["…" + cell[len(cell) - width + 1 :] if column.keep_end else cell[: width - 1] + "…"]


def _aligned(text: str, column: Column, width: int) -> str:
    return text.rjust(width) if column.right else text.ljust(width)
