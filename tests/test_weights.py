"""The 16-bit copies of parameters: kept as long as they are right, and no longer."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mpgraph
from mpgraph.weights import WeightCopies

bf16 = torch.bfloat16


@pytest.fixture
def copies():
    return WeightCopies()


@pytest.fixture
def weight():
    return nn.Parameter(torch.randn(8, 8))


def is_kept(copies, weight, change):
    """Whether the copy is the same object after ``change``; it is the right one in any case."""
    before = copies.get(weight, bf16)
    change()
    after = copies.get(weight, bf16)
    assert torch.equal(after, weight.detach().to(bf16))
    return after is before


def test_a_copy_is_kept_while_nothing_changes(copies, weight):
    assert is_kept(copies, weight, lambda: None)


def test_a_copy_leads_back_to_the_parameter(copies, weight):
    copies.get(weight, bf16).sum().backward()
    assert weight.grad.dtype is torch.float32
    assert weight.grad.eq(1).all()


def test_two_dtypes_are_two_copies(copies, weight):
    assert copies.get(weight, bf16).dtype is bf16
    assert copies.get(weight, torch.float16).dtype is torch.float16
    assert copies.get(weight, bf16) is copies.get(weight, bf16)


class PlainDescent(torch.optim.Optimizer):
    """As optimizers outside of torch are written: it goes through ``p.data``."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1})

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.data.add_(p.grad.data, alpha=-group["lr"])


class OneElement(PlainDescent):
    """Moves a single element, which no sample may happen to look at."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.data.view(-1)[3] += 1


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd foreach": lambda p: torch.optim.SGD(p, lr=0.1, foreach=True),
    "sgd fused": lambda p: torch.optim.SGD(p, lr=0.1, fused=True),
    "adamw loop": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=False),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "data": PlainDescent,
    "one element": OneElement,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_of_any_optimizer_makes_a_new_copy(copies, weight, name):
    optimizer = OPTIMIZERS[name]([weight])
    weight.grad = torch.ones_like(weight)
    assert not is_kept(copies, weight, optimizer.step)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_with_kept_copies_equals_training_under_autocast(name):
    def train(convert):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        used = mpgraph.convert(model, "bf16", policy="autocast-cpu") if convert else model
        optimizer = OPTIMIZERS[name](model.parameters())
        for _ in range(3):
            for _ in range(2):  # two micro-batches
                x = torch.randn(4, 8)
                with torch.autocast("cpu", bf16, enabled=not convert):
                    y = used(x)
                F.mse_loss(y.float(), x).backward()
            optimizer.step()
            optimizer.zero_grad()
        return [p.detach() for p in model.parameters()]

    for ours, theirs in zip(train(True), train(False), strict=True):
        assert torch.equal(ours, theirs)


def load(module, value):
    module.load_state_dict({"weight": torch.full((8, 8), value)})


CHANGES = {
    "in place under no_grad": lambda p: no_grad(lambda: p.mul_(2)),
    "one element in place": lambda p: no_grad(lambda: p[0, 3].add_(1)),
    "detach": lambda p: p.detach().mul_(2),
    "copy_ to data": lambda p: p.data.copy_(torch.full((8, 8), 3.0)),
    "data in place": lambda p: p.data.mul_(2),
    "another data": lambda p: setattr(p, "data", torch.full((8, 8), 3.0)),
    "another data that differs in one element": lambda p: setattr(p, "data", nudged(p)),
    "nn.init": lambda p: nn.init.ones_(p),
    "numpy": lambda p: p.detach().numpy().fill(3.0),
}


def nudged(weight):
    values = weight.detach().clone()
    values[0, 3] += 1
    return values


def no_grad(run):
    with torch.no_grad():
        run()


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_the_values_makes_a_new_copy(copies, weight, name):
    assert not is_kept(copies, weight, lambda: CHANGES[name](weight))


def test_loading_a_state_dict_makes_a_new_copy(copies):
    module = nn.Linear(8, 8, bias=False)
    assert not is_kept(copies, module.weight, lambda: load(module, 3.0))


def test_swapping_averaged_weights_in_and_out_is_noticed(copies, weight):
    average, own = torch.full((8, 8), 3.0), weight.detach().clone()
    assert not is_kept(copies, weight, lambda: weight.data.copy_(average))
    assert not is_kept(copies, weight, lambda: weight.data.copy_(own))


def test_memory_that_was_freed_and_used_again_is_noticed(copies, weight):
    def replace():
        weight.data = torch.empty(0)
        weight.data = torch.randn(8, 8)

    assert not is_kept(copies, weight, replace)


def test_freezing_and_thawing_make_new_copies(copies, weight):
    assert not is_kept(copies, weight, lambda: weight.requires_grad_(False))
    assert not copies.get(weight, bf16).requires_grad
    assert not is_kept(copies, weight, lambda: weight.requires_grad_(True))
    assert copies.get(weight, bf16).requires_grad


def test_a_copy_made_without_gradients_is_not_used_with_them(copies, weight):
    with torch.no_grad():
        assert not copies.get(weight, bf16).requires_grad
    assert copies.get(weight, bf16).requires_grad
    with torch.no_grad():
        assert not copies.get(weight, bf16).requires_grad


def test_a_copy_made_in_inference_mode_is_not_kept(copies, weight):
    with torch.inference_mode():
        assert copies.get(weight, bf16).is_inference()
    with torch.no_grad():
        assert not copies.get(weight, bf16).is_inference()
    assert not copies.get(weight, bf16).is_inference()
    copies.get(weight, bf16).sum().backward()
    with torch.inference_mode():
        assert torch.equal(copies.get(weight, bf16), weight.to(bf16))


def test_clear_forgets_everything(copies, weight):
    assert not is_kept(copies, weight, copies.clear)


def test_another_parameter_at_the_same_address_is_noticed(copies):
    for value in range(20):
        weight = nn.Parameter(torch.full((8, 8), float(value)))
        assert copies.get(weight, bf16)[0, 0].item() == value
        del weight
        gc.collect()


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(()),
        lambda: torch.randn(1),
        lambda: torch.randn(0, 3),
        lambda: torch.randn(3, 5).T,
        lambda: torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        lambda: torch.full((8, 8), float("nan")),
    ],
    ids=["scalar", "one", "empty", "transposed", "channels_last", "nan"],
)
def test_parameters_of_any_shape_have_copies(copies, make):
    weight = nn.Parameter(make())
    first = copies.get(weight, bf16)
    torch.testing.assert_close(first, weight.detach().to(bf16), rtol=0, atol=0, equal_nan=True)
    assert first.shape == weight.shape
    with torch.no_grad():
        weight.fill_(1)
    assert copies.get(weight, bf16).eq(1).all()


def test_gradients_add_up_as_without_a_cache(copies, weight):
    cached, plain = weight, nn.Parameter(weight.detach().clone())
    for _ in range(5):  # five micro-batches, five backward passes through one copy
        x = torch.randn(4, 8).to(bf16)
        F.linear(x, copies.get(cached, bf16)).sin().sum().backward()
        F.linear(x, plain.to(bf16)).sin().sum().backward()
        assert torch.equal(cached.grad, plain.grad)
    assert len(copies._copies) == 1


def test_two_backward_passes_go_through_one_copy(copies, weight):
    one, two = copies.get(weight, bf16).sin().sum(), copies.get(weight, bf16).cos().sum()
    one.backward()
    two.backward()
    one = copies.get(weight, bf16).sin().sum()
    one.backward(retain_graph=True)
    one.backward()


def test_gradients_of_gradients_pass_through_a_copy(copies, weight):
    (grad,) = torch.autograd.grad(copies.get(weight, bf16).pow(3).sum(), weight, create_graph=True)
    grad.sum().backward()
    torch.testing.assert_close(weight.grad, 6 * weight.detach(), rtol=0.05, atol=0.05)


def test_hooks_of_the_parameter_see_every_gradient(copies, weight):
    seen = []
    weight.register_hook(lambda g: seen.append(g.dtype))
    for _ in range(2):
        copies.get(weight, bf16).sum().backward()
    assert seen == [torch.float32] * 2


def test_a_copied_model_has_a_cache_of_its_own(copies, weight):
    copies.get(weight, bf16)
    assert copy.deepcopy(copies)._copies == {}
    assert pickle.loads(pickle.dumps(copies))._copies == {}


def test_a_cache_dies_with_its_model():
    model = mpgraph.convert(nn.Linear(8, 8), "bf16")
    model(torch.ones(2, 8)).sum().backward()
    died = weakref.ref(model)
    weights = weakref.ref(model._mpgraph.weights)
    del model
    gc.collect()
    assert died() is None
    assert weights() is None


def test_a_converted_model_casts_a_weight_once_for_all_micro_batches():
    model = mpgraph.convert(nn.Linear(8, 8), "bf16")
    model(torch.ones(2, 8)).sum().backward()
    kept = dict(model._mpgraph.weights._copies)
    assert len(kept) == 2
    for _ in range(3):
        model(torch.ones(2, 8)).sum().backward()
    assert all(model._mpgraph.weights._copies[key] is entry for key, entry in kept.items())
    assert model.weight.grad.eq(8).all()
