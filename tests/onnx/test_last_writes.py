"""Which graphs need not be traced again to take their writes out."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from mpgraph.onnx.functional import functional
from mpgraph.onnx.last_writes import writes_last


def traced(function, count=2):
    mode = FakeTensorMode()
    with mode:
        fakes = [mode.from_tensor(torch.randn(2, 3)) for _ in range(count)]
        return make_fx(lambda *given: (function(*given),))(*fakes)


def at_the_end(x, y):
    z = x * y
    x.copy_(z + x.t().t())
    return z


def read_after(x, y):
    x.copy_(x * y)
    return x + y


def a_view_read_after(x, y):
    view = x.view(-1)
    x.copy_(x * y)
    return view + 1


def written_twice(x, y):
    z = x * y
    x.copy_(z)
    x.copy_(y)
    return z


def not_an_input(x, y):
    z = x * y
    z.add_(1)
    return z


def with_a_cast(x, y):
    z = x * y
    x.copy_(z.double())
    return z


def running_statistics(x, y):
    mean, variance = y[0, :], y[1, :]
    return torch.ops.aten.native_batch_norm.default(x, None, None, mean, variance, True, 0.1, 1e-5)[
        0
    ]


def normalized(x, y):
    """With running statistics that are an argument, and are only read."""
    mean, variance = y[0, :], y[1, :]
    norm = torch.ops.aten._native_batch_norm_legit_functional.default
    z, first, second, *_ = norm(x, None, None, mean, variance, True, 0.1, 1e-5)
    kept = [True, False, False]
    back = torch.ops.aten.native_batch_norm_backward.default
    gradient = back(z, x, None, mean, variance, first, second, True, 1e-5, kept)[0]
    x.copy_(gradient)
    return z


ACCEPTED = [at_the_end, normalized]
REFUSED = [
    read_after,
    a_view_read_after,
    written_twice,
    not_an_input,
    with_a_cast,
    running_statistics,
]


@pytest.mark.parametrize("function", ACCEPTED, ids=lambda f: f.__name__)
def test_inputs_written_at_the_end_need_no_second_trace(function):
    assert writes_last(traced(function).graph)


@pytest.mark.parametrize("function", REFUSED, ids=lambda f: f.__name__)
def test_any_other_write_needs_one(function):
    assert not writes_last(traced(function).graph)


@pytest.mark.parametrize(
    "function", [at_the_end, normalized, *REFUSED[:-1]], ids=lambda f: f.__name__
)
def test_what_is_returned_and_written_is_what_eager_mode_gives(function):
    x, y = torch.randn(2, 3), torch.randn(2, 3)
    found = functional(traced(function))
    result, *new = found.graph_module(x, y)
    given = [x.clone(), y.clone()]
    assert torch.equal(result, function(*given))
    written = dict(zip(found.written, new, strict=True))
    for place, value in enumerate(given):
        assert torch.equal(written.get(place, (x, y)[place]), value)
