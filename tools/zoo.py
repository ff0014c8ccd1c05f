"""Convert real models and compare them with torch.autocast, bit for bit.

    python tools/zoo.py run --set public           # the zoo in tests/zoo
    python tools/zoo.py run --set 'hf-*' --engine dynamo
    python tools/zoo.py sweep                      # every model type of transformers and timm
    python tools/zoo.py list

Every model runs in a process of its own, within a time and a memory limit. Results are kept in
zoo-output/ and not made again: an interrupted run goes on where it stopped. `--again` names what
to repeat, by name or by verdict. `--workers` checks several models at a time.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

# For tests.zoo; behind an installed mpgraph, if there is one.
sys.path.append(str(Path(__file__).resolve().parents[1]))

from tests.zoo import worker
from tests.zoo.compare import Verdict
from tests.zoo.coverage import cause_class, counts, coverage_page, engine_of
from tests.zoo.results import OUTPUT, ROOT, Record, Setting, Store, has_bf16, source_digest

STYLES = {"bitwise": "green", "close": "yellow", "eager-fails": "dim"}


class Worker:
    """A process that checks one model after the other; see tests/zoo/worker.py.

    It is started anew if it ends, which it should not: what it had to say is in the log.
    """

    def __init__(self, log: Path) -> None:
        self.log = log
        self.process = self._start()

    def _start(self) -> subprocess.Popen[str]:
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            # Asked whether there is a GPU, torch would start CUDA, which survives no fork.
            "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
        }
        with self.log.open("a") as log:
            return subprocess.Popen(
                [sys.executable, __file__, "worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                text=True,
            )

    def check(self, request: worker.Request) -> Record:
        """Return the outcome of one request."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(dataclasses.asdict(request)) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if answer:
            record: Record = json.loads(answer)
            return record
        status = self.process.wait()
        self.process = self._start()
        cause = f"the worker ended with status {status}, see {self.log.name}"
        return {"name": request.name, "verdict": "error", "cause": cause}

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def check_all(names: Sequence[str], arguments: argparse.Namespace, store: Store) -> None:
    """Check every name that has no result yet, one line each, and store the results."""
    setting = setting_of(arguments)
    due = store.missing(names, setting, arguments.again)
    console = Console(highlight=False)
    if len(due) < len(names):
        console.print(f"{len(names) - len(due)} of {len(names)} results are there already")
    if not due:
        return
    digest = source_digest()
    with _progress(console) as progress:
        task = progress.add_task("", total=len(due))
        for record in _checked(due, arguments):
            key = setting.key(record["name"])
            record |= {"key": key, "source": digest, "bf16": has_bf16()}
            store.add(record)
            progress.update(task, description=record["name"])
            progress.console.print(line_of(record), soft_wrap=True)
            progress.advance(task)


def _checked(names: Sequence[str], arguments: argparse.Namespace) -> Iterator[Record]:
    """Yield the record of every name, as the workers get them done."""
    logs = OUTPUT / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    done: queue.SimpleQueue[Record] = queue.SimpleQueue()
    for name in names:
        waiting.put(name)
    stop = threading.Event()

    def work(log: Path) -> None:
        worker_process = Worker(log)
        try:
            while not stop.is_set():
                done.put(worker_process.check(_request(waiting.get_nowait(), arguments, logs)))
        except queue.Empty:
            pass
        finally:
            worker_process.close()

    count = min(arguments.workers, len(names))
    threads = [
        threading.Thread(target=work, args=(logs / f"worker-{os.getpid()}-{index}.txt",))
        for index in range(count)
    ]
    for thread in threads:
        thread.start()
    try:
        for _ in names:
            yield done.get()
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def _request(name: str, arguments: argparse.Namespace, logs: Path) -> worker.Request:
    return worker.Request(
        name,
        arguments.engine,
        arguments.precision,
        arguments.policy,
        arguments.timeout,
        arguments.memory_gb,
        str(logs / f"{name.replace(':', '-').replace('/', '-')}.txt"),
        arguments.device,
    )


def _progress(console: Console) -> Progress:
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    name = TextColumn("{task.description:30.30}")
    return Progress(name, *columns, console=console, disable=not console.is_terminal)


def line_of(record: Record) -> str:
    """Return one line about one model: engine, verdict, nodes, casts, capture time, cause."""
    facts = record.get("facts") or {}
    style = STYLES.get(record["verdict"], "red")
    casts = f"{_shown(record.get('casts'))}/{_shown(record.get('autocast_casts'))}"
    seconds = facts.get("capture_seconds") or record.get("first_call_seconds")
    capture = "–" if seconds is None else f"{seconds:.1f} s"
    cause = record.get("cause", "").replace("[", "\\[")
    return (
        f"{record['name']:34.34} {engine_of(record):7} [{style}]{record['verdict']:11}[/{style}] "
        f"{_shown(facts.get('nodes')):>5} nodes  {casts:>9} casts  {capture:>7}  {cause}"
    )


def _shown(value: Any) -> str:
    return "–" if value is None else str(value)


def setting_of(arguments: argparse.Namespace) -> Setting:
    """Return what the results depend on."""
    return Setting(arguments.engine, arguments.precision, arguments.policy, arguments.device)


def summarise(records: Sequence[Record]) -> None:
    """Print counts by verdict, causes by class, and the casts saved."""
    console = Console(highlight=False)
    table = Table("verdict", "models", "models by cause", box=None)
    number = counts(records)
    for verdict in (str(v) for v in Verdict):
        if number[verdict]:
            table.add_row(verdict, str(number[verdict]), _causes(records, verdict))
    console.print(table)
    pairs = [(r["casts"], r["autocast_casts"]) for r in records if r.get("casts") is not None]
    pairs = [(ours, theirs) for ours, theirs in pairs if theirs]
    if pairs:
        ours, theirs = (sum(column) for column in zip(*pairs, strict=True))
        console.print(f"casts per step: {ours} converted, {theirs} under torch.autocast")


def _causes(records: Sequence[Record], verdict: str) -> str:
    if verdict == Verdict.BITWISE:
        return ""
    groups: dict[str, list[str]] = {}
    for record in records:
        if record["verdict"] == verdict:
            groups.setdefault(cause_class(record), []).append(record["name"])
    lines = (f"{cause}: {', '.join(names)}" for cause, names in groups.items())
    return "\n".join(lines).replace("[", "\\[")


def is_as_stated(records: Sequence[Record], known: dict[str, str]) -> bool:
    """Whether all models are bitwise, but for those with a written cause, which are close."""

    def is_fine(record: Record) -> bool:
        if record["verdict"] == Verdict.EAGER_FAILS:
            return True
        allowed = {"bitwise", "close"} if known.get(record["name"]) else {"bitwise"}
        return record["verdict"] in allowed

    return all(map(is_fine, records))


def run(arguments: argparse.Namespace) -> int:
    """Check a set of the zoo; 1 if something is not as stated."""
    from tests.zoo.registry import select

    cases = select(arguments.set)
    store = Store(OUTPUT / "run.jsonl")
    check_all(list(cases), arguments, store)
    records = store.select(cases, setting_of(arguments))
    summarise(records)
    _write_json(records, arguments.json)
    known = {name: case.known_difference for name, case in cases.items()}
    return 0 if is_as_stated(records, known) else 1


def sweep(arguments: argparse.Namespace) -> int:
    """Check every model type and family, and write the page of results."""
    from tests.zoo.candidates import sweep_names

    names = [name for name in sweep_names() if _matches(name, arguments.only)]
    store = Store(OUTPUT / "sweep.jsonl")
    check_all(names, arguments, store)
    setting = setting_of(arguments)
    records = store.select(names, setting)
    summarise(records)
    _write_json(records, arguments.json)
    if not arguments.only:
        page = coverage_page(store.select_any_torch(names, setting), setting, len(names))
        arguments.page.parent.mkdir(parents=True, exist_ok=True)
        arguments.page.write_text(page)
    return 0 if not counts(records)["wrong"] else 1


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return not patterns or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _write_json(records: Sequence[Record], path: Path | None) -> None:
    if path is not None:
        path.write_text(json.dumps(list(records), indent=1) + "\n")


def show_list(arguments: argparse.Namespace) -> int:
    """Print the names of the zoo's models, with family and tags."""
    from tests.zoo.registry import all_cases

    for case in all_cases().values():
        print(f"{case.name:34} {case.family:12} {' '.join(sorted(case.tags)):12} {case.notes}")
    return 0


def serve(arguments: argparse.Namespace) -> int:
    """Be the worker process of another run."""
    worker.main()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    shared = argparse.ArgumentParser(add_help=False)
    add = shared.add_argument
    add(
        "--engine",
        default="auto",
        choices=["auto", "export", "dynamo", "reference"],
        help="capture engine; 'reference' is eager autocast itself, to test the harness",
    )
    add("--precision", default="bf16", choices=["bf16", "fp16"])
    add("--device", default="cpu", choices=["cpu", "cuda"])
    add("--policy", help="autocast-cpu or autocast-cuda, after the device, unless given")
    add("--timeout", type=float, default=300.0, help="seconds per model")
    add("--memory-gb", type=float, default=6.0, help="memory per model")
    add("--workers", type=int, default=1, help="models to check at a time, a core for each")
    add(
        "--again",
        action="append",
        default=[],
        metavar="NAME|VERDICT",
        help="repeat these though they have results; may be given more than once",
    )
    add("--json", type=Path, help="write the results here as well")
    one = commands.add_parser("run", parents=[shared], help="check the models of tests/zoo")
    one.add_argument("--set", default="public", help="quick, public, hard, all, or a name glob")
    one.set_defaults(command=run)
    many = commands.add_parser("sweep", parents=[shared], help="check every model there is")
    many.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="GLOB",
        help="these names alone, such as 'timm:*'; writes no page",
    )
    many.add_argument("--page", type=Path, default=ROOT / "docs" / "coverage.md")
    many.set_defaults(command=sweep)
    commands.add_parser("list", help="name the models of tests/zoo").set_defaults(command=show_list)
    commands.add_parser("worker").set_defaults(command=serve)
    return parser  # fmt: skip


if __name__ == "__main__":
    parsed = _parser().parse_args()
    if hasattr(parsed, "policy"):
        parsed.policy = parsed.policy or f"autocast-{parsed.device}"
    sys.exit(parsed.command(parsed))
