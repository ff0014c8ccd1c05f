"""What torch.export drops without a word is noticed, and the other engine keeps it.

Every model here trains two steps under eager ``torch.autocast`` and two steps converted; outputs,
loss, gradients, inputs, buffers, attributes and random states must be the same to the bit.
"""

from __future__ import annotations

import contextlib
import copy
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import mpgraph
from mpgraph import CaptureError
from mpgraph.capture import miscounts
from mpgraph.capture.modes import switches_kept

pytest.importorskip("numpy")
from tests.zoo.check import check_case
from tests.zoo.compare import Verdict
from tests.zoo.registry import Call, Case, call
from tests.zoo.subject import converter

WIDTH = 8


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Holder:
    def __init__(self) -> None:
        self.scale = torch.ones(WIDTH)
        self.count = 0


class Layers(nn.Module):
    """Three layers, a weight and some Python state; ``body`` is its forward."""

    def __init__(self, body: Callable[..., Any]) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.w = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.listed = [torch.ones(WIDTH)]
        self.named = {"scale": torch.ones(WIDTH)}
        self.holder = Holder()
        self.stray = [nn.Parameter(torch.randn(WIDTH))]  # registered nowhere
        self.body = body

    def forward(self, *args: Any) -> Any:
        return self.body(self, *args)


def rows(batch: int) -> Call:
    return call(torch.randn(batch + 2, WIDTH, requires_grad=True))


def heads(batch: int) -> Call:
    return call(torch.randn(batch + 1, 2, 6, WIDTH, requires_grad=True))


def verdict(body: Callable[..., Any], capture: str, inputs: Callable[[int], Call] = rows) -> str:
    case = Case(body.__name__, lambda: Layers(body), inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outcome = check_case(
            case, lambda m: mpgraph.convert(m, "bf16", policy="autocast-cpu", capture=capture)
        )
    if outcome.verdict is Verdict.BITWISE:
        return f"bitwise by {outcome.facts.engine}"
    return f"{outcome.verdict}: {outcome.cause}"


def no_grad_around_cond(m, x):
    h = m.a(x)
    with torch.no_grad():
        y = torch.cond(h.sum() > 0, torch.sin, torch.cos, (h,))
    return m.c(y + x)


def no_grad_around_a_cond_with_layers(m, x):
    h = m.a(x)
    with torch.no_grad():
        y = torch.cond(h.sum() > 0, m.b, lambda t: m.b(t * 2), (h,))
    return m.c(y.float() + x)


def no_grad_around_while_loop(m, x):
    h = m.a(x).float()
    with torch.no_grad():
        state = (torch.tensor(0), h)
        _, y = torch.while_loop(lambda i, t: i < 3, lambda i, t: (i + 1, t.sin()), state)
    return m.c(y + x)


def no_grad_around_scan(m, x):
    from torch._higher_order_ops.scan import scan

    h = m.a(x).float()
    with torch.no_grad():
        _, y = scan(lambda c, v: (c + v, (c * v).clone()), torch.zeros(WIDTH), h)
    return m.c(y + x)


def no_grad_around_map(m, x):
    from torch._higher_order_ops.map import map as map_rows

    h = m.a(x).float()
    with torch.no_grad():
        y = map_rows(torch.sin, h)
    return m.c(y + x)


def no_autocast_around_cond(m, x):
    h = m.a(x)
    with torch.autocast("cpu", enabled=False):
        operands = (h.detach().float(), m.w.detach())
        y = torch.cond((x > 9).any(), lambda t, w: (t @ w).sin(), lambda t, w: t @ w, operands)
    return m.c(y + h)


def inference_mode(m, x):
    with torch.inference_mode():
        y = m.b(m.a(x)).clone()
    return m.c(x) + y.clone()


def seeds_inside_fork_rng(m, x):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        y = F.dropout(m.a(x), 0.5)
    return F.dropout(m.c(y), 0.3)


def fork_rng_alone(m, x):
    with torch.random.fork_rng(devices=[]):
        y = F.dropout(m.a(x), 0.5)
    return F.dropout(m.c(y), 0.3)


def sets_random_state(m, x):
    state = torch.get_rng_state()
    y = F.dropout(m.a(x), 0.5)
    torch.set_rng_state(state)
    return F.dropout(m.c(y), 0.5)


def seeds_alone(m, x):
    torch.manual_seed(5)
    return m.c(x) * torch.rand(())


def seeds_the_default_generator(m, x):
    torch.default_generator.manual_seed(11)
    return F.dropout(m.c(x), 0.3)


def reads_the_seed(m, x):
    return m.c(x) * (1 + torch.initial_seed() % 7)


def saved_tensors_hooks(m, x):
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t * 2, lambda t: t):
        y = m.a(x).sin()
    return m.c(y)


def save_on_cpu(m, x):
    with torch.autograd.graph.save_on_cpu():
        y = m.a(x).sin()
    return m.c(y)


def checkpoint_with_other_random_numbers(m, x):
    def part(v):
        return F.dropout(m.a(v), 0.4).sin()

    return m.c(checkpoint(part, x, use_reentrant=False, preserve_rng_state=False))


def reentrant_checkpoint(m, x):
    return m.c(m.b(x) + checkpoint(lambda u, v: m.a(u).sin() + v, x, x * 2, use_reentrant=True))


def deterministic_algorithms(m, x):
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    y = torch.zeros(WIDTH, WIDTH).index_add(0, torch.arange(x.shape[0]) % 3, m.a(x).float())
    torch.use_deterministic_algorithms(before)
    return m.c(y)


def attention_kernel(m, x):
    with sdpa_kernel(SDPBackend.MATH):
        y = F.scaled_dot_product_attention(m.a(x), m.b(x), m.c(x))
    return m.c(F.scaled_dot_product_attention(y, y, y))


def vmap_over_rows(m, x):
    return m.c(torch.func.vmap(lambda v: m.a(v).sin())(x))


def vmap_over_weights(m, x):
    return m.c(torch.func.vmap(lambda v: x @ v)(m.w.view(2, WIDTH, -1)[:, :, :1]).sum(0) + x)


def jvp(m, x):
    y, tangent = torch.func.jvp(lambda v: m.a(v).sin(), (x,), (torch.ones_like(x),))
    return m.c(y) + tangent


def vjp(m, x):
    y, pull = torch.func.vjp(lambda v: m.a(v).sin(), x)
    z = m.b(y).relu()
    return m.c(y) + pull(z)[0] + pull(torch.ones_like(y))[0]


def forward_mode(m, x):
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        y, tangent = torch.autograd.forward_ad.unpack_dual(m.a(dual).sin())
    return m.c(y) + tangent


def replaces_in_a_list(m, x):
    y = m.c(m.a(x) * m.listed[0])
    m.listed[0] = m.listed[0] * 2
    return y


def replaces_in_a_dict(m, x):
    y = m.c(m.a(x) * m.named["scale"])
    m.named["scale"] = m.named["scale"] * 2
    return y


def replaces_in_an_object(m, x):
    y = m.c(m.a(x) * m.holder.scale)
    m.holder.scale = m.holder.scale * 2
    return y


def counts_in_an_object(m, x):
    m.holder.count += 1
    return m.c(m.a(x) * m.holder.count)


def parameter_in_a_list(m, x):
    return m.c(m.a(x) * m.stray[0])


def freezes_for_a_moment(m, x):
    m.a.weight.requires_grad_(False)
    y = m.a(x)
    m.a.weight.requires_grad = True
    return m.c(y)


class DoublesSines(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        return result * 2 if func is torch.ops.aten.sin.default else result


def dispatch_mode(m, x):
    with DoublesSines():
        y = m.a(x).sin()
    return m.c(y)


LOST = [
    (freezes_for_a_moment, "what requires_grad of the parameters is"),
    (dispatch_mode, "the dispatch mode DoublesSines is not traced"),
    (parameter_in_a_list, "registered on no module would lose its gradient"),
    (no_grad_around_cond, "loses no_grad around cond"),
    (no_grad_around_a_cond_with_layers, "loses no_grad around cond"),
    (no_grad_around_while_loop, "loses no_grad around while_loop"),
    (no_grad_around_scan, "loses no_grad around scan"),
    (no_grad_around_map, "loses no_grad around map"),
    (inference_mode, "the gradient mode around aten"),
    (seeds_inside_fork_rng, "seeds or sets torch's random numbers"),
    (fork_rng_alone, "seeds or sets torch's random numbers"),
    (sets_random_state, "seeds or sets torch's random numbers"),
    (seeds_alone, "seeds or sets torch's random numbers"),
    (seeds_the_default_generator, "seeds or sets torch's random numbers"),
    (reads_the_seed, "seeds or sets torch's random numbers"),
    (saved_tensors_hooks, "saved_tensors_hooks acts on saved tensors"),
    (save_on_cpu, "save_on_cpu acts on saved tensors"),
    (checkpoint_with_other_random_numbers, "a checkpoint"),
    (deterministic_algorithms, "a switch of torch's own"),
    (vmap_over_rows, "a function transform such as vmap"),
    (vmap_over_weights, "a function transform such as vmap"),
    (jvp, "a function transform such as vmap"),
    (vjp, "torch.autograd.grad inside forward"),
    (forward_mode, "a function transform such as vmap"),
    (replaces_in_a_list, "forward changes what is held by 'listed'"),
    (replaces_in_a_dict, "forward changes what is held by 'named'"),
    (replaces_in_an_object, "forward changes what is held by 'holder'"),
    (counts_in_an_object, "forward changes what is held by 'holder'"),
]


@pytest.mark.parametrize(("body", "reason"), LOST, ids=lambda v: getattr(v, "__name__", ""))
def test_what_export_would_lose_is_refused_by_it_and_carried_by_dynamo(body, reason):
    by_export = verdict(body, "export")
    assert by_export.startswith("refused")
    assert reason in by_export
    assert verdict(body, "auto") == "bitwise by dynamo"


def test_the_choice_of_an_attention_kernel_is_kept():
    assert "a switch of torch's own" in verdict(attention_kernel, "export", heads)
    assert verdict(attention_kernel, "auto", heads) == "bitwise by dynamo"


def test_a_reentrant_checkpoint_without_a_gradient_to_hand_on_gives_its_layers_none():
    def without_gradients(batch: int) -> Call:
        return call(torch.randn(batch + 2, WIDTH))

    for inputs in (rows, without_gradients):
        assert verdict(reentrant_checkpoint, "auto", inputs) == "bitwise by dynamo"


def test_a_refusal_names_the_users_line():
    model = mpgraph.convert(Layers(no_grad_around_cond), "bf16", capture="export")
    with pytest.raises(CaptureError, match=r"test_capture_sound\.py:\d+: y = torch\.cond"):
        model(torch.randn(4, WIDTH))


def enable_grad_inside_no_grad(m, x):
    with torch.no_grad():
        y = m.b(m.a(x))
        with torch.enable_grad():
            z = m.c(m.a(x))
    return y + z


def switches_gradients_by_calls(m, x):
    h = m.a(x)
    torch.set_grad_enabled(False)
    y = m.b(h)
    torch.set_grad_enabled(True)
    return m.c(h) + y


def cond_without_a_gradient(m, x):
    h = m.a(x)
    y = torch.cond(h.sum() > 0, torch.sin, torch.cos, (h.detach(),))
    return m.c(y + x)


def makes_a_leaf(m, x):
    return m.b(m.a(x).detach().requires_grad_()) + m.c(x)


def detaches_in_place(m, x):
    h = m.a(x)
    h.detach_()
    return m.b(h) + m.c(x)


def vmap_over_integers(m, x):
    mask = torch.func.vmap(lambda i: torch.arange(WIDTH) <= i)(torch.arange(x.shape[0]))
    return m.c(m.a(x).masked_fill(mask, 0.0))


KEPT = [
    no_autocast_around_cond,
    enable_grad_inside_no_grad,
    switches_gradients_by_calls,
    cond_without_a_gradient,
    makes_a_leaf,
    detaches_in_place,
    vmap_over_integers,
]


@pytest.mark.parametrize("body", KEPT, ids=lambda v: v.__name__)
def test_what_export_keeps_is_left_to_it(body):
    assert verdict(body, "auto") == "bitwise by export"


def test_a_trace_leaves_torchs_switches_as_they_were():
    before = torch._C._get_flash_sdp_enabled(), torch.are_deterministic_algorithms_enabled()
    for body, inputs in ((attention_kernel, heads), (deterministic_algorithms, rows)):
        verdict(body, "dynamo", inputs)
    with switches_kept():
        torch._C._set_sdp_use_flash(False)
        torch.use_deterministic_algorithms(True)
    after = torch._C._get_flash_sdp_enabled(), torch.are_deterministic_algorithms_enabled()
    assert after == before


def test_a_failed_capture_puts_back_what_objects_held():
    def grows_and_branches(m, x):
        m.holder.count += 1
        m.holder.extra = m.a(x)
        return m.b(x) if m.holder.extra.sum() > 0 else m.c(x)

    model = mpgraph.convert(Layers(grows_and_branches), "bf16", capture="export")
    with pytest.raises(CaptureError):
        model(torch.randn(4, WIDTH))
    assert vars(model.holder).keys() == {"scale", "count"}
    assert model.holder.count == 0


class Cache:
    """Empty at first, as a key-value cache is, and so without a tensor; with caches inside."""

    def __init__(self, inner: list[Any] | None = None) -> None:
        self.inner = inner or []
        self.value: Any = None
        self.count = 0


def test_what_a_failed_capture_put_into_an_argument_is_taken_out_again():
    def fills(m, x, cache):
        part = cache.inner[0].inner[0]
        part.value = m.a(x) if part.value is None else part.value + m.a(x)
        part.count += 1
        return m.c(part.value)

    model = mpgraph.convert(Layers(fills), "bf16", policy="autocast-cpu")
    x, cache = torch.randn(4, WIDTH), Cache([Cache([Cache()])])
    with pytest.warns(UserWarning, match="changes a container or an object among its arguments"):
        first = model(x, cache)
    part = cache.inner[0].inner[0]
    assert part.count == 1
    assert type(part.value) is torch.Tensor
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(first, model.c(model.a(x)))


def test_a_counter_in_an_argument_without_tensors_is_noticed():
    def counts(m, x, cache):
        cache.count += 1
        return m.c(x) * cache.count

    model = mpgraph.convert(Layers(counts), "bf16", capture="export")
    with pytest.raises(CaptureError, match="changes a container or an object among its arguments"):
        model(torch.randn(4, WIDTH), Cache())


COUNTED = {"calls": 0}
calls = 0


class CountsInAGlobal(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        global calls
        calls += 1
        return super().forward(x) * calls


class CountsInAGlobalDict(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        COUNTED["calls"] += 1
        return super().forward(x) * COUNTED["calls"]


class CountsInAClassAttribute(nn.Linear):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        CountsInAClassAttribute.calls += 1
        return super().forward(x) * CountsInAClassAttribute.calls


class CountsInADefault(nn.Linear):
    def forward(self, x: Tensor, seen: list[int] = []) -> Tensor:  # noqa: B006
        seen.append(1)
        return super().forward(x) * len(seen)


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (CountsInAGlobal, "forward changes calls"),
        (CountsInAGlobalDict, "held by 'COUNTED'"),
        (CountsInAClassAttribute, "forward changes CountsInAClassAttribute.calls"),
        (CountsInADefault, "held by 'a default argument of CountsInADefault.forward'"),
    ],
)
def test_what_forward_counts_outside_of_the_model_is_counted_at_every_call(kind, what):
    model, x = kind(WIDTH, WIDTH), torch.randn(4, WIDTH)
    if miscounts.MISCOUNTS and kind is CountsInADefault:
        what = what.removeprefix("held by '").removesuffix("'")
    with pytest.raises(CaptureError, match=re.escape(what)):
        mpgraph.convert(model, "bf16", capture="export")(x)
    converted = mpgraph.convert(model, "bf16")
    if miscounts.MISCOUNTS and kind in (CountsInAClassAttribute, CountsInADefault):
        with pytest.raises(CaptureError, match=r"Dynamo in torch 2\.\d"):
            converted(x)
        return
    with pytest.warns(UserWarning, match=re.escape(what)):
        got = [converted(x) for _ in range(3)]
    # The failed captures have left no trace: this is the first call that counts.
    plain = F.linear(x.bfloat16(), model.weight.bfloat16(), model.bias.bfloat16())
    for count, output in enumerate(got, start=1):
        assert torch.equal(output, plain * count)


@pytest.mark.parametrize(
    ("kind", "capture"),
    [
        (CountsInAClassAttribute, "dynamo"),
        (CountsInADefault, "auto"),
        (CountsInAGlobal, "dynamo"),
    ],
)
def test_where_dynamo_miscounts_it_is_refused(kind, capture, monkeypatch):
    monkeypatch.setattr(miscounts, "MISCOUNTS", True)
    converted = mpgraph.convert(kind(WIDTH, WIDTH), "bf16", capture=capture)
    if kind is CountsInAGlobal:
        converted(torch.randn(4, WIDTH))
        return
    with pytest.raises(CaptureError, match=f"forward changes .*{kind.__name__}.*reads it once"):
        converted(torch.randn(4, WIDTH))


LIMIT = 2.0


class ReadsClassAndGlobal(nn.Linear):
    scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(max=LIMIT) * self.scale


@pytest.mark.parametrize("capture", ["export", "dynamo"])
def test_a_changed_class_attribute_or_global_is_seen_by_the_next_call(capture, monkeypatch):
    model = mpgraph.convert(ReadsClassAndGlobal(WIDTH, WIDTH), "fp32", capture=capture)
    x = torch.randn(4, WIDTH)
    plain = F.linear(x, model.weight, model.bias)
    assert torch.equal(model(x), plain.clamp(max=2.0))
    monkeypatch.setattr(ReadsClassAndGlobal, "scale", 3.0)
    assert torch.equal(model(x), plain.clamp(max=2.0) * 3)
    monkeypatch.setitem(globals(), "LIMIT", 0.0)
    assert torch.equal(model(x), plain.clamp(max=0.0) * 3)


def test_a_replaced_forward_of_an_inner_class_is_seen_by_the_next_call(monkeypatch):
    class Inner(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    model = mpgraph.convert(nn.Sequential(Inner(WIDTH, WIDTH)), "fp32", capture="export")
    x = torch.randn(4, WIDTH)
    first = model(x)
    monkeypatch.setattr(Inner, "forward", lambda self, x: 2 * nn.Linear.forward(self, x))
    assert torch.equal(model(x), 2 * first)


def asserts_and_recovers(m, x):
    try:
        assert x.sum() > 1e9
    except AssertionError:
        return m.b(x)
    return m.a(x)


def test_an_assert_on_data_that_forward_catches_goes_its_own_way():
    assert verdict(asserts_and_recovers, "auto") == "bitwise by dynamo"


def tries_and_recovers(m, x):
    try:
        return m.a(x[:, :3])
    except RuntimeError:
        return m.b(x)


@torch.compiler.disable
def tries_in_eager_mode(m, x):
    return tries_and_recovers(m, x)


def reads_a_list_of_tensors(m, x):
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[[x.argmax(-1)[0] // 2, torch.tensor(3)], [torch.tensor(1), torch.tensor(2)]] = False
    return m.b(m.a(x)) * mask.sum()


def test_an_operator_that_cannot_be_traced_runs_in_eager_mode():
    assert verdict(reads_a_list_of_tensors, "auto") == "bitwise by dynamo"


def test_an_operator_that_forward_lets_fail_runs_in_eager_mode():
    assert verdict(tries_and_recovers, "auto") == "bitwise by dynamo"
    assert verdict(lambda m, x: m.c(tries_in_eager_mode(m, x)), "auto").startswith("bitwise")


def test_the_gradient_of_a_parameter_in_a_list_is_that_of_autocast():
    torch.manual_seed(0)
    model, x = Layers(parameter_in_a_list), torch.randn(4, WIDTH)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
    expected.float().sum().backward()
    want, model.stray[0].grad = model.stray[0].grad, None
    with pytest.warns(UserWarning, match="registered on no module"):
        mpgraph.convert(model, "bf16", policy="autocast-cpu")(x).float().sum().backward()
    assert torch.equal(model.stray[0].grad, want)


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


class Scripted(nn.Module):
    """TorchScript widens the product by itself, because autocast is on; plain torch would not."""

    def __init__(self, part: str) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        made: dict[str, Callable[[], Any]] = {
            "function": lambda: torch.jit.script(swish),
            "module": lambda: torch.jit.script(nn.Linear(WIDTH, WIDTH)),
            "traced": lambda: torch.jit.trace(nn.Linear(WIDTH, WIDTH), torch.ones(1, WIDTH)),
        }
        self.part = made[part]()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.layer(x)
        return self.part(hidden)


def loss_and_gradient(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    result = model(x)
    (gradient,) = torch.autograd.grad(result.float().sum(), model.layer.weight)
    return result, gradient


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("part", ["function", "module", "traced"])
def test_torchscript_runs_in_its_own_runtime(part):
    torch.manual_seed(0)
    model, x = Scripted(part), torch.randn(4, WIDTH)
    with pytest.raises(CaptureError, match="what TorchScript casts"):
        mpgraph.convert(model, "bf16", capture="export")(x)
    for _ in range(4):  # the runtime makes other kernels of a function that it has seen run
        with torch.autocast("cpu", torch.bfloat16):
            expected, wanted = loss_and_gradient(model, x)
    converted = mpgraph.convert(model, "bf16", policy="autocast-cpu")
    with pytest.warns(UserWarning, match="what TorchScript casts"):
        result, gradient = loss_and_gradient(converted, x)
    assert result.dtype is expected.dtype
    assert torch.equal(result, expected)
    assert torch.equal(gradient, wanted)
    assert "linear" in mpgraph.text(converted)


@pytest.mark.parametrize("capture", ["export", "dynamo"])
def test_a_hook_that_is_added_or_removed_is_seen_by_the_next_call(capture):
    model = mpgraph.convert(nn.Sequential(nn.Linear(WIDTH, WIDTH)), "fp32", capture=capture)
    x = torch.randn(4, WIDTH)
    first = model(x)
    hook = model[0].register_forward_hook(lambda module, inputs, output: output * 2)
    assert torch.equal(model(x), 2 * first)
    hook.remove()
    assert torch.equal(model(x), first)


class Config:
    def __init__(self) -> None:
        self.kind: str | None = None
        self.calls = 0


class SetsDefault(nn.Module):
    """As transformers does with ``config.problem_type``: the first call decides, for good."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.config = Config()

    def forward(self, x: Tensor) -> Tensor:
        if self.config.kind is None:
            self.config.kind = "regression"
        return self.layer(x).relu()


class TakesAnotherPathFirst(SetsDefault):
    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        if self.config.kind is None:
            self.config.kind = "regression"
            y = y * 2
        return y


class CountsCalls(SetsDefault):
    def forward(self, x: Tensor) -> Tensor:
        self.config.calls += 1
        return self.layer(x) * self.config.calls


def test_a_default_that_the_first_call_sets_in_a_config_is_carried_by_export():
    model = mpgraph.convert(SetsDefault(), "bf16", capture="export")
    model(torch.randn(2, 8))
    assert model.config.kind == "regression"


@pytest.mark.parametrize("kind", [TakesAnotherPathFirst, CountsCalls])
def test_a_config_that_makes_the_first_call_another_is_not_frozen(kind: type[nn.Module]):
    torch.manual_seed(0)
    source = kind()
    x = torch.randn(2, 8)
    eager = copy.deepcopy(source)
    with pytest.raises(mpgraph.CaptureError, match=r"held by 'config'"):
        mpgraph.convert(copy.deepcopy(source), "bf16", capture="export")(x)
    converted = mpgraph.convert(source, "bf16", policy="autocast-cpu")
    with pytest.warns(UserWarning, match=r"held by 'config'"):
        got = [converted(x)]
    got += [converted(x), converted(x)]
    for result in got:
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(result, eager(x))


@pytest.mark.parametrize("capture", ["auto", "dynamo"])
def test_a_hook_on_a_node_of_autograds_graph_is_kept(capture: str):
    def hooked(self: Layers, x: Tensor) -> Tensor:
        y = self.a(x).tanh()
        if y.grad_fn is not None:
            y.grad_fn.register_prehook(lambda gradients: (gradients[0] * 2,))
        return self.b(y)

    case = Case("hooked", lambda: Layers(hooked), rows)
    outcome = check_case(case, converter(capture, "bf16", "autocast-cpu"))
    assert outcome.verdict is Verdict.BITWISE, outcome.cause


def test_export_refuses_a_hook_on_a_node_of_autograds_graph():
    def hooked(self: Layers, x: Tensor) -> Tensor:
        y = self.a(x).tanh()
        y.grad_fn.register_hook(lambda *_: None)
        return y

    model = mpgraph.convert(Layers(hooked), "bf16", capture="export")
    with pytest.raises(CaptureError, match="grad_fn"):
        model(torch.randn(2, WIDTH))


class Makes(OrderedDict[str, Any]):
    """As transformers' ACT2FN: every look-up makes a new object, and some fail."""

    def __getitem__(self, key: str) -> Any:
        made = super().__getitem__(key)
        return made()


def _fails() -> None:
    raise RuntimeError("this one cannot be made")


ACTIVATIONS = Makes(tanh=nn.Tanh, relu=nn.ReLU, other=_fails)


class LooksUp(nn.Module):
    def __init__(self, fails: bool) -> None:
        super().__init__()
        self.layer, self.fails, self.table = nn.Linear(8, 8), fails, ACTIVATIONS

    def forward(self, x: Tensor) -> Tensor:
        y = ACTIVATIONS["tanh"](self.layer(x))
        return y * 2 if self.fails and y.sum() > 0 else y


@pytest.mark.parametrize("fails", [False, True])
def test_a_global_table_with_methods_of_its_own_is_neither_called_nor_changed(fails: bool):
    before = dict(dict.items(ACTIVATIONS))
    model = mpgraph.convert(LooksUp(fails), "bf16", capture="export")
    with pytest.raises(CaptureError) if fails else contextlib.nullcontext():
        model(torch.randn(2, 8))
    assert dict(dict.items(ACTIVATIONS)) == before
    assert list(ACTIVATIONS) == list(before)


def per_sample_gradients(model: nn.Module, x: Tensor, autocast: bool) -> dict[str, Tensor]:
    """As torch's tutorial does it: ``vmap`` of ``grad`` of a call with other parameters."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            result = torch.func.functional_call(model, parameters, (row.unsqueeze(0),))
        return result.float().square().sum()

    return torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)


def test_a_function_transform_around_the_model_runs_it_in_eager_mode():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()), torch.randn(4, WIDTH)
    expected = per_sample_gradients(model, x, autocast=True)
    converted = mpgraph.convert(model, "bf16", policy="autocast-cpu")
    with pytest.warns(UserWarning, match=r"around the call: such calls run in eager mode"):
        result = per_sample_gradients(converted, x, autocast=False)
    assert all(torch.equal(result[name], expected[name]) for name in expected)
    converted(x)
    assert "linear" in mpgraph.text(converted), "other calls have a graph as before"
    torch.func.vmap(converted)(x)
    with pytest.raises(CaptureError, match=r"a function transform such as torch.func.vmap"):
        torch.func.vmap(mpgraph.convert(model, "bf16", capture="export"))(x)


def test_other_tensors_in_the_place_of_parameters_are_named_and_get_their_gradients():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()), torch.randn(4, WIDTH)
    given = {name: p.detach().requires_grad_() for name, p in model.named_parameters()}

    def gradients(model: nn.Module) -> tuple[Tensor, ...]:
        halves = {name: p * 0.5 for name, p in given.items()}
        out = torch.func.functional_call(model, halves, (x,))
        return torch.autograd.grad(out.float().square().sum(), list(given.values()))

    with torch.autocast("cpu", torch.bfloat16):
        expected = gradients(model)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        result = gradients(mpgraph.convert(model, "bf16", policy="autocast-cpu"))
    (warning,) = said
    assert "its parameter 0.weight is another tensor" in str(warning.message)
    assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


class Branches(nn.Module):
    """Three ways: two by size, which export takes apart, and one by data, for Dynamo."""

    def __init__(self, on_data: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.on_data = on_data

    def forward(self, x: Tensor) -> Tensor:
        if len(x) % 2 or (self.on_data and x.sum() > 0):
            return self.b(self.a(x))
        return self.a(self.b(x))


def gradients_of(model: nn.Module, x: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    loss = model(x).float().square().sum()
    return [*torch.autograd.grad(loss, parameters)]


@pytest.mark.parametrize("on_data", [False, True])
def test_threads_that_call_a_model_while_another_captures_it_read_its_parameters(on_data):
    torch.manual_seed(0)
    model = Branches(on_data)
    # The test's own list: while a thread captures, another finds stand-ins in their places.
    parameters = list(model.parameters())
    inputs = [torch.randn(2 + i % 3, WIDTH) for i in range(8)]
    with torch.autocast("cpu", torch.bfloat16):
        expected = [gradients_of(model, x, parameters) for x in inputs]
    converted = mpgraph.convert(model, "bf16", policy="autocast-cpu")
    with warnings.catch_warnings(), ThreadPoolExecutor(4) as threads:
        warnings.simplefilter("ignore")
        results = list(threads.map(lambda x: gradients_of(converted, x, parameters), inputs))
    for result, wanted in zip(results, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(result, wanted, strict=True))
    assert all(isinstance(p, nn.Parameter) for p in converted.parameters())


class WritesToTensors(nn.Module):
    """Running sums in tensors that are no buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.plain = torch.zeros(WIDTH)
        self.listed = [torch.zeros(WIDTH)]
        self.holder = Holder()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.layer(x)
        self.plain.add_(1)
        self.listed[0][2:].mul_(2).add_(1)
        torch._foreach_add_([self.holder.scale], 3.0)
        return hidden + self.plain + self.listed[0] + self.holder.scale


@pytest.mark.parametrize("capture", ["export", "dynamo"])
def test_a_trace_does_not_write_to_the_models_tensors(capture):
    torch.manual_seed(0)
    model, x = WritesToTensors(), torch.randn(4, WIDTH)
    converted = mpgraph.convert(
        copy.deepcopy(model), "bf16", policy="autocast-cpu", capture=capture
    )
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            expected = model(x)
        assert torch.equal(converted(x), expected)
    assert torch.equal(converted.plain, torch.full((WIDTH,), 3.0))


@pytest.mark.filterwarnings("ignore:mpgraph:UserWarning")
@pytest.mark.parametrize("capture", ["auto", "dynamo"])
def test_a_hook_that_keeps_what_it_sees_keeps_it_at_every_call(capture):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())
    converted = mpgraph.convert(model, "bf16", policy="autocast-cpu", capture=capture)
    kept: list[Tensor] = []
    named: dict[str, Tensor] = {}
    converted[0].register_forward_hook(lambda module, inputs, output: kept.append(output))
    converted[1].register_forward_pre_hook(lambda module, inputs: named.update(last=inputs[0]))
    for count in range(1, 4):
        x = torch.randn(4, WIDTH)
        converted(x)
        with torch.autocast("cpu", torch.bfloat16):
            expected = model[0](x)
        assert len(kept) == count
        assert torch.equal(kept[-1], expected)
        assert torch.equal(named["last"], expected)


def test_a_hook_on_every_module_and_one_in_the_place_of_another_are_seen_by_the_next_call():
    model = mpgraph.convert(nn.Sequential(nn.Linear(WIDTH, WIDTH)), "fp32")
    x = torch.randn(4, WIDTH)
    first = model(x)
    for factor in (2, 3):
        hook = model[0].register_forward_hook(lambda m, i, output, f=factor: output * f)
        assert torch.equal(model(x), factor * first)
        hook.remove()
    everywhere = nn.modules.module.register_module_forward_hook(
        lambda module, inputs, output: output * 5 if isinstance(module, nn.Linear) else None
    )
    try:
        assert torch.equal(model(x), 5 * first)
    finally:
        everywhere.remove()
    assert torch.equal(model(x), first)


@pytest.mark.parametrize("capture", ["export", "dynamo"])
def test_a_checkpoint_around_the_model_does_not_count_what_a_capture_saves(capture):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()), torch.randn(4, WIDTH)
    converted = mpgraph.convert(model, "bf16", policy="autocast-cpu", capture=capture)
    result = checkpoint(converted, x, use_reentrant=False)
    got = torch.autograd.grad(result.float().sum(), model[0].weight)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
    assert torch.equal(result, expected)
    wanted = torch.autograd.grad(expected.float().sum(), model[0].weight)
    assert torch.equal(got[0], wanted[0])
