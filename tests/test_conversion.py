"""convert: what stays as it was, what changes, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import io
import pickle
import warnings
from collections import OrderedDict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mpgraph
from mpgraph.module import MixedPrecision, state_of, times

BF16 = torch.bfloat16


class Net(nn.Module):
    """A small model with everything that a conversion must keep."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 16)
        self.norm = nn.BatchNorm1d(16)
        self.head = nn.Linear(16, 4)
        self.register_buffer("scale", torch.ones(4))
        self.label = "a plain attribute"

    def forward(self, x: Tensor, mask: Tensor | None = None, *, gain: float = 1.0) -> Tensor:
        h = F.relu(self.norm(self.inner(x)))
        h = h if mask is None else h * mask
        return self.head(h) * self.scale * gain

    def helper(self, x: Tensor) -> Tensor:
        return self(x) + 1


def eager(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    with torch.autocast("cpu", BF16):
        return model(*args, **kwargs)


def train_step(model: nn.Module, forward: Any, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    out = forward(x)
    out.float().square().mean().backward()
    return out, {n: p.grad.clone() for n, p in model.named_parameters()}


def assert_same_training(model: nn.Module, converted: nn.Module, sizes: tuple[int, ...]) -> None:
    for size in sizes:
        x = torch.randn(size, 8)
        want, want_grads = train_step(model, lambda x: eager(model, x), x)
        got, got_grads = train_step(converted, converted, x)
        assert got.dtype is want.dtype
        assert torch.equal(got, want)
        for name, grad in want_grads.items():
            assert torch.equal(got_grads[name], grad), name


# --- what stays --------------------------------------------------------------------------


def test_the_result_is_of_the_same_class_and_shares_parameters():
    model = Net()
    converted = mpgraph.convert(model, "bf16")
    assert isinstance(converted, Net)
    assert isinstance(converted, MixedPrecision)
    assert all(a is b for a, b in zip(model.parameters(), converted.parameters(), strict=True))
    assert list(converted.state_dict()) == list(model.state_dict())
    assert converted.label == "a plain attribute"
    assert inspect.signature(converted.forward) == inspect.signature(model.forward)


def test_the_model_passed_in_is_left_as_it_was():
    model = Net()
    x = torch.randn(3, 8)
    before = model.eval()(x)
    converted = mpgraph.convert(model, "bf16").train()
    converted(x)
    assert type(model) is Net
    assert not model.training
    assert not model.norm.training
    assert not hasattr(model, "_mpgraph")
    converted.eval()
    assert model(x).dtype is before.dtype


def test_methods_that_call_the_model_go_through_the_graph():
    converted = mpgraph.convert(Net().eval(), "bf16", policy="autocast-cpu")
    x = torch.randn(3, 8)
    assert torch.equal(converted.helper(x), converted(x) + 1)
    assert len(state_of(converted).specialisations()) == 1


def test_inplace_converts_the_model_itself():
    model = Net()
    assert mpgraph.convert(model, "bf16", inplace=True) is model
    assert isinstance(model, MixedPrecision)


def test_training_equals_eager_autocast_for_changing_batch_sizes():
    model = Net()
    reference = copy.deepcopy(model)
    converted = mpgraph.convert(model, "bf16", policy="autocast-cpu")
    assert_same_training(reference, converted, (4, 7, 2))
    for want, got in zip(reference.buffers(), converted.buffers(), strict=True):
        assert torch.equal(want, got)
    assert len(state_of(converted).specialisations()) == 1


def test_a_batch_of_one_after_larger_batches_gets_its_own_graph():
    model = nn.Sequential(nn.Linear(8, 4), nn.Tanh())
    reference = copy.deepcopy(model)
    converted = mpgraph.convert(model, "bf16", policy="autocast-cpu")
    assert_same_training(reference, converted, (4, 1, 5))


def test_train_and_eval_are_told_apart_for_every_module():
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.BatchNorm1d(8))
    converted = mpgraph.convert(model, "bf16", policy="autocast-cpu")
    x = torch.randn(4, 8)
    converted.train()(x)
    converted.eval()
    assert torch.equal(converted(x), converted(x))
    converted.train()
    converted[2].eval()  # a frozen BatchNorm, as detection models have it
    before = converted[2].running_mean.clone()
    converted(x)
    assert torch.equal(converted[2].running_mean, before)
    assert len(state_of(converted).specialisations()) == 3


def test_gradients_off_is_told_apart_too():
    converted = mpgraph.convert(Net().eval(), "bf16")
    x = torch.randn(4, 8)
    with torch.no_grad():
        assert not converted(x).requires_grad
    assert converted(x).requires_grad


def test_dropout_draws_the_numbers_that_eager_mode_draws():
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.3), nn.Linear(8, 8), nn.Dropout(0.3))
    converted = mpgraph.convert(model, "bf16", policy="autocast-cpu")
    x = torch.randn(4, 8)
    for _ in range(3):
        torch.manual_seed(5)
        want = eager(model, x)
        state = torch.get_rng_state()
        torch.manual_seed(5)
        assert torch.equal(converted(x), want)
        assert torch.equal(torch.get_rng_state(), state)


def test_positional_keyword_and_default_arguments_share_a_graph():
    converted = mpgraph.convert(Net(), "bf16")
    x, mask = torch.randn(4, 8), torch.ones(16)
    converted(x, mask)
    converted(x, mask=mask)
    converted(mask=mask, x=x)
    converted(x=x, mask=mask, gain=1.0)
    assert len(state_of(converted).specialisations()) == 1
    converted(x, None)
    converted(x)
    assert len(state_of(converted).specialisations()) == 2


@dataclasses.dataclass
class Result:
    value: Tensor
    extra: dict[str, Any]


class ManyOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, batch: dict[str, Any]) -> Result:
        y = self.layer(batch["x"])
        parts = OrderedDict(nothing=None, pair=(y, [y + 1, "text"]), size=y.shape[0])
        return Result(y, {"parts": parts, "number": 3})


def test_nested_arguments_and_results_keep_their_structure():
    converted = mpgraph.convert(ManyOutputs(), "bf16")
    for size in (4, 6):
        result = converted({"x": torch.randn(size, 8), "unused": None})
        assert isinstance(result, Result)
        parts = result.extra["parts"]
        assert isinstance(parts, OrderedDict)
        assert parts["nothing"] is None
        assert parts["size"] == size
        assert parts["pair"][1][1] == "text"
        assert result.extra["number"] == 3
        assert result.value.shape == (size, 8)


def test_tied_weights_stay_tied_and_get_one_gradient():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(11, 8)
            self.head = nn.Linear(8, 11, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(self.table(ids))

    model = Tied()
    reference = copy.deepcopy(model)
    converted = mpgraph.convert(model, "bf16", policy="autocast-cpu")
    assert converted.head.weight is converted.table.weight
    ids = torch.randint(0, 11, (3, 5))
    eager(reference, ids).float().square().mean().backward()
    converted(ids).float().square().mean().backward()
    assert torch.equal(reference.head.weight.grad, converted.head.weight.grad)


def test_accumulated_steps_equal_eager_autocast_through_an_optimizer():
    model = Net()
    reference = copy.deepcopy(model)
    converted = mpgraph.convert(model, "bf16", policy="autocast-cpu")
    optimizers = [
        torch.optim.AdamW(m.parameters(), lr=0.1, fused=True) for m in (reference, converted)
    ]
    for _ in range(3):
        for _ in range(2):
            x = torch.randn(4, 8)
            eager(reference, x).float().square().mean().backward()
            converted(x).float().square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for want, got in zip(reference.parameters(), converted.parameters(), strict=True):
        assert torch.equal(want, got)


def test_load_state_dict_is_seen_by_the_next_call():
    converted = mpgraph.convert(Net().eval(), "bf16")
    x = torch.randn(4, 8)
    converted(x)
    other = Net().eval()
    converted.load_state_dict({k: v.to(BF16) for k, v in other.state_dict().items()})
    assert converted.inner.weight.dtype is torch.float32
    want = mpgraph.convert(copy.deepcopy(converted), "bf16")(x)
    assert torch.equal(converted(x), want)


def test_a_replaced_submodule_is_seen_by_the_next_call():
    converted = mpgraph.convert(Net(), "bf16")
    x = torch.randn(4, 8)
    assert converted(x).shape == (4, 4)
    converted.head = nn.Linear(16, 6)
    converted.scale = torch.ones(6)
    assert converted(x).shape == (4, 6)


# --- copies and files ----------------------------------------------------------------------


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_of_a_converted_model_is_converted_and_independent(how: str):
    converted = mpgraph.convert(Net(), "bf16", policy="lean")
    x = torch.randn(4, 8)
    want = converted.eval()(x)
    if how == "deepcopy":
        other = copy.deepcopy(converted)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(converted))
    else:
        file = io.BytesIO()
        torch.save(converted, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert isinstance(other, Net)
    assert state_of(other).settings == state_of(converted).settings
    assert torch.equal(other(x), want)
    with torch.no_grad():
        other.inner.weight.zero_()
    assert torch.equal(converted(x), want)


def test_converting_again_starts_from_the_original_class():
    model = Net()
    once = mpgraph.convert(model, "bf16")
    again = mpgraph.convert(once, "fp32")
    assert type(again).__mro__.count(MixedPrecision) == 1
    assert state_of(again).original is Net
    x = torch.randn(4, 8)
    assert again.eval()(x).dtype is torch.float32
    assert torch.equal(again(x), model.eval()(x))


def test_a_slice_of_a_converted_sequential_asks_to_be_converted_and_can_be():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    part = mpgraph.convert(model, "bf16")[:2]
    with pytest.raises(mpgraph.MPGraphError, match="Convert it first"):
        part(torch.ones(2, 8))
    converted = mpgraph.convert(part, "bf16")
    assert type(converted).__bases__[1] is nn.Sequential
    assert converted(torch.ones(2, 8)).dtype is torch.bfloat16


def test_a_graph_module_and_an_exported_program_can_be_converted():
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(4, 8)
    want = eager(model, x)
    traced = torch.fx.symbolic_trace(model)
    assert torch.equal(mpgraph.convert(traced, "bf16", policy="autocast-cpu")(x), want)
    program = torch.export.export(model, (x,))
    assert torch.equal(mpgraph.convert(program, "bf16", policy="autocast-cpu")(x), want)


# --- precisions --------------------------------------------------------------------------


def test_fp32_changes_nothing():
    model = Net()
    reference = copy.deepcopy(model)
    converted = mpgraph.convert(model, "fp32")
    x = torch.randn(4, 8)
    assert torch.equal(converted(x), reference(x))


def test_tf32_is_turned_on_and_said(caplog: pytest.LogCaptureFixture):
    before = torch.get_float32_matmul_precision()
    cudnn = torch.backends.cudnn.allow_tf32
    try:
        mpgraph.convert(Net(), "tf32")
        assert torch.get_float32_matmul_precision() == "high"
        assert "TF32" in caplog.text
    finally:
        torch.set_float32_matmul_precision(before)
        torch.backends.cudnn.allow_tf32 = cudnn


def test_auto_is_bf16_on_the_cpu_and_warns_where_it_is_emulated(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("mpgraph.precision._cpu_has_bf16", lambda: False)
    with pytest.warns(UserWarning, match="emulated"):
        converted = mpgraph.convert(Net(), "auto")
    assert state_of(converted).settings.precision.name == "bf16"
    monkeypatch.setattr("mpgraph.precision._cpu_has_bf16", lambda: True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mpgraph.convert(Net(), "auto")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_dtype_is_a_precision(dtype: torch.dtype):
    converted = mpgraph.convert(nn.Linear(8, 4), dtype)
    assert state_of(converted).settings.precision.compute is dtype


def test_results_of_an_fp16_model_leave_in_fp32():
    converted = mpgraph.convert(nn.Linear(8, 4), "fp16")
    x = torch.randn(2, 8)
    assert converted(x).dtype is torch.float32
    with torch.no_grad():
        assert converted(x).dtype is torch.float32
    assert "linear: fp16" in mpgraph.text(converted)


def test_pure_precision_stores_the_parameters_in_16_bit():
    model = Net()
    converted = mpgraph.convert(model, "bf16-true")
    assert {p.dtype for p in converted.parameters()} == {BF16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    converted(torch.randn(4, 8)).float().sum().backward()
    assert converted.inner.weight.grad.dtype is BF16


def test_pure_precision_updates_running_statistics():
    converted = mpgraph.convert(Net(), "bf16-true").train()
    before = converted.norm.running_mean.clone()
    converted(torch.randn(4, 8))
    assert not torch.equal(converted.norm.running_mean, before)


# --- bad input -----------------------------------------------------------------------------


def test_an_unknown_precision_is_refused_with_the_near_miss():
    with pytest.raises(mpgraph.PrecisionError, match=r"unknown precision 'bf-16'.*mean 'bf16'"):
        mpgraph.convert(Net(), "bf-16")


def test_an_unknown_preset_is_refused_with_the_near_miss():
    with pytest.raises(mpgraph.PolicyError, match="autocast-cpu"):
        mpgraph.convert(Net(), "bf16", policy="autocast_cpu")


def test_an_unknown_engine_is_refused():
    with pytest.raises(mpgraph.PolicyError, match="unknown capture engine 'jit'"):
        mpgraph.convert(Net(), "bf16", capture="jit")


def test_a_16_bit_model_is_refused_with_three_ways_out():
    with pytest.raises(mpgraph.PrecisionError) as caught:
        mpgraph.convert(Net().to(BF16), "bf16")
    message = str(caught.value)
    assert "inner.weight (bf16)" in message
    for way_out in ("dtype=torch.float32", "masters='create'", "'bf16-true'"):
        assert way_out in message


def test_masters_are_created_from_16_bit_parameters_with_a_warning():
    half = Net().to(BF16)
    with pytest.warns(UserWarning, match="rounding had already taken"):
        converted = mpgraph.convert(half, "bf16", masters="create")
    assert {p.dtype for p in converted.parameters()} == {torch.float32}
    assert torch.equal(converted.inner.weight, half.inner.weight.float())
    assert half.inner.weight.dtype is BF16
    converted(torch.randn(4, 8)).float().sum().backward()


def test_a_model_without_floating_parameters_is_refused():
    with pytest.raises(mpgraph.PrecisionError, match="no floating-point parameters"):
        mpgraph.convert(nn.ReLU(), "bf16")


def test_a_meta_model_is_refused():
    with pytest.raises(mpgraph.PrecisionError, match="meta device"):
        mpgraph.convert(Net().to("meta"), "bf16")


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_torchscript_module_is_refused_where_it_would_have_to_change():
    scripted = torch.jit.script(nn.Linear(8, 8))
    with pytest.raises(mpgraph.PrecisionError, match="TorchScript module, whose code"):
        mpgraph.convert(scripted, "bf16")
    with pytest.raises(mpgraph.PrecisionError, match="TorchScript module at '1'"):
        mpgraph.convert(nn.Sequential(nn.Linear(8, 8), scripted), "bf16-true")
    assert scripted.weight.dtype is torch.float32


def test_a_function_is_refused():
    with pytest.raises(mpgraph.PrecisionError, match=r"expected an nn\.Module"):
        mpgraph.convert(lambda x: x, "bf16")  # type: ignore[type-var]


def test_a_missing_argument_is_named():
    converted = mpgraph.convert(Net(), "bf16")
    with pytest.raises(TypeError, match=r"Net\.forward.*missing a required argument: 'x'") as error:
        converted()
    assert isinstance(error.value, mpgraph.MPGraphError)
    with pytest.raises(TypeError, match="unexpected keyword argument 'mistake'"):
        converted(torch.randn(4, 8), mistake=1)


def test_an_argument_of_the_wrong_dtype_is_traced_to_the_line_of_the_model():
    converted = mpgraph.convert(Net(), "bf16")
    with pytest.raises(RuntimeError) as error:
        converted(torch.randn(4, 8, dtype=torch.float64))
    assert any("%linear" in n and "self.inner(x)" in n for n in error.value.__notes__)


def test_a_model_cast_to_16_bit_after_conversion_is_refused():
    converted = mpgraph.convert(Net(), "bf16")
    converted(torch.randn(4, 8))
    converted.to(BF16)
    with pytest.raises(mpgraph.PrecisionError, match=r"'inner\.weight' is now bf16"):
        converted(torch.randn(4, 8))


def test_explain_and_text_of_an_unconverted_model_say_what_to_do():
    with pytest.raises(mpgraph.MPGraphError, match="Convert it first"):
        mpgraph.text(Net())


def test_an_override_that_matches_nothing_is_refused_with_near_misses():
    policy = mpgraph.Policy().pin(module="haed")
    with pytest.raises(mpgraph.PolicyError, match="head"):
        mpgraph.convert(Net(), "bf16", policy=policy, example_inputs=(torch.randn(4, 8),))


def test_kinds_of_call_do_not_grow_without_bound():
    class Repeats(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor, times: int) -> Tensor:
            for _ in range(times):
                x = self.layer(x)
            return x

    converted = mpgraph.convert(Repeats(), "bf16", max_graphs=4)
    x = torch.randn(2, 4)
    converted(x, 1)
    converted(x, 2)
    with pytest.warns(UserWarning, match="captured twice, .* at most 4 are allowed"):
        converted(x, 3)
    converted(x, 4)
    with pytest.raises(mpgraph.CaptureError, match="raise max_graphs"):
        converted(x, 5)


def test_counts_are_said_in_words():
    assert [times(count) for count in (1, 2, 3)] == ["once", "twice", "3 times"]


def test_an_override_that_matches_nothing_can_be_mended_by_what_the_error_says():
    model = nn.Sequential(nn.Linear(8, 8), nn.Identity())
    policy = mpgraph.Policy().pin(module="2").pin(module="1")
    converted = mpgraph.convert(model, "bf16", policy=policy)
    expected = (
        r"there is no module '2'; there are '0', '1'\.\n.*"
        r"module '1' computes nothing in this call\.\n.*model\.named_modules\(\)\.$"
    )
    with pytest.raises(mpgraph.PolicyError, match=expected):
        converted(torch.randn(2, 8))


# --- surroundings ----------------------------------------------------------------------------


def test_an_ambient_autocast_region_changes_nothing_and_is_reported_once():
    model = Net().eval()
    converted = mpgraph.convert(model, "bf16", policy="default")
    x = torch.randn(4, 8)
    want = converted(x)
    with torch.autocast("cpu", torch.float16), pytest.warns(UserWarning, match="changes nothing"):
        assert torch.equal(converted(x), want)
    with torch.autocast("cpu", torch.float16), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(converted(x), want)


def test_a_failing_call_leaves_gradients_enabled():
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor, index: Tensor) -> Tensor:
            with torch.no_grad():
                y = F.embedding(index, self.layer.weight)
            return self.layer(x) + y

    converted = mpgraph.convert(Fails(), "bf16")
    x = torch.randn(3, 4)
    converted(x, torch.zeros(3, dtype=torch.long))
    with pytest.raises(IndexError):
        converted(x, torch.full((3,), 99))
    assert torch.is_grad_enabled()


def test_importing_mpgraph_loads_no_torch():
    import subprocess
    import sys

    code = "import mpgraph, sys; assert 'torch' not in sys.modules; mpgraph.Policy"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_precision_in_capitals_is_not_taken_for_another_one():
    with pytest.raises(mpgraph.PrecisionError, match="Did you mean 'bf16'"):
        mpgraph.convert(nn.Linear(4, 4), "BF16")


def test_a_model_that_is_moved_takes_its_settings_and_its_loss_scale_along(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = mpgraph.convert(nn.Sequential(nn.Linear(2, 2)), "fp16")
    state, moved = state_of(model), []
    state.settings = dataclasses.replace(state.settings, device="cuda")  # as if it had been there
    monkeypatch.setattr(state.scale, "move", lambda device: moved.append(device.type))
    nn.Sequential(model).to("cpu")
    assert state.settings.device == "cpu"
    assert moved
    assert set(moved) == {"cpu"}


def test_a_model_that_was_compiled_in_place_is_converted_as_it_is_and_says_so() -> None:
    """The copy would otherwise go on to run the original's compiled code, in float32."""
    plain = nn.Sequential(nn.Linear(2, 2))
    plain.compile(backend="eager")
    with pytest.warns(UserWarning, match="was compiled by its compile"):
        model = mpgraph.convert(plain, "bf16")
    assert model(torch.ones(1, 2)).dtype is torch.bfloat16
    assert plain(torch.ones(1, 2)).dtype is torch.float32


def test_a_converted_model_that_was_compiled_in_place_can_be_pickled() -> None:
    model = mpgraph.convert(nn.Sequential(nn.Linear(2, 2)), "bf16")
    model.compile(backend="eager")
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(torch.ones(1, 2)), model(torch.ones(1, 2)))
