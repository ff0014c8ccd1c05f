"""The operator table against the installed torch: names, overloads, and evidence for its rows."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mpgraph import op_table
from mpgraph.op_rows_default import DEFAULT, LEAN
from mpgraph.op_rows_shared import MOVES_DATA, SHARED
from mpgraph.op_rule import rows, table
from mpgraph.op_table import PRESETS, Rule, keeps_dtype_by_name, ops_with_rule, rule_for

bf16, f16, f32, f64 = torch.bfloat16, torch.float16, torch.float32, torch.float64

# The table is written for this torch; an older one lacks some operators, a newer one has more.
TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])
same_torch = pytest.mark.skipif(TORCH != (2, 13), reason="the table's names are torch 2.13's")

CASTING = (Rule.LOWER, Rule.WIDEN, Rule.PROMOTE)


def operator(op: str) -> Any:
    """The installed torch's operator, or None."""
    _, name, overload = op.split(".")
    return getattr(getattr(torch.ops.aten, name, None), overload, None)


def known_operators() -> Iterator[tuple[str, Any]]:
    """Every aten overload that Python can call: those on named dimensions cannot be."""
    for qualified in torch._C._dispatch_get_all_op_names():
        if qualified.startswith("aten::"):
            name, _, overload = qualified.removeprefix("aten::").partition(".")
            op = f"aten.{name}.{overload or 'default'}"
            if (found := operator(op)) is not None:
                yield op, found


KNOWN = dict(known_operators())


def test_the_table_does_not_import_torch() -> None:
    script = "import sys, mpgraph.op_table, mpgraph.policy; assert 'torch' not in sys.modules"
    # A package __init__ that imports torch would hide what this test is about.
    stub = "import sys, types; m = types.ModuleType('mpgraph'); m.__path__ = [sys.argv[1]]; "
    stub += "sys.modules['mpgraph'] = m; "
    package = str(Path(op_table.__file__).parent)
    subprocess.run([sys.executable, "-c", stub + script, package], check=True)


def test_an_operator_with_two_rows_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"two rows: aten\.exp\.default"):
        table(rows(Rule.WIDEN, "a", "exp"), rows(Rule.LOWER, "b", "mm exp"))


def test_a_name_without_an_overload_is_the_default_overload() -> None:
    assert list(rows(Rule.WIDEN, "a", "exp sum.dim_IntList")) == [
        "aten.exp.default",
        "aten.sum.dim_IntList",
    ]


@same_torch
@pytest.mark.parametrize("preset", PRESETS)
def test_every_row_names_an_operator_of_torch(preset: str) -> None:
    assert [op for op in PRESETS[preset] if op not in KNOWN] == []


@pytest.mark.parametrize("preset", PRESETS)
def test_every_row_has_a_reason(preset: str) -> None:
    assert [op for op, row in PRESETS[preset].items() if len(row.reason) < 5] == []


def test_presets_cannot_be_edited_by_accident() -> None:
    with pytest.raises(TypeError):
        PRESETS["default"]["aten.mm.default"] = PRESETS["default"]["aten.exp.default"]  # type: ignore[index]


def test_an_operator_without_a_row_gets_none() -> None:
    assert rule_for("default", "aten.einsum.default") is None
    assert rule_for("default", "my_library.my_op.default") is None


def test_ops_with_rule_lists_the_rows_of_one_rule() -> None:
    assert ops_with_rule("autocast-cuda", Rule.REFUSE) == {"aten.binary_cross_entropy.default"}


@same_torch
@pytest.mark.parametrize("preset", ["default", "lean"])
def test_every_overload_of_a_family_that_is_cast_has_a_row(preset: str) -> None:
    families = {op.split(".")[1] for op in DEFAULT if DEFAULT[op].rule in CASTING}
    missing = [
        op
        for op, found in KNOWN.items()
        if op.split(".")[1] in families
        and rule_for(preset, op) is None
        and any(isinstance(a.type, torch.TensorType) for a in found._schema.arguments)
        and not op.endswith((".quantized", ".hacked_twin"))
    ]
    assert missing == []


# These write into an argument, but their names do not say so.
WRITES_WITHOUT_SAYING = {
    "_batch_norm_with_update",
    "_cummax_helper",
    "_cummin_helper",
    "_flash_attention_forward_no_dropout_inplace",
    "_fused_moving_avg_obs_fq_helper",
    "_native_batch_norm_legit",
    "fbgemm_linear_fp16_weight",
    "fbgemm_linear_fp16_weight_fp32_activation",
    "fused_moving_avg_obs_fake_quant",
    "record_stream",
    "retain_grad",
    "rrelu_with_noise",
    "set_data",
}


@same_torch
def test_names_tell_which_operators_write_into_their_arguments() -> None:
    wrong = [
        op
        for op, found in KNOWN.items()
        if keeps_dtype_by_name(op) != found._schema.is_mutable
        and "._test_" not in op
        and op.split(".")[1] not in WRITES_WITHOUT_SAYING
    ]
    assert wrong == []


def test_in_place_and_out_variants_keep_their_dtype_in_every_preset() -> None:
    for op in ("aten.exp_.default", "aten.addmm.out", "aten.max.dim_max", "aten.__ior__.Tensor"):
        assert {rule_for(preset, op).rule for preset in PRESETS} == {Rule.KEEP}  # type: ignore[union-attr]


def dtype_arguments(op: str) -> list[Any]:
    return [a for a in KNOWN[op]._schema.arguments if a.name == "dtype"]


@same_torch
@pytest.mark.parametrize("preset", PRESETS)
def test_set_dtype_rows_have_an_optional_dtype_argument(preset: str) -> None:
    for op, row in PRESETS[preset].items():
        if row.set_dtype:
            assert row.rule is Rule.WIDEN
            assert [a.default_value for a in dtype_arguments(op)] == [None], op


@same_torch
def test_what_default_widens_and_takes_a_dtype_is_widened_by_that_argument() -> None:
    # Casting the input would round-trip a result whose dtype the user asked for.
    for op in ops_with_rule("default", Rule.WIDEN):
        assert bool(dtype_arguments(op)) == PRESETS["default"][op].set_dtype, op


@same_torch
def test_append_dtype_rows_have_an_overload_that_takes_a_dtype() -> None:
    assert operator("aten.norm.ScalarOpt_dtype") is not None
    assert operator("aten.norm.ScalarOpt_dim_dtype") is not None
    for preset in PRESETS:
        appended = {op for op, row in PRESETS[preset].items() if row.append_dtype}
        assert appended <= {"aten.norm.Scalar", "aten.norm.ScalarOpt_dim"}


# --- evidence ------------------------------------------------------------------------------

tensor = torch.tensor

# For each family that `default` widens, a call that 16 bit gets wrong or cannot make at all.
HARD_INPUTS: dict[str, tuple[Any, ...]] = {
    "softmax.int": (tensor([0.0, -20.0]), -1),
    "layer_norm.default": (tensor([[1000.0, 1001.0, 1003.0]]), [3]),
    "batch_norm.default": (
        tensor([[1000.0], [1001.0], [1003.0]]), None, None, None, None, True, 0.1, 1e-5, False,
    ),
    "sum.default": (torch.ones(70000),),
    "prod.default": (torch.full((20,), 10.0),),
    "var.correction": (tensor([0.0, 1000.0]),),
    "linalg_vector_norm.default": (torch.full((65536,), 300.0),),
    "dist.default": (tensor([1000.0]), tensor([1001.0])),
    "dot.default": (torch.ones(70000), torch.ones(70000)),
    "index_add.default": (torch.zeros(1), 0, torch.zeros(5000, dtype=torch.long), torch.ones(5000)),
    "quantile.default": (tensor([1.0, 2.0]), tensor([0.5])),
    "exp.default": (tensor([12.0]),),
    "logsumexp.default": (tensor([-5.0, 0.0]), [0]),
    "log.default": (tensor([1e-8]),),
    "pow.Tensor_Scalar": (tensor([300.0]), 2),
    "tan.default": (tensor([1.55]),),
    "lgamma.default": (tensor([1e4]),),
    "poisson.default": (tensor([1e5]),),
    "mse_loss.default": (tensor([300.0]), tensor([0.0])),
    "fft_rfft.default": (tensor([1.0, 2.0, 4.0]),),
    "complex.default": (tensor([1.0]), tensor([1.0])),
    "linalg_inv.default": (torch.eye(2),),
    "_upsample_bilinear2d_aa.default": (torch.ones(1, 1, 2, 2), [4, 4], False),
    "grid_sampler.default": (
        (torch.arange(1000) % 2).view(1, 1, 1, 1000).float(), tensor([[[[0.3001, 0.0]]]]), 0, 0,
        False,
    ),
    "fake_quantize_per_tensor_affine.default": (tensor([0.01499]), 0.01, 0, -128, 127),
    "_adaptive_avg_pool3d.default": (torch.full((1, 1, 20, 20, 20), 300.0), [1, 1, 1]),
}  # fmt: skip


def run_in(op: str, dtype: torch.dtype) -> torch.Tensor:
    args = [
        a.to(dtype) if isinstance(a, torch.Tensor) and a.is_floating_point() else a
        for a in HARD_INPUTS[op]
    ]
    torch.manual_seed(0)
    result = KNOWN[f"aten.{op}"](*args)
    return torch.view_as_real(result).to(f64) if result.is_complex() else result.to(f64)


def relative_error(op: str, dtype: torch.dtype) -> float:
    """The largest relative error of any element; infinite where torch refuses the dtype."""
    want = run_in(op, f64)
    try:
        error = (run_in(op, dtype) - want).abs() / want.abs().clamp(min=1e-300)
    except RuntimeError:
        return float("inf")
    return error.nan_to_num(nan=float("inf"), posinf=float("inf")).max().item()


def evidence_for(reason: str) -> str:
    family = [op for op, row in DEFAULT.items() if row.reason == reason]
    for op in family:
        if (short := op.removeprefix("aten.")) in HARD_INPUTS:
            return short
    raise KeyError(f"no HARD_INPUTS for any of {family}")


@pytest.mark.parametrize(
    "reason", sorted({row.reason for row in DEFAULT.values() if row.rule is Rule.WIDEN})
)
def test_a_widened_family_has_an_input_that_16_bit_gets_wrong(reason: str) -> None:
    op = evidence_for(reason)
    assert max(relative_error(op, f16), relative_error(op, bf16)) > 1e-2
    assert relative_error(op, f32) < 1e-4


@pytest.mark.parametrize(
    "call",
    [
        lambda x: torch.ops.aten.avg_pool2d.default(x, [300, 300]),
        lambda x: torch.ops.aten._adaptive_avg_pool2d.default(x, [1, 1]),
        lambda x: torch.ops.aten.adaptive_avg_pool2d.default(x, [1, 1]),
    ],
)
@pytest.mark.parametrize("dtype", [f16, bf16], ids=str)
def test_an_average_pool_that_follows_adds_in_float32(call: Any, dtype: torch.dtype) -> None:
    x = torch.full((1, 1, 300, 300), 300.0, dtype=dtype)
    assert call(x).item() == 300.0


def test_lean_keeps_batch_norm_uncast_and_torch_runs_it_with_mixed_dtypes() -> None:
    # A cast would copy the running averages, and their update would be lost.
    assert rule_for("lean", "aten.batch_norm.default").rule is Rule.FOLLOW  # type: ignore[union-attr]
    mean, variance = torch.zeros(2), torch.ones(2)
    x = torch.randn(8, 2, dtype=bf16)
    out = torch.batch_norm(x, torch.ones(2), torch.zeros(2), mean, variance, True, 0.1, 1e-5, False)
    assert out.dtype is bf16
    assert mean.abs().sum() > 0


@pytest.mark.parametrize("op", [op for op in LEAN if LEAN[op].rule is Rule.LOWER])
def test_lean_lowers_only_what_default_keeps_wide(op: str) -> None:
    assert rule_for("default", op).rule in (Rule.WIDEN, Rule.FOLLOW)  # type: ignore[union-attr]


PROMOTED_CALLS: dict[str, Any] = {
    "lerp.Scalar": lambda a, b: torch.ops.aten.lerp.Scalar(a, b, 0.5),
    "meshgrid.indexing": lambda a, b: torch.ops.aten.meshgrid.indexing([a, b], indexing="ij"),
    "isclose.default": torch.ops.aten.isclose.default,
    "dot.default": torch.ops.aten.dot.default,
    "masked_scatter.default": lambda a, b: torch.ops.aten.masked_scatter(a, a > 9, b),
    "scatter.src": lambda a, b: torch.ops.aten.scatter(a, 0, torch.zeros(2).long(), b),
    "index_put.default": lambda a, b: torch.ops.aten.index_put(a, [torch.arange(2)], b),
    "index_copy.default": lambda a, b: torch.ops.aten.index_copy(a, 0, torch.arange(2), b),
}


@pytest.mark.parametrize("op", PROMOTED_CALLS)
def test_what_torch_does_not_promote_itself_has_a_rule_that_casts(op: str) -> None:
    with pytest.raises((RuntimeError, IndexError)):
        PROMOTED_CALLS[op](torch.ones(2, dtype=bf16), torch.ones(2))
    assert rule_for("default", f"aten.{op}").rule in CASTING  # type: ignore[union-attr]


def test_the_shared_rows_are_in_every_preset_unless_it_has_its_own() -> None:
    own = {"lean": {**DEFAULT, **LEAN}, "default": DEFAULT}
    for name, preset in PRESETS.items():
        for op, row in SHARED.items():
            if op not in own.get(name, {}):
                assert preset[op] == row or op in DEFAULT


def test_moving_data_never_has_a_casting_rule_in_the_shared_rows() -> None:
    assert {SHARED[op].rule for op in MOVES_DATA} == {Rule.FOLLOW}
