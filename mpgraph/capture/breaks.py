"""What Dynamo left to Python, and what went wrong, in words and with the user's line."""

from __future__ import annotations

import dataclasses
import re
import traceback
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from torch import fx
from torch._dynamo import exc
from torch._dynamo.utils import counters, graph_break_reasons

from mpgraph import ir
from mpgraph.capture.detect import NeedsDynamo
from mpgraph.capture.kept import UNDER_AUTOCAST
from mpgraph.capture.reasons import plain_reason
from mpgraph.errors import CaptureError, MPGraphError, VerificationError
from mpgraph.places import is_users

_OWN = str(Path(__file__).parents[1])


@dataclasses.dataclass(frozen=True)
class Break:
    """A place where the model runs in eager mode under ``torch.autocast``.

    Attributes:
        reason: What Dynamo, or mpgraph, could not carry.
        line: ``file.py:12: code`` of the user's line; "" if unknown.
    """

    reason: str
    line: str


def breaks_inside(gm: fx.GraphModule) -> list[Break]:
    """The parts of a rewritten graph that run under ``torch.autocast``, as they were kept."""
    nodes = gm.graph.find_nodes(op="call_function", target=UNDER_AUTOCAST)
    return [Break(f"{node.meta['holds']} is kept whole", ir.source_line(node)) for node in nodes]


class Watch:
    """Collects the breaks that Dynamo reports from one moment to the next."""

    def __init__(self) -> None:
        self._seen = len(graph_break_reasons)
        self._counted = Counter(counters["graph_break"])

    def new(self) -> list[Break]:
        """What has been reported since the last time."""
        fresh = graph_break_reasons[self._seen :]
        counted = Counter(counters["graph_break"]) - self._counted
        self._seen, self._counted = len(graph_break_reasons), Counter(counters["graph_break"])
        found = [Break(_summary(r.reason), line_of(r.user_stack)) for r in fresh]
        # Frames that Dynamo gives up on as a whole are counted, but give no stack.
        told = {b.reason for b in found}
        skipped = [Break(_summary(text), _line_in(text)) for text in counted]
        return found + [b for b in skipped if b.reason not in told]


def _summary(text: str) -> str:
    """The first two lines of Dynamo's own account: what, and why."""
    lines = [line.strip() for line in str(text).strip().splitlines() if line.strip()]
    why = next(
        (x.removeprefix("Explanation: ") for x in lines if x.startswith("Explanation: ")), ""
    )
    return f"{lines[0]}: {why}" if lines and why else (lines[0] if lines else "unknown")


def line_of(frames: Iterable[traceback.FrameSummary]) -> str:
    """The innermost line that is the user's own or, for a model of torch.nn alone, torch's."""
    found = [f for f in frames if not f.filename.startswith(_OWN)]
    mine = [f for f in found if is_users(f.filename)] or found
    return f"{_short(mine[-1].filename)}:{mine[-1].lineno}: {mine[-1].line}" if mine else ""


def _short(filename: str) -> str:
    return filename.rsplit("/", 1)[-1]


_FRAME = re.compile(r'File "([^"]+)", line (\d+)(?:, in [^\n]*\n\s*|, in \S+, code: )([^\n]+)')


def _line_in(text: str) -> str:
    found = [f for f in _FRAME.findall(text) if is_users(f[0])]
    if not found:
        return ""
    path, line, code = found[-1]
    return f"{_short(path)}:{line}: {code}"


def line_of_error(error: BaseException) -> str:
    """The user's line that an error comes from: from its traceback, or Dynamo's account of it."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if is_users(f.filename)]
    return line_of(frames) or _line_in(str(error))


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


_GOT = re.compile(r"got (\w+)\((['\"])(.*)\2\)", re.DOTALL)
_WAY_OUT = (
    "Put what cannot be traced into a function decorated with @torch.compiler.disable: it then "
    "runs in eager mode under torch.autocast, its gradients included."
)
_CAUGHT = (
    "If forward catches this error itself, put the try into a function decorated with "
    "@torch.compiler.disable: it then runs in eager mode under torch.autocast."
)


DYNAMO_ERRORS = (exc.TorchDynamoException, exc.FailOnRecompileLimitHit)


def explain_failure(error: Exception, before: str = "") -> Exception:
    """The error to raise instead of one of Dynamo's.

    ``before`` says why the export engine did not carry the call.
    """
    if isinstance(error, exc.BackendCompilerFailed):
        inner = error.inner_exception
        if isinstance(inner, MPGraphError):
            return inner
        return VerificationError(f"a graph from Dynamo could not be rewritten: {first_line(inner)}")
    return CaptureError("\n".join(filter(None, [*_account(error), before])))


def describe(error: BaseException) -> tuple[str, str]:
    """Why the export engine failed, and the user's line."""
    if isinstance(error, NeedsDynamo):
        return error.reason, error.where
    return plain_reason(error) or first_line(error), line_of_error(error)


def refusal(error: BaseException) -> CaptureError:
    """The error of ``capture="export"``."""
    reason, line = describe(error)
    where = f"\n  from: {line}" if line else ""
    return CaptureError(
        f"the export engine cannot carry this call: {reason}{where}\n"
        "Use capture='auto' or capture='dynamo' in mpgraph.convert: Dynamo keeps what a single "
        "graph cannot hold."
    )


def _account(error: Exception) -> list[str]:
    where = f"  from: {line}" if (line := line_of_error(error)) else ""
    if isinstance(error, exc.FailOnRecompileLimitHit):
        text = str(error.__cause__ or error)
        return [
            "this model was compiled too often for one of its functions: " + _summary(text),
            where,
            "Pad inputs to fewer shapes, pass changing numbers as tensors, or raise max_graphs in "
            "mpgraph.convert.",
        ]
    if isinstance(error, exc.TorchRuntimeError) and (got := _GOT.search(str(error))):
        said = f"an operator fails under Dynamo, though forward does not: {got[1]}: {got[3]}"
        return [said, where, _CAUGHT]
    return [f"Dynamo cannot carry this model: {_summary(str(error))}", where, _WAY_OUT]
