"""TrainStep is the loop that it replaces."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mpgraph
from mpgraph.module import state_of
from mpgraph.passes.tensor_numbers import tensor_numbers
from mpgraph.pipeline import run_passes
from mpgraph.step.assemble import copied
from mpgraph.step.program import Numbers
from mpgraph.step.slots import step_slots
from tests.twins import Twins, adamw, assert_same

OVERFLOWS = (4, 5, 9)


class Net(nn.Module):
    """A convolution, batch norm, dropout, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.drop, self.head = nn.Dropout(0.1), nn.Linear(64, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scores."""
        return self.head(self.drop(F.relu(self.norm(self.conv(x)))).flatten(1))


def loss_fn(model: nn.Module, x: Any, y: Any, weight: Any) -> tuple[Any, Any]:
    """The loss, and the scores beside it."""
    scores = model(x).float()
    return F.cross_entropy(scores, y) * weight, scores


def batch(index: int, overflows: bool) -> tuple[torch.Tensor, ...]:
    """The same batch for the same index."""
    generator = torch.Generator().manual_seed(index)
    x = torch.randn(5, 1, 6, 6, generator=generator)
    y = torch.randint(0, 4, (5,), generator=generator)
    return x, y, torch.tensor(1e30 if overflows else 1.0)


def scheduled(optimizer: Any) -> Any:
    """A learning rate that changes."""
    return torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.7)


def twins_of(
    precision: str,
    make: Callable[[Any], torch.optim.Optimizer] = adamw,
    size: int = 1,
    norm: float | None = 1.0,
    compile: bool = False,
) -> Twins:
    """Twins of the network above, with a learning rate that changes."""
    return Twins(
        loss_fn, precision, Net, make, schedule=scheduled, norm=norm, size=size, compile=compile
    )


def update(twins: Twins, index: int) -> list[tuple[Any, Any]]:
    """One update of both, which overflows where it is to; what each batch returned."""
    found = []
    for part in range(twins.size):
        overflows = twins.is_guarded and index in OVERFLOWS and part == 0
        found.append(twins.take(*batch(100 * index + part, overflows)))
    return found


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_equals_the_loop_bit_for_bit(precision: str, size: int) -> None:
    """Losses, outputs, parameters, statistics, moments, skips, scale: over overflows, clipped."""
    twins = twins_of(precision, size=size)
    for index in range(12):
        for got, want in update(twins, index):
            assert_same(got, want)
        twins.compare()
        if precision == "fp16":
            assert bool(twins.step.last_step_skipped) is (index in OVERFLOWS)
            scales = [state_of(model).scale.value for model in twins.models]
            assert scales[0].scale == scales[1].scale
            assert scales[0].growth_tracker == scales[1].growth_tracker
    assert all(p.grad is None for p in twins.step.model.parameters())


def test_overflows_before_the_first_update_lower_the_scale_each_time() -> None:
    """The optimizer has no state until a step is taken, so each of them is a first step."""
    twins = twins_of("fp16")
    for index in (*OVERFLOWS, 0, 1):
        update(twins, index)
        twins.compare()
        ours, theirs = (state_of(model).scale.value.scale for model in twins.models)
        assert ours == theirs
    assert ours == 2.0**16 / 2 ** len(OVERFLOWS)


class Lion(torch.optim.Optimizer):
    """An optimizer that torch does not have (arXiv:2302.06675)."""

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.99)})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One update."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                first, second = group["betas"]
                update = state["momentum"].mul(first).add(p.grad, alpha=1 - first).sign_()
                p.add_(update, alpha=-group["lr"])
                state["momentum"].mul_(second).add_(p.grad, alpha=1 - second)


optim = torch.optim
OPTIMIZERS: dict[str, Callable[[Any], optim.Optimizer]] = {
    "sgd": lambda p: optim.SGD(p, lr=0.1, foreach=False),
    "nesterov": lambda p: optim.SGD(
        p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01, foreach=False
    ),
    "dampening": lambda p: optim.SGD(
        p, lr=0.1, momentum=0.9, dampening=0.5, maximize=True, foreach=False
    ),
    "adam": lambda p: optim.Adam(p, lr=0.01, amsgrad=True, foreach=False),
    "rmsprop": lambda p: optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True, foreach=False),
    "adagrad": lambda p: optim.Adagrad(p, lr=0.01, lr_decay=0.01, foreach=False),
    "adamax": lambda p: optim.Adamax(p, lr=0.01, foreach=False),
    "nadam": lambda p: optim.NAdam(p, lr=0.01, foreach=False),
    "adafactor": lambda p: optim.Adafactor(p, lr=0.01, foreach=False),
    "adadelta": lambda p: optim.Adadelta(p, foreach=False),
    "lion": lambda p: Lion(p),
    "muon": lambda p: optim.Muon([q for q in p if q.dim() == 2], lr=0.02),
}


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_traces_the_update_of_any_optimizer(name: str) -> None:
    """The optimizer's own arithmetic, skipped steps included, bit for bit."""
    twins = twins_of("fp16", OPTIMIZERS[name])
    for index in range(7):
        update(twins, index)
        twins.compare()
    assert twins.step.explain().count("update") > 0


def test_radam_takes_the_path_without_branches() -> None:
    """Its branch on the step number is a choice in the graph: float32 instead of Python floats."""
    twins = twins_of("bf16", lambda p: optim.RAdam(p, lr=0.01, foreach=False), norm=None)
    for index in range(8):
        update(twins, index)
    twins.compare(rtol=1e-3, atol=1e-4)


OTHERS: dict[str, Callable[[Any], optim.Optimizer]] = {
    "radam": lambda p: optim.RAdam(p, lr=0.01, foreach=False),
    "asgd": lambda p: optim.ASGD(p, lr=0.01, foreach=False),
    "rprop": lambda p: optim.Rprop(p, lr=0.01, foreach=False),
}


@pytest.mark.parametrize("name", [*OPTIMIZERS, *OTHERS])
def test_numbers_become_tensors(name: str) -> None:
    """What a backend compiles computes what the graph with Python's numbers does."""
    twins = twins_of("fp32", {**OPTIMIZERS, **OTHERS}[name])
    for index in range(3):
        update(twins, index)
    captures = twins.step._captures
    (program,) = captures.programs.values()
    other = copied(program.graph_module)
    assert run_passes(other, (tensor_numbers,), captures.context(program.gradients, True))
    leaves, found = list(batch(7, False)), []
    state = copy.deepcopy(twins.step.state_dict())
    for run, graph in ((program.launch.run, program.graph_module), (other.forward, other)):
        twins.step.load_state_dict(copy.deepcopy(state))
        torch.manual_seed(0)
        slots = step_slots(graph.graph)
        values = [leaves[slot.index] if slot.read is None else slot.read() for slot in slots]
        with torch.no_grad():
            run(*Numbers(slots).put(values))
        found.append({name: value.clone() for name, value in twins.states()[0].items()})
    assert not any(isinstance(n.meta.get("val"), torch.SymFloat) for n in other.graph.nodes)
    assert_same(*found, rtol=1e-6, atol=1e-7)


def test_parameter_groups_and_frozen_parameters() -> None:
    """Each group has its own numbers; what is not in the optimizer stays."""

    def make(parameters: Any) -> optim.Optimizer:
        conv, _, _, *head = parameters
        groups = [{"params": [conv], "lr": 0.1}, {"params": head, "weight_decay": 0.1}]
        return optim.AdamW(groups, lr=0.01, foreach=False)

    twins = twins_of("bf16", make, norm=None)
    for index in range(5):
        update(twins, index)
        twins.compare()


@pytest.mark.parametrize("size", [1, 2])
def test_goes_on_after_loading_to_the_same_bits(size: int) -> None:
    """Through a file, in the middle of an accumulated step."""
    first, second = (twins_of("fp16", size=size) for _ in range(2))
    for index in range(6):
        update(first, index)
    first.step(*batch(1, False))
    file = io.BytesIO()
    torch.save(first.step.state_dict(), file)
    file.seek(0)
    second.step.load_state_dict(torch.load(file, weights_only=False))
    for index in range(20, 25):
        results = []
        for twins in (first, second):
            torch.manual_seed(index)
            results.append(twins.step(*batch(index, False)))
        assert torch.equal(results[0][0], results[1][0])
    assert_same(first.states()[0], second.states()[0])


def test_another_batch_shape_and_mode_is_captured_anew() -> None:
    """Each has its own graph, on the same parameters and state."""
    twins = twins_of("bf16")
    update(twins, 0)
    for size in (5, 3, 5, 3):
        x, y, weight = batch(size, False)
        twins.step(x[:size], y[:size], weight)
    assert len(twins.step._captures.programs) == 2
    twins.step.model.eval()
    before = twins.step.model.norm.running_mean.clone()
    twins.step(*batch(9, False))
    assert torch.equal(before, twins.step.model.norm.running_mean)


def test_a_model_that_returns_its_loss() -> None:
    """As those of Hugging Face do."""

    class Own(Net):
        def forward(self, x: Any, labels: Any) -> Any:
            scores = super().forward(x)
            return {"loss": F.cross_entropy(scores.float(), labels), "logits": scores}

    model = Own()
    step = mpgraph.TrainStep(model, adamw(model.parameters()), precision="bf16", compile=False)
    x, y, _ = batch(0, False)
    losses = [float(step(x, labels=y)) for _ in range(20)]
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize(
    ("precision", "make", "size"),
    [
        ("fp32", lambda p: optim.AdamW(p, lr=1e-2), 2),
        ("fp32", lambda p: optim.RMSprop(p, lr=1e-3, momentum=0.9), 1),
        ("fp16", lambda p: optim.SGD(p, lr=1e-2, momentum=0.9), 1),
    ],
)
def test_compiled(precision: str, make: Any, size: int) -> None:
    """Fused kernels after two compiled halves, or an update that is compiled too."""
    import torch._inductor.config as inductor

    with inductor.patch(fallback_random=True):
        twins = twins_of(precision, make, size, compile=True)
        for index in range(8):
            update(twins, index)
            if precision == "fp16":
                assert bool(twins.step.last_step_skipped) is (index in OVERFLOWS)
    tolerance = {"fp32": 1e-4, "fp16": 1e-2}[precision]
    twins.compare(rtol=tolerance, atol=tolerance)


def test_report_says_what_runs_where() -> None:
    """Parts, dtypes, modules and lines."""
    twins = twins_of("fp16")
    update(twins, 0)
    update(twins, 1)
    report = twins.step.explain()
    parts = {node.part for node in report.nodes}
    assert parts == {"forward", "backward", "clip", "check", "update", "scale", "write"}
    found = {n.module for n in report.nodes if n.part == "backward" and "convolution" in n.operator}
    assert found == {"conv"}
    assert any("test_train_step.py" in n.line for n in report.nodes if n.module == "loss")
    assert "backward" in str(report)
    assert "found_inf" in report.text() or report.count("check")
    assert {n.dtype for n in report.nodes if "convolution" in n.operator and n.dtype} <= {"fp16"}


def _step(loss: Any = loss_fn, optimizer: Any = None, **options: Any) -> Any:
    model = Net()
    optimizer = optimizer(model) if optimizer else adamw(model.parameters())
    return mpgraph.TrainStep(model, optimizer, loss, precision="bf16", compile=False, **options)


def looks_at_a_value(model: nn.Module, x: Any, y: Any, weight: Any) -> Any:
    """A loss with a branch on a value."""
    loss = loss_fn(model, x, y, weight)[0]
    return loss if loss > 0 else -loss


def test_item_is_read_at_every_step() -> None:
    """A number from a tensor is computed in the graph, not frozen into it."""

    def loss(model: nn.Module, x: Any, y: Any, weight: Any) -> Any:
        return loss_fn(model, x, y, weight)[0] * weight.item()

    step = _step(loss)
    x, y, _ = batch(0, False)
    step(x, y, torch.tensor(1.0))
    first = [float(step(x, y, torch.tensor(value))) for value in (0.0, 0.0)]
    assert first == [0.0, 0.0]
    assert float(step(x, y, torch.tensor(2.0))) > 0


def test_errors_at_construction() -> None:
    """Each says what to do."""
    with pytest.raises(mpgraph.PrecisionError, match=r"optimizer\.step\(closure\)"):
        _step(optimizer=lambda m: optim.LBFGS(m.parameters()))
    with pytest.raises(mpgraph.PrecisionError, match="none of the parameters of Net"):
        _step(optimizer=lambda m: adamw(Net().parameters()))
    with pytest.raises(mpgraph.PrecisionError, match=r"expected a torch\.optim\.Optimizer"):
        mpgraph.TrainStep(Net(), "adam")  # type: ignore[arg-type]
    with pytest.raises(mpgraph.PrecisionError, match="accumulation_steps"):
        _step(accumulation_steps=0)
    with pytest.raises(mpgraph.PrecisionError, match="max_grad_norm"):
        _step(max_grad_norm=-1.0)
    with pytest.raises(mpgraph.PrecisionError, match="must be True, False or a mode"):
        mpgraph.TrainStep(Net(), adamw(Net().parameters()), compile="fast")
    with pytest.raises(mpgraph.PrecisionError, match="guarded already"):
        _step(optimizer=_guarded)
    with pytest.raises(mpgraph.MPGraphError, match="no step has been captured yet"):
        _step().explain()
    with pytest.raises(mpgraph.MPGraphError, match="not the state of a TrainStep"):
        _step().load_state_dict({"model": {}})


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would train on its own gradients, and nobody would notice."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(mpgraph.PrecisionError, match="several processes"):
        _step()


def _guarded(model: nn.Module) -> Any:
    return mpgraph.guard(adamw(model.parameters()), check_finite=True)


def test_errors_at_capture() -> None:
    """Nothing falls back to eager mode unseen, and each error names the place."""
    given = batch(0, False)
    with pytest.raises(mpgraph.CaptureError, match=r"value of a tensor at test_train_step\.py"):
        _step(looks_at_a_value)(*given)
    with pytest.raises(mpgraph.CaptureError, match="one floating-point number"):
        _step(lambda m, x, y, w: m(x))(*given)
    with pytest.raises(mpgraph.CaptureError, match="depends on no parameter"):
        _step(lambda m, x, y, w: m(x).detach().sum())(*given)
    with pytest.raises(mpgraph.CaptureError, match="there is no loss"):
        _step(lambda m, x, y, w: {"logits": m(x)})(*given)

    class Counting(Lion):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            super().step()
            for p in self.param_groups[0]["params"]:
                self.state[p]["count"] = self.state[p].get("count", 0) + 1

    step = _step(optimizer=lambda m: Counting(m.parameters()))
    step(*given)
    with pytest.raises(mpgraph.CaptureError, match="as a Python number"):
        step(*given)
    step = _step()
    step.optimizer.register_step_post_hook(lambda *_: None)
    with pytest.raises(mpgraph.CaptureError, match="step hooks"):
        step(*given)


def test_a_failed_capture_leaves_everything_as_it_was() -> None:
    """Statistics, parameters and the number of batches so far."""
    step = _step(looks_at_a_value)
    before = {name: value.clone() for name, value in step.model.state_dict().items()}
    with pytest.raises(mpgraph.CaptureError):
        step(*batch(0, False))
    for name, value in step.model.state_dict().items():
        assert torch.equal(value, before[name])


class Two(nn.Module):
    """Two layers, the second of which a batch may leave out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)


def two_loss(model: nn.Module, x: torch.Tensor, both: bool) -> torch.Tensor:
    """Converted or not, the layers themselves are called."""
    y = model.first(x)
    return ((model.second(y) if both else y) - 1).square().mean()


def test_compiled_counters_may_come_apart() -> None:
    """A step that leaves parameters out leaves their counters behind."""
    models = [Two(), Two()]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [optim.Adamax(m.parameters(), lr=0.01) for m in models]
    step = mpgraph.TrainStep(models[0], optimizers[0], two_loss, precision="fp32")
    for index in range(9):
        x, both = torch.randn(3, 4), index not in (3, 4, 6)
        step(x, both)
        two_loss(models[1], x, both).backward()
        optimizers[1].step()
        optimizers[1].zero_grad()
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b)
