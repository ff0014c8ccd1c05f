"""16-bit copies made together: the bits of copies made one by one, and gradients of each."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

import mpgraph
from mpgraph import weight_groups
from mpgraph.group_copies import copy_all
from mpgraph.loss_scale import LossScale
from mpgraph.module import state_of

bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32
inf = float("inf")
ENGINES = ("export", "dynamo")


def bits_of(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def scale_of(dtype, scale=2.0**16):
    return torch.tensor(scale) if dtype is f16 else None


def parameters():
    torch.manual_seed(0)
    made = [
        torch.randn(3, 4) * torch.logspace(-10, 6, 4),
        torch.tensor(0.3),
        torch.empty(0, 3),
        torch.randn(5, 3).T,
        torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        torch.randn(6, 6)[:, ::2],
        torch.tensor([inf, -inf, 1e30, -0.0, 70000.0, 1e-45]),
    ]
    return [nn.Parameter(value) for value in made]


class Deep(nn.Module):
    """More layers than a group holds, with all that a group may meet."""

    def __init__(self, layers=20):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(layers))

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x)) + x
        return x


def both_ways(monkeypatch, make, run):
    """What ``run`` gives for a model whose copies are made one by one, and in groups."""
    results = []
    for group in (1, 256):
        monkeypatch.setattr(weight_groups, "GROUP", group)
        torch.manual_seed(0)
        results.append(run(make()))
    return results


def made_by_groups(run):
    """Which multi-tensor casts and single ones ``run`` makes."""
    with torch.profiler.profile() as profile:
        run()
    names = [event.name for event in profile.events()]
    return names.count("aten::_foreach_copy_"), names.count("aten::_to_copy")


# --- The copies ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [bf16, f16])
@pytest.mark.parametrize("gradients", [True, False])
def test_copies_have_the_bits_and_strides_of_copies_made_one_by_one(dtype, gradients):
    with torch.set_grad_enabled(gradients):
        copies = copy_all(parameters(), dtype, scale_of(dtype))
    for copy, p in zip(copies, parameters(), strict=True):
        want = p.detach().to(dtype)
        assert copy.dtype is dtype
        assert copy.stride() == want.stride()
        assert torch.equal(bits_of(copy), bits_of(want))
        assert copy.requires_grad == gradients
        assert not copy._is_view()


@pytest.mark.parametrize("scale", [None, 2.0**-14, 1.0, 2.0**16, 2.0**24])
def test_gradients_have_the_bits_of_gradients_made_one_by_one(scale):
    dtype = bf16 if scale is None else f16
    value = None if scale is None else torch.tensor(scale)
    every_half = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    xs = [nn.Parameter(torch.ones(2**16)), nn.Parameter(torch.ones(4, 2**14)), *parameters()]
    gradients = [every_half, every_half.view(4, -1)]
    gradients += [torch.randn_like(x.detach()).to(dtype) for x in xs[2:]]
    gradients[3] = torch.full((), inf, dtype=dtype)
    got = torch.autograd.grad(copy_all(xs, dtype, value), xs, gradients)
    alone = [copy_all([x], dtype, value)[0] for x in xs]
    for one, other in zip(got, torch.autograd.grad(alone, xs, gradients), strict=True):
        assert one.dtype is f32
        assert torch.equal(bits_of(one), bits_of(other))


@pytest.mark.parametrize("dtype", [bf16, f16])
def test_a_gradient_whose_elements_share_memory_arrives(dtype):
    xs = [nn.Parameter(torch.ones(3, 3)) for _ in range(2)]
    first, second = copy_all(xs, dtype, scale_of(dtype, 8.0))
    (first.sum() + second.sum()).backward()  # expanded
    assert xs[0].grad.eq(1.0 if dtype is bf16 else 0.125).all()


def test_one_kernel_and_one_node_serve_all():
    xs = [nn.Parameter(torch.ones(2)) for _ in range(5)]
    copies = copy_all(xs, f16, torch.tensor(8.0))
    assert len({copy.grad_fn for copy in copies}) == 1
    assert made_by_groups(lambda: copy_all(xs, f16, torch.tensor(8.0))) == (1, 0)
    ones = [torch.ones(2, dtype=f16)] * 5
    assert made_by_groups(lambda: torch.autograd.grad(copies, xs, ones)) == (1, 0)


@pytest.mark.parametrize("dtype", [bf16, f16])
def test_a_parameter_without_a_gradient_keeps_none(dtype):
    xs = [nn.Parameter(torch.ones(2)) for _ in range(3)]
    copies = copy_all(xs, dtype, scale_of(dtype))
    copies[1].sum().backward()
    assert [x.grad is None for x in xs] == [True, False, True]


def test_a_hook_is_called_with_gradients_only():
    xs = [nn.Parameter(torch.ones(2)) for _ in range(3)]
    seen = []
    xs[0].register_hook(lambda g: seen.append(g.dtype))
    copies = copy_all(xs, bf16, None)
    copies[1].sum().backward()
    copies[0].sum().backward()
    assert seen == [f32]


def test_a_frozen_parameter_has_a_frozen_copy():
    xs = [nn.Parameter(torch.ones(2), requires_grad=i != 1) for i in range(3)]
    copies = copy_all(xs, f16, torch.tensor(8.0))
    assert [copy.requires_grad for copy in copies] == [True, False, True]
    (copies[0] * copies[1] + copies[2]).sum().backward()
    assert xs[1].grad is None
    assert copies[0].grad_fn is copies[2].grad_fn


def test_other_dtypes_are_copied_as_ever():
    xs = [nn.Parameter(torch.ones(2, dtype=t)) for t in (torch.float64, f16, f32, f32)]
    copies = copy_all(xs, f16, None)
    assert [c.dtype for c in copies] == [f16] * 4
    assert copies[1] is xs[1]
    sum(c.sum() for c in copies).backward()
    assert [x.grad.dtype for x in xs] == [x.dtype for x in xs]


@pytest.mark.parametrize("dtype", [bf16, f16])
def test_gradients_of_gradients_pass_through_a_group(dtype):
    xs = [nn.Parameter(torch.tensor([0.5, 2.0])) for _ in range(3)]
    copies = copy_all(xs, dtype, scale_of(dtype, 1.0))
    grads = torch.autograd.grad((copies[0] * copies[1] ** 3).sum(), xs[:2], create_graph=True)
    assert all(g.requires_grad for g in grads)
    sum(g.sum() for g in grads).backward()
    # d/dx1 (x1^3 + 3 x0 x1^2) = 3 x1^2 + 6 x0 x1
    assert torch.equal(xs[1].grad, torch.tensor([9 * 0.25, 9 * 4.0]))
    assert xs[2].grad is None


@pytest.mark.parametrize("dtype", [bf16, f16])
def test_several_backward_passes_go_through_a_group(dtype):
    xs = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    copies = copy_all(xs, dtype, scale_of(dtype, 1.0))
    value = (copies[0] * copies[1]).sum()
    value.backward(retain_graph=True)
    value.backward()
    copies[0].sum().backward()
    assert xs[0].grad.tolist() == [3.0, 3.0]
    assert xs[1].grad.tolist() == [2.0, 2.0]


def test_a_scale_changed_in_place_is_refused():
    xs = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    scale = torch.tensor(8.0)
    copies = copy_all(xs, f16, scale)
    scale.mul_(2)
    with pytest.raises(RuntimeError, match=r"modified in place.*Replace it"):
        copies[0].sum().backward()


def test_a_sparse_gradient_stays_sparse():
    table, weight = nn.Parameter(torch.randn(5, 4)), nn.Parameter(torch.ones(4, 4))
    copies = copy_all([table, weight], f16, torch.tensor(8.0))
    rows = F.embedding(torch.tensor([1, 3, 1]), copies[0], sparse=True)
    loss = (rows @ copies[1]).sum()
    assert made_by_groups(loss.backward)[0] == 0  # by the operators that know of sparse tensors
    assert table.grad.is_sparse
    assert table.grad.to_dense()[1].tolist() == [1.0] * 4
    assert weight.grad.layout is torch.strided


@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_what_traces_sees_single_casts(pre_dispatch):
    xs = [torch.ones(2, requires_grad=True) for _ in range(2)]
    scale = torch.tensor(8.0)

    def both(dtype, scale):
        def run(x, y):
            return sum(copy_all([x, y], dtype, scale))

        return [n.target for n in make_fx(run, pre_dispatch=pre_dispatch)(*xs).graph.nodes]

    cast = torch.ops.aten.to.dtype if pre_dispatch else torch.ops.aten._to_copy.default
    assert both(bf16, None).count(cast) == 2
    assert both(f16, scale).count(torch.ops.mpgraph.lower.default) == 2

    def compiled(x, y):
        return sum(copy_all([x, y], f16, scale))

    run = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    assert torch.equal(run(*xs), compiled(*xs))


def test_function_transforms_see_through_it():
    def value(x, y):
        return sum(copy_all([x, y], bf16, None)).sum().float()

    x, y = torch.ones(3), torch.ones(3)
    assert torch.func.grad(value)(x, y).tolist() == [1.0] * 3
    assert torch.func.vmap(value)(torch.ones(2, 3), torch.ones(2, 3)).tolist() == [6.0, 6.0]


def test_tangents_pass_through_copies_to_bf16():
    with forward_ad.dual_level():
        x = forward_ad.make_dual(torch.ones(2), torch.full((2,), 3.0))
        copy, _ = copy_all([x, torch.ones(2)], bf16, None)
        assert forward_ad.unpack_dual(copy).tangent.tolist() == [3.0, 3.0]


# --- Converted models ------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_training_does_not_depend_on_groups(monkeypatch, precision, engine):
    def train(model):
        model = mpgraph.convert(model, precision, capture=engine)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
        if precision == "fp16":
            mpgraph.guard(optimizer, model, scale=LossScale(growth_interval=2))
        for step in range(6):
            for _ in range(2):
                x = torch.randn(3, 4) * (1e6 if step == 4 else 1)
                model(x).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return list(model.parameters())

    for one, other in zip(*both_ways(monkeypatch, Deep, train), strict=True):
        assert torch.equal(bits_of(one), bits_of(other))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_forward_pass_makes_one_cast_of_every_group(precision, engine, monkeypatch):
    monkeypatch.setattr(weight_groups, "BYTES_OF_MANY", 1)
    model = mpgraph.convert(Deep(34), precision, capture=engine)
    x = torch.ones(2, 4)
    model(x)
    state_of(model).weights.clear()
    assert made_by_groups(lambda: model(x))[0] == 3


def test_of_a_group_only_what_has_changed_is_made_again():
    model = mpgraph.convert(Deep(5), "bf16")
    x = torch.ones(2, 4)
    model(x)
    before = {key: kept[2] for key, kept in state_of(model).weights._copies.items()}
    with torch.no_grad():
        model.layers[1].weight.add_(1)
        model.layers[2].weight.add_(1)
    model(x)
    after = {key: kept[2] for key, kept in state_of(model).weights._copies.items()}
    changed = [key[0] for key in after if after[key] is not before[key]]
    assert changed == [id(model.layers[i].weight) for i in (1, 2)]


def test_overflow_stays_infinite():
    model = mpgraph.convert(Deep(3), "fp16")
    (model(torch.ones(2, 4)) * 1e30).sum().backward()
    assert not any(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_come_out_while_the_backward_pass_is_under_way(engine, monkeypatch):
    monkeypatch.setattr(weight_groups, "BYTES_OF_MANY", 1)
    torch.manual_seed(0)
    model = mpgraph.convert(Deep(40), "bf16", capture=engine)
    done = {}

    def note(index):
        done[index] = [layer.weight.grad is None for layer in model.layers]

    for index, layer in enumerate(model.layers):
        layer.weight.register_post_accumulate_grad_hook(lambda _, index=index: note(index))
    model(torch.ones(2, 4)).sum().backward()
    assert all(done[39][:32])  # the last eight are first
    assert all(done[20][:16])
    assert not any(done[0][16:])


def test_gradients_come_out_before_earlier_layers_have_theirs():
    model = mpgraph.convert(Deep(40), "bf16")
    x = torch.ones(2, 4, requires_grad=True)
    order = []
    x.register_hook(lambda g: order.append("input"))
    model.layers[39].weight.register_post_accumulate_grad_hook(lambda p: order.append("last"))
    model(x).sum().backward()
    assert order == ["last", "input"]


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Linear(4, 4, bias=False)
        self.one = nn.Linear(4, 4, bias=False)
        self.two = nn.Linear(4, 4, bias=False)

    def forward(self, x):
        h = torch.tanh(self.trunk(x))
        return self.one(h), self.two(h.detach())


@pytest.mark.parametrize("engine", ENGINES)
def test_the_gradient_of_a_head_leaves_the_trunk_alone(engine):
    model = mpgraph.convert(Heads(), "bf16", capture=engine)
    first, second = model(torch.ones(2, 4))
    torch.autograd.grad(first.sum(), [model.one.weight])
    calls = []
    model.one.weight.register_hook(calls.append)
    second.sum().backward()
    assert calls == []


def test_a_head_is_in_a_group_of_its_own():
    class TwoHeads(Heads):
        def forward(self, x):
            h = torch.tanh(self.trunk(x))
            return self.one(h).sin(), self.two(h).sin()

    model = mpgraph.convert(TwoHeads(), "bf16")
    first, second = model(torch.ones(2, 4))
    # Without retain_graph: the way through the trunk is still there for the other head.
    torch.autograd.grad(first.sum(), [model.one.weight])
    second.sum().backward()
    assert model.trunk.weight.grad is not None


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_parameter_frozen_between_calls_gets_no_gradient(precision):
    model = mpgraph.convert(Deep(4), precision)
    model(torch.ones(2, 4)).sum().backward()
    model.zero_grad()
    model.layers[1].weight.requires_grad_(False)
    model(torch.ones(2, 4)).sum().backward()
    assert [layer.weight.grad is None for layer in model.layers] == [False, True, False, False]


def test_a_gradient_penalty_does_not_depend_on_groups(monkeypatch):
    def penalty(model):
        model = mpgraph.convert(model, "fp16")
        state_of(model).scale.replace(LossScale(init_scale=2.0**4))
        x = torch.randn(3, 4, requires_grad=True)
        (g,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        g.square().mean().backward()
        return [p.grad for p in model.parameters()]

    for one, other in zip(*both_ways(monkeypatch, lambda: Deep(5), penalty), strict=True):
        assert one.ne(0).any()
        assert torch.equal(one, other)


# --- Which copies are together ---------------------------------------------------------------


def groups_of(model, *inputs, **options):
    model = mpgraph.convert(model, "bf16", **options)
    model(*inputs)
    (entry,) = state_of(model).specialisations()
    gm = entry.graph_module
    names = [node.name for node in gm.graph.find_nodes(op="placeholder")]
    return [[names[i] for i in group] for group in weight_groups.weight_groups(gm)]


def test_neighbours_in_order_of_use_are_together(monkeypatch):
    monkeypatch.setattr(weight_groups, "GROUP", 2)

    class Backwards(Deep):
        def forward(self, x):
            for layer in reversed(self.layers):
                x = layer(x)
            return x

    assert groups_of(Backwards(4), torch.ones(2, 4), capture="export") == [
        ["w_layers_3_weight_bf16", "w_layers_2_weight_bf16"],
        ["w_layers_1_weight_bf16", "w_layers_0_weight_bf16"],
    ]


@pytest.mark.parametrize(("room", "sizes"), [(1 << 20, [20]), (18 * 32, [18, 2]), (8, [16, 4])])
def test_many_copies_are_together_only_where_they_are_small(room, sizes, monkeypatch):
    monkeypatch.setattr(weight_groups, "BYTES_OF_MANY", room)  # a copy has 16 values of 2 bytes
    assert [len(group) for group in groups_of(Deep(20), torch.ones(2, 4))] == sizes


def test_a_weight_that_no_gradient_reaches_is_not_with_others():
    class Detached(Heads):
        def forward(self, x):
            h = torch.tanh(self.trunk(x))
            return self.one(h) + self.two(h).detach()

    assert groups_of(Detached(), torch.ones(2, 4), capture="export") == [
        ["w_trunk_weight_bf16", "w_one_weight_bf16"],
        ["w_two_weight_bf16"],
    ]


def test_a_backward_pass_that_reaches_no_weight_gives_none():
    class Stops(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return None

    model = mpgraph.convert(nn.Linear(8, 8), "bf16")
    Stops.apply(model(torch.ones(2, 8))).sum().backward()
    assert all(p.grad is None for p in model.parameters())


def test_a_weight_used_in_two_forms_is_by_itself():
    class TwoForms(Deep):
        def forward(self, x):
            h = super().forward(x)
            return h + self.layers[1].weight.exp().sum() + self.layers[1].weight.sinh().mean()

    groups = groups_of(TwoForms(3), torch.ones(2, 4), capture="export")
    together = ["w_layers_0_weight_bf16", "w_layers_2_weight_bf16"]
    assert together in groups
