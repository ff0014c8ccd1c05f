"""Results on disk, and the page made of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.zoo.coverage import coverage_page
from tests.zoo.results import Setting, Store

SETTING = Setting("auto", "bf16", "autocast-cpu")


def store_of(tmp_path: Path, *rows: tuple[str, str, str, str]) -> Store:
    store = Store(tmp_path / "sweep.jsonl")
    for name, torch, verdict, cause in rows:
        record: dict[str, Any] = {"name": name, "verdict": verdict, "cause": cause}
        key = f"{name} | auto | bf16 | autocast-cpu | torch {torch} | mpgraph 0.1.0"
        store.add(record | {"key": key, "bf16": torch.startswith("2.9")})
    return Store(store.path)


def chosen(store: Store, monkeypatch: Any) -> dict[str, str]:
    monkeypatch.setattr("tests.zoo.results.version_of", lambda library: "0.1.0")
    records = store.select_any_torch(["a", "b", "c", "d", "e"], SETTING)
    return {r["name"]: f"{r['key'].split(' | ')[4]}: {r['verdict']}" for r in records}


def test_of_several_versions_of_torch_the_newest_counts_unless_it_says_nothing(
    tmp_path: Path, monkeypatch: Any
) -> None:
    store = store_of(
        tmp_path,
        ("a", "2.13.0+cpu", "bitwise", ""),
        ("a", "2.9.1", "wrong", "loss"),
        ("b", "2.13.0+cpu", "error", "time limit of 240 s (stage: convert)"),
        ("b", "2.9.1", "close", "loss"),
        ("c", "2.9.1", "bitwise", ""),
        ("c", "2.13.0+cpu", "error", "RuntimeError: a bug"),
        ("d", "2.9.1", "eager-fails", "no bf16 here"),
    )
    assert chosen(store, monkeypatch) == {
        "a": "torch 2.13.0+cpu: bitwise",
        "b": "torch 2.9.1: close",
        "c": "torch 2.13.0+cpu: error",
        "d": "torch 2.9.1: eager-fails",
    }


def test_the_page_says_which_rows_are_from_which_torch_and_processor(
    tmp_path: Path, monkeypatch: Any
) -> None:
    store = store_of(
        tmp_path, ("a", "2.13.0+cpu", "bitwise", ""), ("b", "2.9.1", "close", "loss: values")
    )
    monkeypatch.setattr("tests.zoo.results.version_of", lambda library: "0.1.0")
    page = coverage_page(store.select_any_torch(["a", "b"], SETTING), SETTING, 2)
    assert "| 2.13.0+cpu | no: emulated | 1 |\n| 2.9.1 | yes | 1 |" in page
    assert "| b | 2.9.1 | – | close | loss: values |" in page
