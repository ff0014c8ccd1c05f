"""What torch.export cannot trace is said in plain words, with the user's line."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mpgraph
from mpgraph.capture.reasons import plain_reason

BRANCH = "it branches on the values of a tensor"
NUMBER = "it makes a Python number (a size, an index) of a tensor's value"


def branch(h: torch.Tensor) -> torch.Tensor:
    return h * 2 if h.sum() > 0 else h


def loop(h: torch.Tensor) -> torch.Tensor:
    while h.norm() > 0.5:
        h = h * 0.5
    return h


def size(h: torch.Tensor) -> torch.Tensor:
    return h[:, : int(h.abs().max())]


def index(h: torch.Tensor) -> torch.Tensor:
    return h * [1, 2, 3][int(h.argmax()) % 3]


def count(h: torch.Tensor) -> torch.Tensor:
    kept = h[h > 0]
    return kept * 2 if len(kept) % 2 else kept


def equal(h: torch.Tensor) -> torch.Tensor:
    return h if torch.equal(h, h + 1) else h * 2


def numpy(h: torch.Tensor) -> torch.Tensor:
    return h * float(h.detach().float().numpy().sum())


def pointer(h: torch.Tensor) -> torch.Tensor:
    return h if h.data_ptr() else h * 2


def text(h: torch.Tensor) -> torch.Tensor:
    return h * len(f"{h.mean():.3f}")


CASES = {
    branch: BRANCH,
    loop: BRANCH,
    size: NUMBER,
    index: NUMBER,
    count: NUMBER,
    equal: "it asks equal about the values of tensors",
    numpy: "it makes a numpy array of a tensor",
    pointer: "it reads a tensor's memory directly",
    text: "it writes the value of a tensor into a text",
}


class Model(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self.linear(x))


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("function", CASES, ids=lambda f: f.__name__)
def test_export_alone_says_why_in_plain_words(function):
    model = mpgraph.convert(Model(function), "bf16", capture="export")
    expected = rf"carry this call: {re.escape(CASES[function])}\n  from: test_reasons.py:\d+: \w"
    with pytest.raises(mpgraph.CaptureError, match=expected):
        model(torch.ones(2, 8))


def test_the_notice_and_the_report_say_it_too():
    model = mpgraph.convert(Model(branch), "bf16")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        model(torch.ones(2, 8))
    (said,) = [str(w.message) for w in seen if "mpgraph" in str(w.message)]
    reason = rf"{BRANCH} \(test_reasons.py:\d+: return h \* 2 if h.sum\(\) > 0 else h\)"
    assert re.search(rf"cannot carry Model faithfully: {reason}\. Dynamo carries it", said)
    assert re.search(rf"not captured by export: {reason}", mpgraph.explain(model).text(width=200))


@pytest.mark.parametrize(
    ("kind", "message", "expected"),
    [
        ("DynamicOutputShapeException", "aten.nonzero.default", "nonzero yields as many values"),
        ("PendingUnbackedSymbolNotFound", "Pending unbacked symbols {u0}", "depends on the values"),
        ("UnsupportedOperatorException", "mylib.op.default", "operator mylib.op cannot be traced"),
        ("UserError", "Consider annotating your code: data-dependent", BRANCH),
        ("UserError", "Constraints violated (batch)!", "sizes of its inputs depend on each other"),
    ],
)
def test_exceptions_that_some_versions_of_torch_raise(kind, message, expected):
    assert expected in plain_reason(type(kind, (RuntimeError,), {})(message))


def test_an_error_of_the_models_own_has_no_such_reason():
    with pytest.raises(RuntimeError) as caught:
        F.linear(torch.ones(4, 7), torch.ones(3, 5))
    assert plain_reason(caught.value) == ""
