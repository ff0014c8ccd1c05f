"""The zoo's comparison: what is equal passes, and every planted difference is caught."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from tests.zoo import check, compare
from tests.zoo.check import check_case
from tests.zoo.compare import Verdict, compare_row
from tests.zoo.registry import Case, all_cases, call, training_loss
from tests.zoo.subject import converter, under_autocast
from tests.zoo.values import leaves


class Small(nn.Module):
    """Has all that a comparison looks at: a buffer, a counter, dropout, an unused parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)
        self.unused = nn.Parameter(torch.ones(3))
        self.register_buffer("mean", torch.zeros(8))
        self.calls = 0

    def forward(self, x: Tensor) -> dict[str, Any]:
        self.calls += 1
        y = F.dropout(self.a(x), 0.2)
        with torch.no_grad():
            self.mean.add_(y.float().mean(0))
        return {"logits": self.b(y), "top": y.argmax(-1), "none": None}


CASE = Case("small", Small, lambda b: call(torch.randn(b, 8, requires_grad=True)))


def verdict_of(change: Callable[[nn.Module], nn.Module], case: Case = CASE) -> check.Outcome:
    return check_case(case, lambda model: change(under_autocast(model)))


def altered_output(alter: Callable[[Any], Any]) -> Callable[[nn.Module], nn.Module]:
    def change(model: nn.Module) -> nn.Module:
        forward = model.forward
        model.forward = lambda *args, **kwargs: alter(forward(*args, **kwargs))
        return model

    return change


def altered_gradient(name: str, alter: Callable[[Tensor], Any]) -> Callable[..., nn.Module]:
    def change(model: nn.Module) -> nn.Module:
        dict(model.named_parameters())[name].register_post_accumulate_grad_hook(
            lambda p: setattr(p, "grad", alter(p.grad))
        )
        return model

    return change


def test_eager_autocast_equals_itself_in_every_row() -> None:
    outcome = verdict_of(lambda model: model)
    assert outcome.verdict is Verdict.BITWISE, outcome
    assert outcome.casts == outcome.autocast_casts > 0


def test_float32_in_place_of_autocast_is_wrong_by_dtype() -> None:
    outcome = check_case(CASE, lambda model: model)
    assert outcome.verdict is Verdict.WRONG
    assert outcome.cause.startswith("output.logits: dtype float32 instead of bfloat16")


def test_float32_behind_an_output_of_the_right_dtype_is_close_and_not_bitwise() -> None:
    case = dataclasses.replace(
        CASE, model=lambda: nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Softmax(-1))
    )

    def in_float32(model: nn.Module) -> nn.Module:
        return altered_output(lambda out: out.bfloat16())(model)

    outcome = check_case(case, in_float32)
    assert outcome.verdict is Verdict.CLOSE, outcome
    assert 0 < outcome.worst_relative < 0.05


def test_a_dropped_gradient_is_wrong() -> None:
    outcome = verdict_of(altered_gradient("a.weight", lambda g: None))
    assert outcome.verdict is Verdict.WRONG
    assert outcome.cause.startswith("gradient a.weight: None instead of a tensor")


def test_a_gradient_of_zeros_is_wrong() -> None:
    outcome = verdict_of(altered_gradient("b.bias", torch.zeros_like))
    assert outcome.verdict is Verdict.WRONG
    assert outcome.cause.startswith("gradient b.bias: max abs")


def test_a_gradient_of_the_wrong_scale_is_wrong() -> None:
    outcome = verdict_of(altered_gradient("a.weight", lambda g: g * 2))
    assert outcome.verdict is Verdict.WRONG


def test_one_bit_in_one_gradient_is_close_and_named() -> None:
    def flip(gradient: Tensor) -> Tensor:
        gradient.view(-1)[3:4].view(torch.int32).add_(1)
        return gradient

    outcome = verdict_of(altered_gradient("a.weight", flip))
    assert outcome.verdict is Verdict.CLOSE
    assert outcome.cause.startswith("gradient a.weight: max abs")
    assert "1 of" in outcome.cause


def test_a_gradient_where_eager_has_none_is_close_if_zero_and_wrong_if_not() -> None:
    for value, verdict in ((0.0, Verdict.CLOSE), (1.0, Verdict.WRONG)):

        def give(model: nn.Module, value: float = value) -> nn.Module:
            unused = model.get_parameter("unused")
            model.b.weight.register_post_accumulate_grad_hook(
                lambda p: setattr(unused, "grad", torch.full((3,), value))
            )
            return model

        assert verdict_of(give).verdict is verdict


@pytest.mark.parametrize(
    ("alter", "cause"),
    [
        (lambda o: {**o, "logits": o["logits"].float()}, "output.logits: dtype"),
        (lambda o: {**o, "logits": o["logits"][:, :3]}, "output.logits: shape"),
        (lambda o: {**o, "none": 0}, "output.none: 0 instead of None"),
        (lambda o: tuple(o.values()), "output<class>: 'tuple' instead of 'dict'"),
        (lambda o: {"logits": o["logits"], "none": None}, "output.top: missing"),
        (lambda o: {**o, "more": o["top"]}, "output.more: not in the reference"),
        (lambda o: {**o, "top": o["top"] + 1}, "output.top: max abs"),
        (lambda o: {**o, "top": o["top"].int()}, "output.top: dtype"),
    ],
)
def test_another_structure_dtype_or_shape_of_the_outputs_is_wrong(
    alter: Callable[[Any], Any], cause: str
) -> None:
    outcome = verdict_of(altered_output(alter))
    assert outcome.verdict is Verdict.WRONG
    assert outcome.cause.startswith(cause)


def test_a_buffer_that_stays_behind_is_caught() -> None:
    outcome = verdict_of(altered_output(lambda o: o), CASE)
    assert outcome.verdict is Verdict.BITWISE

    def freeze(model: nn.Module) -> nn.Module:
        plain = model.forward

        def forward(x: Tensor) -> Any:
            mean = model.mean.clone()
            out = plain(x)
            model.mean.copy_(mean)
            return out

        model.forward = forward
        return model

    outcome = verdict_of(freeze)
    assert outcome.verdict is Verdict.WRONG
    assert outcome.cause.startswith("buffer mean: max abs")


def test_an_attribute_that_a_graph_would_freeze_is_caught() -> None:
    def freeze(model: nn.Module) -> nn.Module:
        return altered_output(lambda o: (setattr(model, "calls", 1), o)[1])(model)

    outcome = verdict_of(freeze)
    assert outcome.verdict is Verdict.WRONG
    assert outcome.cause == "second call: " + outcome.cause.removeprefix("second call: ")
    assert "attribute calls: 1 instead of 2" in outcome.cause


def test_parameters_kept_from_the_first_call_are_found_out_at_the_second() -> None:
    def bake(model: nn.Module) -> nn.Module:
        kept = model.a.weight.detach().clone()
        linear = model.a

        def forward(x: Tensor) -> Tensor:
            return F.linear(x, kept + (linear.weight - linear.weight.detach()), linear.bias)

        linear.forward = forward
        return model

    outcome = verdict_of(bake)
    assert outcome.verdict is not Verdict.BITWISE
    assert outcome.cause.startswith("second call: ")


def test_another_random_stream_is_caught_even_where_no_value_shows_it() -> None:
    outcome = verdict_of(altered_output(lambda o: (torch.rand(1), o)[1]))
    assert outcome.verdict is Verdict.CLOSE
    assert outcome.cause.startswith("generator torch: left in another state")


def test_an_input_gradient_that_is_lost_is_wrong() -> None:
    def detach(model: nn.Module) -> nn.Module:
        forward = model.forward
        model.forward = lambda x: forward(x.detach())
        return model

    outcome = verdict_of(detach)
    assert outcome.verdict is Verdict.WRONG
    assert outcome.cause.startswith("input gradient[0][0]: None instead of a tensor")


def test_a_copy_of_the_parameters_is_wrong() -> None:
    import copy

    outcome = check_case(CASE, lambda model: under_autocast(copy.deepcopy(model)))
    assert outcome.verdict is Verdict.WRONG
    assert outcome.cause.startswith("parameters are not shared: ")


def test_a_refusal_and_a_crash_have_verdicts_of_their_own() -> None:
    class CaptureError(Exception):
        pass

    def fail(error: BaseException) -> Callable[[nn.Module], nn.Module]:
        def change(model: nn.Module) -> nn.Module:
            raise error

        return change

    assert check_case(CASE, fail(CaptureError("why"))).verdict is Verdict.REFUSED
    crash = check_case(CASE, fail(RuntimeError("boom\nmore")))
    assert (crash.verdict, crash.cause) == (Verdict.ERROR, "RuntimeError: boom")


@pytest.mark.parametrize(
    ("outputs", "cause"),
    [
        (lambda y: y.detach(), "ValueError: no output of the model depends on"),
        (lambda y: y / 0, "the loss or a gradient is not finite"),
        (lambda y: y * next(DRAWS), "nondeterministic: output: max abs"),
    ],
)
def test_what_eager_torch_cannot_train_does_not_count(outputs: Any, cause: str) -> None:
    class Odd(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return outputs(super().forward(x))

    case = Case("odd", lambda: Odd(8, 2), lambda b: call(torch.randn(b, 8)))
    outcome = check_case(case, lambda model: under_autocast(model))
    assert outcome.verdict is Verdict.EAGER_FAILS
    assert outcome.cause.startswith(cause)


DRAWS = iter(range(1, 100))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_rows_compare_bits_except_for_the_payload_of_a_nan(dtype: torch.dtype) -> None:
    zeros = torch.zeros(2, dtype=dtype)
    nans = torch.full((2,), float("nan"), dtype=dtype)
    assert compare_row("x", zeros, zeros.clone()) is None
    assert compare_row("x", nans, -nans) is None
    assert compare_row("x", zeros, -zeros) is not None
    assert compare_row("x", zeros, nans) is not None


def test_sparse_and_complex_rows_are_compared_by_value() -> None:
    sparse = torch.eye(3).to_sparse()
    assert compare_row("x", sparse, torch.eye(3).to_sparse()) is None
    assert compare_row("x", sparse, torch.eye(3)) is not None
    assert compare_row("x", torch.ones(2) * 1j, torch.ones(2) * 2j) is not None


def test_leaves_reach_into_containers_objects_and_model_outputs_but_not_into_cycles() -> None:
    class Cache:
        def __init__(self) -> None:
            self.keys, self.owner = torch.ones(1), self

    found = dict(leaves({"a": [torch.ones(2), (None, 3)], "cache": Cache()}))
    assert list(found) == [
        "<class>", ".a<class>", ".a[0]", ".a[1]<class>", ".a[1][0]", ".a[1][1]",
        ".cache<class>", ".cache.keys",
    ]  # fmt: skip


def test_the_loss_is_the_models_own_or_else_the_mean_square_of_its_float_outputs() -> None:
    x = torch.full((4,), 3.0, requires_grad=True)
    assert training_loss({"loss": x.sum(), "logits": x}) == 12
    assert training_loss((x, x, torch.ones(3, dtype=torch.long), None)) == 9


def test_every_case_has_a_name_of_its_own_and_the_sets_have_members() -> None:
    cases = all_cases()
    assert len(cases) >= 90
    assert sum(case.is_quick for case in cases.values()) >= 25
    assert sum("hard" in case.tags for case in cases.values()) >= 20


def test_inputs_and_weights_of_a_case_are_the_same_at_every_build() -> None:
    for name in ("mlp", "lstm", "spectral-norm", "indexing"):
        case = all_cases()[name]
        first, second = (check.build(case).state_dict() for _ in range(2))
        for key, value in first.items():
            assert torch.equal(value, second[key]), (name, key)


def test_the_step_reads_the_gradient_of_this_call_alone() -> None:
    model = nn.Linear(2, 1)
    inputs = call(torch.ones(1, 2))
    readings = [compare.take_step(model, inputs, training_loss, 0) for _ in range(2)]
    assert not compare.compare(*readings).differences
    with contextlib.suppress(KeyError):
        assert torch.equal(readings[0]["gradient weight"], readings[1]["gradient weight"])


class LooksAtTheTracer(nn.Module):
    """Multiplies by the weight in two ways: one while it is traced, one in eager mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(256, 8)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, FakeTensor):
            halves = x.chunk(2, -1), self.layer.weight.chunk(2, -1)
            return sum((a @ w.T for a, w in zip(*halves, strict=True)), self.layer.bias)
        return self.layer(x)


def test_a_model_that_is_traced_on_another_path_is_told_from_one_that_is_rewritten_wrongly() -> (
    None
):
    case = Case("tracer", LooksAtTheTracer, lambda b: call(torch.randn(b, 256)))
    convert = converter("export", "bf16", "autocast-cpu")
    assert check_case(case, convert).cause.startswith(f"{check.ANOTHER_PATH}: ")

    def convert_and_scale(model: nn.Module) -> nn.Module:
        converted = convert(model)
        converted.register_forward_hook(lambda m, args, out: out * 1.01)
        return converted

    wrong = check_case(case, convert_and_scale)
    assert wrong.verdict is not Verdict.BITWISE
    assert check.ANOTHER_PATH not in wrong.cause
