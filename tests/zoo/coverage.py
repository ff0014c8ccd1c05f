"""docs/coverage.md from the results of a sweep."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from .check import ANOTHER_PATH
from .compare import Verdict
from .results import Record, Setting, torch_of, version_of

ORDER = [str(verdict) for verdict in Verdict]

_INTRODUCTION = """\
# Models that mpgraph was tried on

Each model is built from a small configuration with random weights and trained for two steps, once
in eager mode under `torch.autocast` and once converted with `policy="autocast-cpu"`; between the
steps the parameters change, and where the model allows it so does the batch size. Loss, outputs,
buffers, gradients and the state of the random generators are then compared bit for bit.

- **bitwise**: all equal.
- **close**: some values differ, no more than rounding explains; the first of them is given.
  "Another path when traced" means that the model itself does something else when it is traced
  than in eager mode (a choice by the values of a mask, say): the converted model is then bit for
  bit the captured graph under `torch.autocast`.
- **wrong**: a difference that rounding does not explain, or of dtype, shape or structure.
- **refused**: mpgraph says that it cannot convert the model, and why.
- **error**: anything else, time and memory limits among it.
- **eager-fails**: eager `torch.autocast` itself cannot train this small model here; not counted.

Made by `python tools/zoo.py sweep`; one row per model type of transformers and per family of timm.
"""


def counts(records: Sequence[Record]) -> Counter[str]:
    """Count the records by verdict."""
    return Counter(record["verdict"] for record in records)


def engine_of(record: Record) -> str:
    """Return the engine that a record names, or a dash."""
    return (record.get("facts") or {}).get("engine") or "–"


def coverage_page(records: Sequence[Record], setting: Setting, names: int) -> str:
    """Return the page: counts, then causes by class, then one row per model.

    ``names`` is how many models there are to check: a sweep may not be at its end.
    """
    counted = [r for r in records if r["verdict"] != Verdict.EAGER_FAILS]
    return "\n".join(
        [
            _INTRODUCTION,
            f"Versions: {_versions(records)}. Precision {setting.precision}, policy "
            f"`{setting.policy}`, engine `{setting.engine}`.\n",
            f"Checked so far: {len(records)} of {names} models.\n" if len(records) < names else "",
            *_machines(records),
            *_totals(records, counted),
            *_classes(counted),
            *_table("Models", [r for r in records if r in counted]),
            *_table("Not counted", [r for r in records if r not in counted]),
        ]
    )


def _versions(records: Sequence[Record]) -> str:
    names = ("mpgraph", "transformers", "timm")
    digests = sorted({r["source"] for r in records if "source" in r})
    source = f" (source {', '.join(digests)})" if digests else ""
    return ", ".join(f"{n} {version_of(n)}{source if n == 'mpgraph' else ''}" for n in names)


def _machines(records: Sequence[Record]) -> list[str]:
    """Say how many rows are from which torch, and whether bf16 was the processor's own there."""
    number = Counter((torch_of(r), r.get("bf16")) for r in records)
    lines = ["| torch | bf16 in the processor | rows |", "|---|---|---:|"]
    for (torch, is_native), rows in number.most_common():
        native = {True: "yes", False: "no: emulated"}.get(is_native, "not recorded")
        lines.append(f"| {torch} | {native} | {rows} |")
    note = (
        "Where a model has results of several versions of torch, the newest is given; but one that "
        "ended at its time limit, or in eager torch, gives way to any other.\n"
    )
    return [*lines, "", *([note] if len(number) > 1 else [])]


def _totals(records: Sequence[Record], counted: Sequence[Record]) -> list[str]:
    number = counts(records)
    lines = ["| verdict | models | share |", "|---|---:|---:|"]
    for verdict in ORDER:
        share = f"{number[verdict] / len(counted):.1%}" if counted else "–"
        shown = share if verdict != Verdict.EAGER_FAILS else ""
        lines.append(f"| {verdict} | {number[verdict]} | {shown} |")
    engines = Counter(engine_of(r) for r in counted)
    used = ", ".join(f"{count} by {engine}" for engine, count in engines.most_common())
    return [*lines, "", f"{len(counted)} models counted: {used}.", ""]


def _classes(counted: Sequence[Record]) -> list[str]:
    """Group what is not bitwise by cause, with numbers and names taken out of it."""
    groups: dict[tuple[str, str], list[str]] = {}
    for record in counted:
        if record["verdict"] != Verdict.BITWISE:
            groups.setdefault((record["verdict"], cause_class(record)), []).append(record["name"])
    if not groups:
        return []
    lines = ["## Causes", "", "| verdict | cause | models |", "|---|---|---|"]
    for (verdict, cause), names in sorted(groups.items(), key=lambda item: -len(item[1])):
        shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
        lines.append(f"| {verdict} | {_cell(cause)} | {shown} |")
    return [*lines, ""]


def cause_class(record: Record) -> str:
    """Return a cause without what differs from model to model."""
    cause = record.get("cause", "")
    if cause.startswith(ANOTHER_PATH):
        return ANOTHER_PATH
    if record["verdict"] in (Verdict.CLOSE, Verdict.WRONG):
        call = "second call, " if cause.startswith("second call: ") else ""
        row, _, what = cause.removeprefix("second call: ").partition(": ")
        kind = "values" if what.startswith("max abs") else re.split(r"[;,]", what)[0]
        return f"{call}{re.split(r'[ .<[]', row)[0]}: {kind}"
    return re.sub(r"\d+", "N", re.sub(r"'[^']*'|\"[^\"]*\"", "'…'", cause))[:120]


def _table(title: str, records: Sequence[Record]) -> list[str]:
    if not records:
        return []
    lines = [f"## {title}", "", "| model | torch | engine | verdict | cause |"]
    lines.append("|---|---|---|---|---|")
    for record in records:
        cause = _cell(record.get("cause", ""))
        facts = (record["name"], torch_of(record), engine_of(record), record["verdict"], cause)
        lines.append(f"| {' | '.join(facts)} |")
    return [*lines, ""]


def _cell(text: str) -> str:
    short = text if len(text) <= 160 else text[:157] + "…"
    # A path in an error message is this machine's, not the reader's.
    short = re.sub(r"(?:/[\w.+-]+){2,}/", "…/", short)
    return short.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
