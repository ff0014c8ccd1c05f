"""A progress bar over batches, with the loss beside it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Sized
from typing import Any, TypeVar

Item = TypeVar("Item")


def shown(
    items: Iterable[Item], title: str, history: Sequence[dict[str, Any]], visible: bool
) -> Iterator[Item]:
    """The items, one by one, and a bar that shows how many there were and the last loss."""
    if not visible:
        yield from items
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"), TimeElapsedColumn(),
    )  # fmt: skip
    total = len(items) if isinstance(items, Sized) else None
    with Progress(*columns) as progress:
        task = progress.add_task(title, total=total, loss="")
        for item in items:
            yield item
            loss = f"{history[-1]['loss']:.4f}" if history else ""
            progress.update(task, advance=1, loss=loss)
