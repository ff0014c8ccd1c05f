"""TrainStep on real models, and on what they have in common: blocks without gradients."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
import torch._inductor.config
from torch import nn
from torch.overrides import TorchFunctionMode

import mpgraph
from tests.zoo.check import build, seed_everything
from tests.zoo.registry import Case, all_cases, call

STEPS = 3


class Twins:
    """A step, and the loop that it replaces, from the same weights."""

    def __init__(
        self, case: Case, precision: str, make: Callable[[Any], Any], compile: bool = False
    ) -> None:
        self.case, model = case, build(case)
        self.loop = mpgraph.convert(copy.deepcopy(model), precision)
        self.optimizers = make(model.parameters()), make(self.loop.parameters())
        if precision == "fp16":
            mpgraph.guard(self.optimizers[1], self.loop)
        self.step = mpgraph.TrainStep(
            model, self.optimizers[0], self.loss, precision=precision, compile=compile
        )

    def loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The model's own loss, if it has one."""
        return self.case.loss(model(*args, **kwargs))

    def take(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One step of both, on the same batch and random numbers; the two losses."""
        batch = self.case.second_batch if index == STEPS - 1 else None
        losses = []
        for train in (self.step, self._loop_step):
            seed_everything(index)
            given = self.case.inputs(batch or self.case.batch)
            losses.append(train(*given.args, **given.kwargs))
        return losses[0], losses[1]

    def _loop_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = self.loss(self.loop, *args, **kwargs)
        loss.backward()
        self.optimizers[1].step()
        self.optimizers[1].zero_grad()
        return loss.detach()

    def states(self) -> list[dict[str, torch.Tensor]]:
        """Everything that a step writes, of both."""
        models = self.step.model, self.loop
        return [_tensors(*pair) for pair in zip(models, self.optimizers, strict=True)]


def _tensors(model: nn.Module, optimizer: Any) -> dict[str, torch.Tensor]:
    moments = optimizer.state_dict()["state"]
    found = {f"{i}.{name}": v for i, one in moments.items() for name, v in one.items()}
    found |= model.state_dict()
    return {name: v for name, v in found.items() if isinstance(v, torch.Tensor)}


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """Without kernels that compute in another order."""
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, foreach=False)


def hold_bitwise(twins: Twins) -> None:
    for index in range(STEPS):
        got, want = twins.take(index)
        assert torch.equal(got, want)
        a, b = twins.states()
        assert a.keys() == b.keys()
        for name, value in a.items():
            torch.testing.assert_close(value, b[name], rtol=0, atol=0, equal_nan=True, msg=name)


class Teacher(nn.Module):
    """Layers in a block without gradients, one of them in a block with gradients inside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher = nn.Linear(6, 4), nn.Linear(6, 4)
        self.inner = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """How far the student is from the teacher."""
        with torch.no_grad():
            target = self.teacher(x).float().softmax(-1)
            with torch.enable_grad():
                inner = self.inner(x)
        return (self.student(x).float().log_softmax(-1) * target).sum() + inner.float().sum()


def _teacher(**options: Any) -> Case:
    return Case("teacher", Teacher, lambda n: call(torch.randn(n, 6)), loss=lambda y: y, **options)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_blocks_without_gradients_are_as_in_the_loop(precision: str) -> None:
    """What is computed in one gets none; what is computed with gradients inside of it does."""
    twins = Twins(_teacher(), precision, sgd)
    before = {name: p.clone() for name, p in twins.step.model.named_parameters()}
    hold_bitwise(twins)
    after = dict(twins.step.model.named_parameters())
    changed = {name.partition(".")[0] for name in before if (before[name] != after[name]).any()}
    assert changed == {"student", "inner"}


class Swapped(TorchFunctionMode):
    """Somebody's mode in which tanh is relu."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run another function."""
        return (torch.relu if func is torch.tanh else func)(*args, **(kwargs or {}))


def test_modes_of_the_user_act_on_a_captured_step() -> None:
    """As they do on the loop; only those that trace the step are hidden from its capture."""

    class Net(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(super().forward(x)).float().sum()

    case = Case("swapped", lambda: Net(6, 4), lambda n: call(torch.randn(n, 6)), loss=lambda y: y)
    with Swapped():
        twins = Twins(case, "bf16", sgd)
        hold_bitwise(twins)
    assert not any("tanh" in node.operator for node in twins.step.explain().nodes)


QUICK = ("hf-llama", "timm-vit")
# Models of the zoo that a step carries: in eager mode, bit for bit the loop.
CARRIED = (
    "hf-bert", "hf-bert-classifier", "hf-bert-base", "hf-albert", "hf-electra", "hf-fnet",
    "hf-roberta", "hf-distilbert", "hf-deberta-v2", "hf-llama", "hf-llama-eager-attention",
    "hf-llama-cache", "hf-mixtral", "hf-jetmoe", "hf-gpt2", "hf-gpt-neox", "hf-opt", "hf-xlnet",
    "hf-qwen2", "hf-gemma", "hf-gemma3", "hf-mistral", "hf-phi", "hf-mamba", "hf-deepseek-v3",
    "hf-t5", "hf-longt5", "hf-bart", "hf-vit", "hf-dinov2", "hf-convnext", "hf-segformer",
    "hf-clip", "hf-whisper", "hf-llava", "timm-resnet", "timm-vit", "timm-convnext",
    "timm-efficientnet", "timm-swin", "timm-mlp-mixer",
)  # fmt: skip
# What needs several graphs is refused, with the reason and the way out.
REFUSED = {
    "hf-funnel": "forward changes the attribute",
    "hf-bloom": "the backward of the custom autograd.Function 'GeLUFunction' would be lost",
    "hf-phimoe": "the backward of the custom autograd.Function 'PhimoeMultiplier' would be lost",
    "hf-llama-checkpoint": "a checkpoint, whose memory a graph would not save",
    "hf-bart-layerdrop": "it branches on the values of a tensor",
    "hf-longformer": "it branches on the values of a tensor",
    "hf-prophetnet": "it branches on the values of a tensor",
    "hf-qwen2-vl": "it branches on the values of a tensor",
    "hf-wav2vec2": "it branches on the values of a tensor",
    "hf-detr-no-labels": "it branches on the values of a tensor",
}
COMPILED = ("hf-llama", "hf-bert", "hf-gpt2", "timm-vit", "timm-resnet")


def _zoo(names: Iterable[str]) -> Iterator[Any]:
    for name in names:
        library = {"hf": "transformers", "timm": "timm"}[name.partition("-")[0]]
        missing = importlib.util.find_spec(library) is None
        marks = [pytest.mark.skipif(missing, reason=f"needs {library}")]
        if name not in QUICK:
            marks += [pytest.mark.zoo, pytest.mark.timeout(600)]
        yield pytest.param(name, id=name, marks=marks)


@pytest.mark.parametrize("name", [*_zoo(CARRIED)])
def test_a_model_of_the_zoo_trains_as_in_the_loop(name: str) -> None:
    """In eager mode, and bit for bit: losses, parameters, statistics, momenta."""
    hold_bitwise(Twins(all_cases()[name], "bf16", sgd))


@pytest.mark.parametrize("name", [*_zoo(REFUSED)])
def test_a_model_of_several_graphs_is_refused(name: str) -> None:
    twins = Twins(all_cases()[name], "bf16", sgd)
    with pytest.raises(mpgraph.CaptureError, match=f"{REFUSED[name]}.*mpgraph.guard"):
        twins.take(0)


@pytest.mark.zoo
@pytest.mark.timeout(600)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("name", COMPILED)
def test_a_model_of_the_zoo_trains_compiled(name: str, precision: str) -> None:
    """Within the tolerances of test_train_step.py."""
    with torch._inductor.config.patch(fallback_random=True):
        twins = Twins(all_cases()[name], precision, sgd, compile=True)
        for index in range(STEPS):
            twins.take(index)
    tolerance = {"fp32": 1e-4, "fp16": 1e-2}[precision]
    ours, theirs = twins.states()
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key], rtol=tolerance, atol=tolerance, msg=key)
