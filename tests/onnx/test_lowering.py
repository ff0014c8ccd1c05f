"""Every operator of a step, forward and backward, computes in onnxruntime what it does in torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mpgraph.errors import ExportError
from mpgraph.onnx import lowering
from mpgraph.onnx.functional import functional, in_plain_operators
from mpgraph.onnx.lowering.constants import constant

from . import operator_table
from .survey import error, make, run
from .survey_row import Ints, Row

ROWS = tuple(row for rows in operator_table.PARTS.values() for row in rows)

# Of the largest element: fp32 adds up in another order; 16 bit, two units of the dtype.
LIMITS = {torch.float32: 1e-5, torch.float16: 2 * 2.0**-10, torch.bfloat16: 2 * 2.0**-7}
FEW = ("conv", "max_pool", "softmax", "layer_norm", "cross_entropy", "sdpa causal", "index_put")
RESIZED = (
    "interpolate bilinear", "group_norm", "multi_margin", "ctc of lengths in the batch",
    "adaptive_avg_pool of channels last", "as_strided turned", "affine_grid of the batch",
)  # fmt: skip
# torch refuses them in 16 bit under torch.autocast too; what mpgraph captures has them in fp32.
REFUSED_BY_AUTOCAST = ("vander", "logdet")
# What torch 2.11 itself refuses to trace, or has no gradient of; and, with symbolic sizes, what it
# refuses, fixes the size of, or computes wrongly (the gradient of a tall matrix's trace).
NOT_IN_2_11 = ("quantile", "quantile of several", "nanquantile", "aminmax")
NO_SYMBOLS_IN_2_11 = (
    *NOT_IN_2_11, "trace", "bce weighted", "cross_entropy of probabilities",
    "cross_entropy of probabilities, with all",
)  # fmt: skip


def skip_before_2_12(row: Row, names: tuple[str, ...]) -> None:
    """Skip what torch itself cannot do."""
    if torch.__version__ < "2.12" and row.name in names:
        pytest.skip(f"torch {torch.__version__} itself cannot")


def _params(is_quick: object) -> list[object]:
    return [
        pytest.param(row, id=row.name, marks=() if is_quick(row) else pytest.mark.slow)  # type: ignore[operator]
        for row in ROWS
    ]


@pytest.mark.parametrize("row", _params(lambda row: row.quick))
def test_fp32_results_and_gradients_equal_those_of_torch(row: Row) -> None:
    """The graph is another one than torch runs; the numbers are the same."""
    skip_before_2_12(row, NOT_IN_2_11)
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
    skip_before_2_12(row, NOT_IN_2_11)
    for shapes in row.shapes:
        found = run(row.function, shapes, dtype, converted=row.widened)
        for a, b in zip(found.found, found.graph, strict=True):
            assert error(a, b) <= LIMITS[dtype], shapes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in ROWS if row.widened])
def test_what_the_survey_does_not_run_in_16_bit_torch_does_not_either(
    row: Row, dtype: torch.dtype
) -> None:
    """Most of what is widened runs under torch.autocast, which widens it as well."""
    inputs = [make(spec, dtype) for spec in row.shapes[0]]
    with pytest.raises(RuntimeError, match=r"must be either float|[Ll]ow precision|but got"):
        row.function(*inputs)
    with torch.autocast("cpu", dtype):
        if row.name not in REFUSED_BY_AUTOCAST:
            assert row.function(*inputs).dtype is torch.float32
        else:
            with pytest.raises(RuntimeError, match=r"Low precision|but got"):
                row.function(*inputs)


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=row.name, marks=() if row.name in RESIZED else pytest.mark.slow)
        for row in ROWS
        if not row.fixed
    ],
)
def test_a_symbolic_batch_takes_other_sizes(row: Row) -> None:
    """Exported with one size, run with another; where tracing fixes the size, the row says so."""
    skip_before_2_12(row, NO_SYMBOLS_IN_2_11)
    found = run(row.function, row.shapes[0], torch.float32, size=17)
    for a, b in zip(found.found, found.eager, strict=True):
        assert error(a, b) <= LIMITS[torch.float32]


@pytest.mark.parametrize("dtype", LIMITS, ids=["fp32", "fp16", "bf16"])
def test_elements_of_a_symbolic_batch_are_counted_in_every_dtype(dtype: torch.dtype) -> None:
    """onnxruntime lacks a node for it in bf16."""
    found = run(lambda x: x[:, :1] * 0 + x.numel(), [(4, 8)], dtype, size=8)
    assert found.found[0].unique().tolist() == [64.0]


def test_a_scan_survives_the_conversion_to_another_opset() -> None:
    """torch.onnx writes operators of opset 18 and converts them, those inside too."""
    row = next(row for row in ROWS if row.name == "ctc")
    found = run(row.function, row.shapes[0], torch.float32, opset=23)
    for a, b in zip(found.found, found.eager, strict=True):
        assert error(a, b) <= LIMITS[torch.float32]


def test_an_offset_in_memory_counts_from_where_the_memory_starts() -> None:
    """Not from the first element of a slice."""
    found = run(lambda x: x[1:].as_strided((3, 2), (2, 1), 4), [(4, 3)], torch.float32)
    for a, b in zip(found.found, found.eager, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", LIMITS, ids=["fp32", "fp16", "bf16"])
def test_experts_of_transformers_take_the_rows_that_are_theirs(dtype: torch.dtype) -> None:
    """Two rows, none and four; the last row is nobody's."""
    moe = pytest.importorskip("transformers.integrations.moe")
    assert moe is not None  # it defines the operator
    ends = torch.tensor([2, 2, 6])

    def function(x: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
        return torch.ops.transformers.grouped_mm_fallback(x, matrices, ends)

    found = run(function, [(7, 4), (3, 4, 5)], dtype)
    expected = found.eager if dtype is torch.float32 else found.graph
    for a, b in zip(found.found, expected, strict=True):
        assert error(a, b) <= LIMITS[dtype]


def test_ctc_in_fp64_stays_in_fp64() -> None:
    """Constants of the Scan are of its dtype."""
    lengths = torch.tensor([12, 9]), torch.tensor([4, 2])
    y = torch.tensor([[1, 1, 2, 3], [2, 4, 0, 0]])
    found = run(
        lambda x: F.ctc_loss(x.double().log_softmax(-1), y, *lengths), [(12, 2, 5)], torch.float32
    )
    assert found.found[0].dtype is torch.float64
    assert error(found.found[0], found.eager[0]) <= 1e-14


def test_no_two_calls_have_one_name() -> None:
    """Or one of them would not be found."""
    assert len({row.name for row in ROWS}) == len(ROWS)


def test_rows_say_what_they_compute_and_where_that_is_from() -> None:
    """And no operator has two."""
    targets = [target for row in lowering.ROWS for target in row.targets]
    assert len(targets) == len(set(targets))
    assert all(row.formula and row.source for row in lowering.ROWS)


def test_an_operator_without_translation_is_named() -> None:
    """With what to do."""
    with pytest.raises(
        ExportError, match=r"(?s)no translation.*prims\.bessel_i0.*in other operators"
    ):
        run(torch.special.i0, [(3,)], torch.float32)


REFUSED = {
    "divides the gradient of an index by how often another": (
        lambda i, w: F.embedding_bag(i, w, mode="sum", scale_grad_by_freq=True),
        (Ints((2, 5), 7), (7, 3)),
    ),
    "polygamma of order 2": (lambda x: torch.polygamma(2, x.detach()) * x, ((3,),)),
    "names all of their elements": (lambda x: x[2:].as_strided((2, 2), (2, 1), 0), ((4, 3),)),
    "65 by 65": (lambda x: torch.linalg.inv(x), ((65, 65),)),
    "fixed number of rows": (torch.pdist, ((4, 3),)),
    "fixed number of elements": (lambda x: x.cummax(0)[0], ((5, 3),)),
    "for one size alone of the batch": (lambda x: F.adaptive_avg_pool1d(x.mT, 2), ((5, 3),)),
}

FOR_ANY_BATCH = (
    "fixed number of rows",
    "fixed number of elements",
    "for one size alone of the batch",
)


@pytest.mark.parametrize("why", REFUSED)
def test_what_cannot_be_carried_says_why(why: str) -> None:
    """Instead of numbers that are wrong, or right for one size alone."""
    function, shapes = REFUSED[why]
    with pytest.raises(ExportError, match=why):
        run(function, shapes, torch.float32, size=9 if why in FOR_ANY_BATCH else 0)


def test_a_constant_of_a_symbolic_size_is_refused() -> None:
    """It would hold for the example's size alone."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=False)
    x = mode.from_tensor(torch.zeros(4, 2))
    with pytest.raises(ExportError, match="depend on the size of the batch"):
        constant([0, x.shape[0]])


def test_torch_traces_as_before_once_a_step_is_exported() -> None:
    """What is set aside while an export traces comes back, also where one traces inside another."""
    from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

    targets = (torch.ops.aten.upsample_bilinear2d.default, torch.ops.aten._linalg_det.default)
    before = [dict(target.py_kernels) for target in targets]
    with in_plain_operators():
        with in_plain_operators():
            pass
        assert [dict(target.py_kernels) for target in targets] != before
    assert [dict(target.py_kernels) for target in targets] == before
    with FakeTensorMode(), pytest.raises(DynamicOutputShapeException):
        F.ctc_loss(torch.zeros(4, 2, 3), torch.ones(2, 1), torch.ones(2), torch.ones(2))


@pytest.mark.parametrize("name", ["lgamma", "digamma"])
def test_gamma_functions_are_right_everywhere(name: str) -> None:
    """Below 0, next to poles and roots, at poles, and far out."""
    x = torch.cat([
        torch.linspace(-6.03, 12.1, 400), torch.tensor([1.0, 2.0, 0.0, -1.0, 1e-30, 1e6, 1e30]),
        1 + torch.tensor([1e-4, -1e-4, 1e-6]), torch.tensor([1.4616321, float("inf")]),
    ])  # fmt: skip
    function = getattr(torch, name)
    found = run(lambda zero: function(x + zero * 0), [x.shape], torch.float32).found[0]
    expected = function(x.double())
    ends = ~expected.isfinite()
    assert torch.equal(found[ends].nan_to_num(), expected[ends].float().nan_to_num())
    assert torch.equal(found.isnan(), expected.isnan())
    torch.testing.assert_close(found[~ends], expected[~ends].float(), rtol=2e-7, atol=1e-13)


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


@pytest.mark.skipif(
    not hasattr(F, "linear_cross_entropy"),
    reason="the table is that of torch 2.13, whose linear_cross_entropy this torch lacks",
)
def test_the_table_of_operators_is_that_of_the_survey() -> None:
    """``python -m tests.onnx.operator_table`` writes it."""
    assert operator_table.FILE.read_text(encoding="utf-8") == operator_table.text()
