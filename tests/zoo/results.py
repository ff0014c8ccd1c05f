"""Outcomes on disk: one JSON line each, found again by model and versions."""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import importlib.metadata
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
OUTPUT = ROOT / "zoo-output"

Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a result depends on besides the model: conversion and versions."""

    engine: str
    precision: str
    policy: str
    device: str = "cpu"

    def key(self, name: str) -> str:
        """Return what identifies a result: an equal key means that it need not be made again."""
        libraries = ["torch", "mpgraph"]
        libraries += ["timm"] if name.startswith("timm") else []
        libraries += ["transformers"] if name.startswith("hf") else []
        versions = (f"{library} {version_of(library)}" for library in libraries)
        device = [] if self.device == "cpu" else [self.device]
        return " | ".join([name, self.engine, self.precision, self.policy, *device, *versions])


def has_bf16() -> bool:
    """Whether this processor has instructions for bf16; otherwise torch emulates it."""
    import torch

    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def version_of(library: str) -> str:
    """Return an installed library's version, or "-"."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "-"


def torch_of(record: Record) -> str:
    """Return the version of torch that a result is from."""
    found = re.search(r"\| torch (\S+)", record["key"])
    return found[1] if found else "-"


def _of_any_torch(key: str) -> str:
    return re.sub(r"\| torch \S+", "| torch", key)


def _weight(record: Record) -> tuple[bool, list[int]]:
    """Return what decides between results of one model: one that says something, the newest torch.

    A time limit, or eager torch that fails, says something about a machine or a release alone.
    """
    is_void = record["verdict"] == "eager-fails" or record["cause"].startswith("time limit")
    release = torch_of(record).partition("+")[0]
    return not is_void, [int(number) for number in re.findall(r"\d+", release)]


def source_digest() -> str:
    """Return eight letters that change with any source file of the package under test.

    Results are kept across such changes, so that a sweep can be resumed; the digest in each says
    which state of the source it is from.
    """
    digest = hashlib.sha256()
    for folder in (ROOT / "mpgraph", ROOT / "passes"):
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


class Store:
    """A file of results, the last of each key valid."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: dict[str, Record] = {}
        if path.exists():
            for record in _read(path):
                self.records[record["key"]] = record

    def add(self, record: Record) -> None:
        """Append one result."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        self.records[record["key"]] = record

    def select(self, names: Iterable[str], setting: Setting) -> list[Record]:
        """Return the results there are for the names, in their order."""
        keys = (setting.key(name) for name in names)
        return [self.records[key] for key in keys if key in self.records]

    def select_any_torch(self, names: Iterable[str], setting: Setting) -> list[Record]:
        """Return the best result there is for each name, from whichever version of torch."""
        found: dict[str, Record] = {}
        for key, record in self.records.items():
            general = _of_any_torch(key)
            found[general] = max(found.get(general, record), record, key=_weight)
        keys = (_of_any_torch(setting.key(name)) for name in names)
        return [found[key] for key in keys if key in found]

    def missing(self, names: Iterable[str], setting: Setting, again: Iterable[str]) -> list[str]:
        """Return the names without a result, and those whose name or verdict is to run again."""
        patterns = list(again)

        def is_due(name: str) -> bool:
            record = self.records.get(setting.key(name))
            if record is None:
                return True
            return any(p == record["verdict"] or fnmatch.fnmatchcase(name, p) for p in patterns)

        return [name for name in names if is_due(name)]


def _read(path: Path) -> Iterator[Record]:
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:  # the last line of a run that was killed while it wrote
            continue
