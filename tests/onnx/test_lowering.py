"""Every operator of a step, forward and backward, computes in onnxruntime what it does in torch."""

from __future__ import annotations

import pytest
import torch

from mpgraph.errors import ExportError
from mpgraph.onnx import lowering
from mpgraph.onnx.functional import functional

from .survey import error, run
from .survey_cases import ROWS, Row

# Of the largest element: fp32 adds up in another order; 16 bit, two units of the dtype.
LIMITS = {torch.float32: 1e-5, torch.float16: 2 * 2.0**-10, torch.bfloat16: 2 * 2.0**-7}
FEW = ("conv", "max_pool", "softmax", "layer_norm", "cross_entropy", "sdpa causal", "index_put")


def _params(is_quick: object) -> list[object]:
    return [
        pytest.param(row, id=row.name, marks=() if is_quick(row) else pytest.mark.slow)  # type: ignore[operator]
        for row in ROWS
    ]


@pytest.mark.parametrize("row", _params(lambda row: row.quick))
def test_fp32_results_and_gradients_equal_those_of_torch(row: Row) -> None:
    """The graph is another one than torch runs; the numbers are the same."""
    for shapes in row.shapes:
        found = run(row.function, shapes, torch.float32)
        assert len(found.found) == len(found.eager)
        for a, b in zip(found.found, found.eager, strict=True):
            assert error(a, b) <= LIMITS[torch.float32], shapes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("row", _params(lambda row: row.name in FEW))
def test_16_bit_results_equal_those_of_the_same_graph_in_torch(
    row: Row, dtype: torch.dtype
) -> None:
    """Each node is rounded once, in both."""
    for shapes in row.shapes:
        found = run(row.function, shapes, dtype)
        for a, b in zip(found.found, found.graph, strict=True):
            assert error(a, b) <= LIMITS[dtype], shapes


def test_rows_say_what_they_compute_and_where_that_is_from() -> None:
    """And no operator has two."""
    targets = [target for row in lowering.ROWS for target in row.targets]
    assert len(targets) == len(set(targets))
    assert all(row.formula and row.source for row in lowering.ROWS)


def test_an_operator_without_translation_is_named() -> None:
    """With what to do."""
    with pytest.raises(ExportError, match=r"no translation of prims\.lgamma.*other operators"):
        run(torch.lgamma, [(3,)], torch.float32)


def test_what_torch_takes_apart_wrongly_is_refused() -> None:
    """Classes behind the -1 of a row would count."""
    y = torch.tensor([[1, 3, -1, 0]])
    with pytest.raises(ExportError, match="behind the -1"):
        run(lambda x: torch.nn.functional.multilabel_margin_loss(x, y), [(1, 4)], torch.float32)


def test_large_integers_are_divided_exactly() -> None:
    """torchlib divides them in float32, which has 24 bits."""

    def quotients(x: torch.Tensor) -> torch.Tensor:
        large = torch.tensor([2**40 + 7, -(2**40) - 7, 2**33 + 1])
        parts = [torch.div(large, 2**9, rounding_mode=m) for m in ("floor", "trunc")]
        return x + (torch.cat(parts) - 2**31 + 2**31).remainder(1000).float()

    found = run(quotients, [(6,)], torch.float32)
    assert torch.equal(found.found[0], found.eager[0])


def test_writes_become_results() -> None:
    """Running statistics of a batch norm among them, which no schema shows."""
    from torch._dispatch.python import enable_python_dispatcher
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    mode = FakeTensorMode()
    with mode, enable_python_dispatcher():
        values = [torch.empty(3, 4), torch.empty(4), torch.empty(4)]
        gm = make_fx(
            lambda x, m, v: (torch.batch_norm(x, None, None, m, v, True, 0.1, 1e-5, False),)
        )(*values)
    found = functional(gm)
    assert found.written == [1, 2]
    x, mean, var = torch.randn(3, 4), torch.zeros(4), torch.ones(4)
    _, new_mean, new_var = found.graph_module(x, mean, var)
    torch.batch_norm(x, None, None, mean, var, True, 0.1, 1e-5, False)
    torch.testing.assert_close((new_mean, new_var), (mean, var))
