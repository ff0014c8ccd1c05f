"""Lines and tables, as plain text of a fixed width or as rich's own."""

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
        right: Align to the right.
    """

    header: str
    least: int = 0
    wrap: bool = False
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
    return "\n".join(line.rstrip() for part in parts for line in _text_of(part, width))


def _text_of(part: Part, width: int) -> Iterator[str]:
    if isinstance(part, Table):
        yield from _table_lines(part, width)
    elif not part.text:
        yield ""
    else:
        yield from _wrapped(part.text, width, " " * part.indent)


def _wrapped(text: str, width: int, indent: str) -> list[str]:
    return textwrap.wrap(
        text,
        width,
        initial_indent=indent,
        subsequent_indent=indent + "  ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _table_lines(table: Table, width: int) -> Iterator[str]:
    widths = _widths(table, width - table.indent - len(_GAP) * (len(table.columns) - 1))
    header = tuple(column.header for column in table.columns)
    for cells in (header, *(row.cells for row in table.rows)):
        for line in _row_lines(cells, table.columns, widths):
            yield " " * table.indent + _GAP.join(line)


def _widths(table: Table, room: int) -> list[int]:
    """Natural widths, then the widest column that may shrink gives way until all fit."""
    rows = [tuple(c.header for c in table.columns), *(row.cells for row in table.rows)]
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    least = [column.least or width for column, width in zip(table.columns, widths, strict=True)]
    while sum(widths) > room:
        spare = [(width, i) for i, width in enumerate(widths) if width > least[i]]
        if not spare:
            break
        widths[max(spare)[1]] -= 1
    return widths


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
    return [cell[: width - 1] + "…"]


def _aligned(text: str, column: Column, width: int) -> str:
    return text.rjust(width) if column.right else text.ljust(width)


def to_rich(parts: Sequence[Part]) -> Any:
    """The parts as one rich renderable, coloured by dtype."""
    from rich.console import Group

    return Group(*map(_rich_of, parts))


def _rich_of(part: Part) -> Any:
    from rich.padding import Padding
    from rich.text import Text

    if isinstance(part, Line):
        text = Text(part.text, style="bold" if part.heading else "")
        return Padding(text, (0, 0, 0, part.indent)) if part.indent else text
    return Padding(_rich_table(part), (0, 0, 0, part.indent))


def _rich_table(table: Table) -> Any:
    from rich.table import Table as RichTable
    from rich.text import Text

    made = RichTable(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    for column in table.columns:
        made.add_column(
            column.header,
            justify="right" if column.right else "left",
            overflow="fold" if column.wrap else "ellipsis",
            no_wrap=not column.wrap,
        )
    for row in table.rows:
        made.add_row(*map(Text, row.cells), style=COLOURS.get(row.dtype, ""))
    return made
