"""A process that imports the model libraries once and forks a child for every model.

The child has a time limit and a memory limit, and whatever it does to torch's global state, to
the caches of the compiler or to itself dies with it. Requests and answers are JSON, one per line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import resource
import select
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any, TextIO

GIGABYTE = 1 << 30


@dataclasses.dataclass(frozen=True)
class Request:
    """Which model to check, how, and within which limits."""

    name: str
    engine: str = "auto"
    precision: str = "bf16"
    policy: str = "autocast-cpu"
    timeout: float = 300.0
    memory_gb: float = 6.0
    log: str = os.devnull
    device: str = "cpu"


# What every child would otherwise import anew.
_SHARED = (
    "transformers",
    "mpgraph.capture.engines",
    "mpgraph.passes",
    "mpgraph.report.report",
    ".candidates",
    ".check",
)


def serve(requests: TextIO, answers: TextIO) -> None:
    """Answer requests until there are no more."""
    _preload()
    # Not `for line in requests`, which reads ahead: the child would find it in the buffer.
    while line := requests.readline():
        request = Request(**json.loads(line))
        answers.write(json.dumps(run_in_child(request)) + "\n")
        answers.flush()


def _preload() -> None:
    """Import what every child needs, also what torch.export imports when it first runs.

    No kernel may run here: its threads would not survive the fork. An export runs none.
    """
    import torch

    torch.set_num_threads(1)
    import torch._dynamo
    import torch.export

    for name in _SHARED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name, __package__)
    with contextlib.suppress(ImportError):
        from .torchvision_standin import import_timm

        import_timm()
    from torch import nn

    with torch.device("meta"):
        torch.export.export(nn.Linear(2, 2), (torch.empty(2, 2),), strict=False)


def run_in_child(request: Request) -> dict[str, Any]:
    """Run one request in a forked child and return its outcome as a record."""
    reading, writing = os.pipe()
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _live_as_child(request, writing)
    os.close(writing)
    messages, expired = _read_messages(reading, start + request.timeout)
    os.close(reading)
    if expired:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    outcome = _outcome(request, messages, expired, status)
    return outcome | {"seconds": round(time.monotonic() - start, 2)}


def _read_messages(fd: int, deadline: float) -> tuple[list[dict[str, Any]], bool]:
    """Read the child's messages until it closes the pipe; also whether the deadline passed."""
    buffer = b""
    expired = True
    while (left := deadline - time.monotonic()) > 0:
        if select.select([fd], [], [], left)[0]:
            chunk = os.read(fd, 1 << 16)
            if not chunk:
                expired = False
                break
            buffer += chunk
    whole = buffer[: buffer.rfind(b"\n") + 1]
    return [json.loads(line) for line in whole.splitlines()], expired


def _outcome(
    request: Request, messages: list[dict[str, Any]], expired: bool, status: int
) -> dict[str, Any]:
    if messages and "verdict" in messages[-1]:
        return messages[-1]
    stage = messages[-1]["stage"] if messages else "build"
    cause = f"time limit of {request.timeout:g} s" if expired else _how_it_died(status)
    verdict = "error" if stage == "convert" else "eager-fails"
    return {"name": request.name, "verdict": verdict, "cause": f"{cause} (stage: {stage})"}


def _how_it_died(status: int) -> str:
    if os.WIFSIGNALED(status):
        return f"killed by {signal.Signals(os.WTERMSIG(status)).name}"
    return f"ended with status {os.waitstatus_to_exitcode(status)} and without a verdict"


def _live_as_child(request: Request, fd: int) -> None:
    """Check the model, write the outcome to the pipe, and end this process."""
    status = 1
    try:
        log = os.open(request.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        for stream in (1, 2):
            os.dup2(log, stream)
        if request.device == "cpu":  # CUDA reserves address space far beyond what it uses
            _limit_memory(request.memory_gb)
        else:
            _deterministic()
        with os.fdopen(fd, "w") as pipe:
            _check(request, pipe)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        # Neither the parent's buffers nor its exit handlers are the child's to run.
        with contextlib.suppress(Exception):
            sys.stderr.flush()
        os._exit(status)


def _limit_memory(gigabytes: float) -> None:
    """Let the address space grow by so much and no further, where the system can say its size."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        now = int(statm.read_text().split()[0]) * resource.getpagesize()
        limit = now + int(gigabytes * GIGABYTE)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _deterministic() -> None:
    """Ask CUDA for kernels that give the same bits twice, where it has them."""
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)


def _check(request: Request, pipe: TextIO) -> None:
    """Tell the pipe each stage as it begins, and the outcome last."""
    from .candidates import candidates
    from .check import check_candidates
    from .subject import converter

    def tell(message: dict[str, Any]) -> None:
        pipe.write(json.dumps(message) + "\n")
        pipe.flush()

    convert = converter(request.engine, request.precision, request.policy, request.device)
    outcome = check_candidates(
        request.name,
        candidates(request.name),
        convert,
        request.precision,
        lambda stage: tell({"stage": stage}),
        request.device,
    )
    tell(outcome.as_record())


def main() -> None:
    """Serve on the standard streams, which the libraries' own prints must not reach."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(sys.stdin, answers)
