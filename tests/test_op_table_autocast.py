"""The presets ``autocast-cpu`` and ``autocast-cuda`` against the torch that is installed.

Every listed operator is called under torch.autocast, on fake tensors, so that CUDA's list is
checked without CUDA too: what is cast first is what torch.autocast casts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mpgraph import op_rows_autocast
from mpgraph.op_rows_default import COMPOSITES, DEFAULT
from mpgraph.op_rows_shared import SHARED
from mpgraph.op_rule import OpRule
from mpgraph.op_table import PRESETS, Rule, rule_for

bf16, f32, f64 = torch.bfloat16, torch.float32, torch.float64

TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])
same_torch = pytest.mark.skipif(TORCH != (2, 13), reason="the table's names are torch 2.13's")

AUTOCAST = {"cpu": "autocast-cpu", "cuda": "autocast-cuda"}
CASTING = (Rule.LOWER, Rule.WIDEN, Rule.PROMOTE)


def operator(op: str) -> Any:
    """The installed torch's operator, or None."""
    _, name, overload = op.split(".")
    return getattr(getattr(torch.ops.aten, name, None), overload, None)


def known_operators() -> Iterator[tuple[str, Any]]:
    """Every aten overload that Python can call, but for those on named dimensions."""
    for qualified in torch._C._dispatch_get_all_op_names():
        if qualified.startswith("aten::"):
            name, _, overload = qualified.removeprefix("aten::").partition(".")
            op = f"aten.{name}.{overload or 'default'}"
            found = operator(op)
            # The schema does not tell: it prints a name as a str.
            if found is not None and "name" not in overload.lower():
                yield op, found


KNOWN = dict(known_operators())


def is_composite(op: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(
        KNOWN[op].name(), "CompositeImplicitAutograd"
    )


# --- torch.autocast's lists ----------------------------------------------------------------

LISTED = {
    "cpu": op_rows_autocast.AUTOCAST_CPU,
    "cuda": {
        op: row
        for op, row in op_rows_autocast.AUTOCAST_CUDA.items()
        if op not in op_rows_autocast.CUDA_BUILDS_ONLY or torch.version.cuda
    },
}
SINCE = op_rows_autocast.SINCE


@pytest.mark.parametrize(("device", "key"), [("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")])
def test_the_listed_operators_are_those_of_the_dispatcher(device: str, key: str) -> None:
    live = set()
    for qualified in torch._C._dispatch_get_registrations_for_dispatch_key(key):
        name, _, overload = qualified.removeprefix("aten::").partition(".")
        live.add(f"aten.{name}.{overload or 'default'}")
    live &= KNOWN.keys()
    ours = {op for op in LISTED[device] if SINCE.get(op, (0, 0)) <= TORCH}
    assert {"only in torch": live - ours, "only in the table": ours - live} == {
        "only in torch": set(),
        "only in the table": set(),
    }


@pytest.mark.parametrize("device", AUTOCAST)
def test_an_autocast_preset_casts_only_what_is_listed(device: str) -> None:
    preset = PRESETS[AUTOCAST[device]]
    unlisted = {*op_rows_autocast.CUDA_BUILDS_ONLY, *op_rows_autocast.CUDA_RECURRENT}
    cast = {op for op, row in preset.items() if row.rule in (*CASTING, Rule.REFUSE)}
    assert cast - unlisted <= set(LISTED[device])
    assert {op for op in LISTED[device] if SINCE.get(op, (0, 0)) <= TORCH} <= cast


class Casts(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own method
    """Records which floating dtypes are cast to: before the first other operator, and in all."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own method
        self.first: set[torch.dtype] = set()
        self.all: set[torch.dtype] = set()
        self.operator_ran = False
        self.result: Any = None
        self.error: Exception | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.ops.aten._to_copy.default:
            self.operator_ran |= func.namespace == "aten"
        elif kwargs["dtype"].is_floating_point:
            self.all.add(kwargs["dtype"])
            if not self.operator_ran:
                self.first.add(kwargs["dtype"])
        return func(*args, **kwargs)


@contextmanager
def autocast(device: str) -> Iterator[None]:
    """torch.autocast to bfloat16, also for fake CUDA tensors on a machine without CUDA."""
    was_on = torch.is_autocast_enabled(device)
    was_dtype = torch.get_autocast_dtype(device)
    torch.set_autocast_enabled(device, True)
    torch.set_autocast_dtype(device, bf16)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device, was_on)
        torch.set_autocast_dtype(device, was_dtype)
        torch.clear_autocast_cache()


def some_value(kind: str, tensor: Callable[[], torch.Tensor]) -> Any:
    """Some value of a schema type. It need not fit: the casts come before the checks."""
    if kind in ("Tensor", "Optional[Tensor]"):
        return tensor()
    if kind in ("List[Tensor]", "List[Optional[Tensor]]"):
        return [tensor(), tensor()]
    if kind.startswith("List["):
        return [1]
    return {"bool": False, "str": "ij,jk->ik", "float": 0.5}.get(kind, 1)


def build(value: Any, device: str, dtype: torch.dtype) -> Any:
    """Call what makes a tensor; pass on everything else."""
    if isinstance(value, list):
        return [build(v, device, dtype) for v in value]
    return value(device, dtype) if callable(value) else value


def casts_of(op: str, device: str, *dtypes: torch.dtype, **given: Any) -> Casts:
    """Call ``op`` under torch.autocast with tensors of ``dtypes``, in turn."""
    turn = itertools.cycle(dtypes)

    def tensor() -> torch.Tensor:
        return torch.ones(2, 2, device=device, dtype=next(turn))

    with FakeTensorMode():
        kwargs = {
            a.name: some_value(str(a.type), tensor)
            for a in KNOWN[op]._schema.arguments
            if not a.has_default_value()
        }
        kwargs |= {name: build(value, device, dtypes[0]) for name, value in given.items()}
        casts = Casts()
        with autocast(device), casts:
            try:
                casts.result = KNOWN[op](**kwargs)
            except Exception as error:  # wrong shapes: what torch.autocast casts, it has cast
                casts.error = error
    return casts


def listed(device: str, wanted: Callable[[OpRule], bool]) -> list[Any]:
    return [
        pytest.param(device, op, id=f"{device}-{op}")
        for op, row in LISTED[device].items()
        if wanted(row) and op in KNOWN and SINCE.get(op, (0, 0)) <= TORCH
    ]


def on_both(wanted: Callable[[OpRule], bool]) -> pytest.MarkDecorator:
    params = [param for device in AUTOCAST for param in listed(device, wanted)]
    return pytest.mark.parametrize(("device", "op"), params)


SDPA = "aten.scaled_dot_product_attention.default"


@on_both(lambda row: row.rule is Rule.LOWER and row.dtype is None)
def test_autocast_lowers_what_the_preset_lowers(device: str, op: str) -> None:
    if op == SDPA:  # what opens it here casts too, for reasons of its own
        assert casts_of(op, device, f32).result.dtype is bf16
        return
    assert casts_of(op, device, f32).first == {bf16}
    assert casts_of(op, device, bf16).first == set()
    assert casts_of(op, device, f64).first == set()


@on_both(lambda row: row.rule is Rule.WIDEN and not row.set_dtype and not row.append_dtype)
def test_autocast_widens_what_the_preset_widens(device: str, op: str) -> None:
    assert casts_of(op, device, bf16).first == {f32}
    assert casts_of(op, device, f32).first == set()
    assert casts_of(op, device, f64).first == set()


@on_both(lambda row: row.set_dtype)
def test_autocast_sets_dtype_where_the_preset_does(device: str, op: str) -> None:
    assert casts_of(op, device, bf16).result.dtype is f32
    assert casts_of(op, device, f64).result.dtype is f64
    told = casts_of(op, device, bf16, dtype=bf16)
    assert told.result.dtype is bf16
    assert told.first == set()


@on_both(lambda row: row.append_dtype)
def test_autocast_appends_dtype_where_the_preset_does(device: str, op: str) -> None:
    casts = casts_of(op, device, bf16)
    assert casts.result.dtype is f32
    assert casts.first == set()


@on_both(lambda row: row.rule is Rule.PROMOTE)
def test_autocast_promotes_what_the_preset_promotes(device: str, op: str) -> None:
    assert casts_of(op, device, bf16, f32).first == {f32}
    assert casts_of(op, device, bf16).first == set()
    assert casts_of(op, device, f32).first == set()


@on_both(lambda row: row.rule is Rule.REFUSE)
def test_autocast_bans_what_the_preset_refuses(device: str, op: str) -> None:
    assert "unsafe to autocast" in str(casts_of(op, device, f32).error)


# --- composites without a row of their own -------------------------------------------------

OPENED = (
    "einsum tensordot lstm.input lstm.data gru.input gru.data rnn_tanh.input rnn_tanh.data "
    "rnn_relu.input rnn_relu.data pad concat concatenate hstack vstack inner"
).split()


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", OPENED)
def test_composites_that_hide_a_cast_have_no_row(preset: str, name: str) -> None:
    op = name if "." in name else f"{name}.default"
    if (preset, name) in {("autocast-cuda", "einsum"), ("autocast-cuda", "tensordot")}:
        assert rule_for(preset, f"aten.{op}") is not None  # torch.autocast lists them itself
    elif preset != "autocast-cpu" and name.startswith(("lstm", "gru", "rnn")):
        assert rule_for(preset, f"aten.{op}").rule is Rule.LOWER  # whole: not unrolled over time
    else:
        assert rule_for(preset, f"aten.{op}") is None


@same_torch
def test_the_composites_of_the_default_preset_are_known() -> None:
    assert {op for op in DEFAULT if is_composite(op) and op not in SHARED} == COMPOSITES


@pytest.mark.parametrize("device", AUTOCAST)
def test_a_composite_that_torch_autocast_opens_has_no_row(device: str) -> None:
    op = {"cpu": "aten.lstm_cell.default", "cuda": "aten.cross_entropy_loss.default"}[device]
    assert rule_for(AUTOCAST[device], op) is None


def long(*shape: int) -> Callable[[str, torch.dtype], torch.Tensor]:
    return lambda device, dtype: torch.zeros(shape, device=device, dtype=torch.long)


def mask(*shape: int) -> Callable[[str, torch.dtype], torch.Tensor]:
    return lambda device, dtype: torch.ones(shape, device=device, dtype=torch.bool)


def full(*shape: int) -> Callable[[str, torch.dtype], torch.Tensor]:
    return lambda device, dtype: torch.ones(shape, device=device, dtype=dtype)


_IMAGE, _STATS = full(1, 2, 4, 4), full(2)
_NORM = {"input": full(2, 2), "running_mean": _STATS, "running_var": _STATS, "training": True}
_BAG = {"weight": full(3, 2), "indices": long(4), "offsets": long(2)}
_MODE = {"rounding_mode": "floor"}

# Arguments for composites that refuse the generic ones.
EXAMPLES: dict[str, dict[str, Any]] = {
    "reshape": {"shape": [4]},
    "narrow.Tensor": {"start": long()},
    "broadcast_to": {"size": [2, 2]},
    "unflatten.int": {"sizes": [1, 2]},
    "split.sizes": {"split_size": [1, 1]},
    "meshgrid": {"tensors": [full(2), full(3)]},
    "meshgrid.indexing": {"tensors": [full(2), full(3)], "indexing": "ij"},
    "repeat_interleave.self_Tensor": {"repeats": long(2), "output_size": 4, "dim": 0},
    "native_channel_shuffle": {"self": _IMAGE},
    "take_along_dim": {"indices": long(2, 2), "dim": 0},
    "clip": {"max": 1},
    "clip.Tensor": {"max": full(2, 2)},
    "max_pool2d": {"self": _IMAGE, "kernel_size": [2, 2]},
    "max_pool3d": {"self": full(1, 2, 4, 4, 4), "kernel_size": [2, 2, 2]},
    "adaptive_avg_pool2d": {"self": _IMAGE, "output_size": [2, 2]},
    "adaptive_avg_pool3d": {"self": full(1, 2, 4, 4, 4), "output_size": [2, 2, 2]},
    "divide.Tensor_mode": _MODE,
    "divide.Scalar_mode": _MODE,
    "where.Scalar": {"condition": mask(2, 2)},
    "where.ScalarSelf": {"condition": mask(2, 2)},
    "where.ScalarOther": {"condition": mask(2, 2)},
    "to.device": {"device": "meta", "dtype": f32},
    "layer_norm": {"normalized_shape": [2], "weight": _STATS, "bias": _STATS},
    "rms_norm": {"normalized_shape": [2], "weight": _STATS},
    "batch_norm": {**_NORM, "weight": _STATS, "bias": _STATS},
    "_batch_norm_impl_index": {**_NORM, "weight": _STATS, "bias": _STATS},
    "cross": {"self": full(3), "other": full(3)},
    "embedding_bag": _BAG,
    "embedding_bag.padding_idx": {**_BAG, "scale_grad_by_freq": False, "mode": 0, "sparse": False,
                                  "per_sample_weights": None, "padding_idx": None},
    "outer": {"self": full(2), "vec2": full(2)},
}  # fmt: skip
for _name, _sides in {"linear1d": 1, "bilinear2d": 2, "trilinear3d": 3, "bicubic2d": 2,
                      "bilinear2d_aa": 2, "bicubic2d_aa": 2, "nearest1d": 1, "nearest2d": 2,
                      "nearest3d": 3, "nearest_exact1d": 1, "nearest_exact2d": 2,
                      "nearest_exact3d": 3}.items():  # fmt: skip
    _underscore = "_" if "_" in _name else ""
    EXAMPLES[f"{_underscore}upsample_{_name}.vec"] = {
        "input": full(1, 2, *[4] * _sides),
        "output_size": [8] * _sides,
        "scale_factors": None,
    }

# These compute no floating-point tensor, or need values that a fake tensor does not have.
NO_EXAMPLE = {
    "aten._pad_packed_sequence.default",
    "aten._shape_as_tensor.default",
    "aten.argwhere.default",
    "aten.imag.default",
    "aten.is_nonzero.default",
    "aten.item.default",
    "aten.narrow.Tensor",
    "aten.nonzero_numpy.default",
    "aten.one_hot.default",
    "aten.pin_memory.default",
    "aten.where.default",
}
# These cast, but not because of torch.autocast.
CASTS_BY_ITSELF = {"aten._fused_rms_norm.default", "aten.rms_norm.default"}
# These ask the CUDA runtime which kernel to take, even for fake tensors.
ASKS_CUDA = {"aten.batch_norm.default", "aten._batch_norm_impl_index.default"}


def uncast_composites(device: str) -> list[str]:
    return [
        op
        for op, row in PRESETS[AUTOCAST[device]].items()
        if row.rule is Rule.FOLLOW
        and op in KNOWN
        and is_composite(op)
        and op not in NO_EXAMPLE | CASTS_BY_ITSELF
        and not (device == "cuda" and op in ASKS_CUDA and not torch.cuda.is_available())
    ]


@same_torch
@pytest.mark.parametrize(
    ("device", "op"), [(device, op) for device in AUTOCAST for op in uncast_composites(device)]
)
def test_nothing_inside_a_composite_with_a_follow_row_is_cast(device: str, op: str) -> None:
    example = EXAMPLES.get(op.removeprefix("aten.").removesuffix(".default"), {})
    for dtype in (f32, bf16):
        casts = casts_of(op, device, dtype, **example)
        assert casts.error is None
        assert casts.all <= {f32} if op == "aten.to.device" else casts.all == set()
