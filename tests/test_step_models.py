"""TrainStep on real models, and on what they have in common: blocks without gradients."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
import torch._inductor.config
from torch import nn
from torch.overrides import TorchFunctionMode

import mpgraph
from tests.twins import Twins, assert_same
from tests.zoo.check import build, seed_everything
from tests.zoo.registry import Case, all_cases, call

STEPS = 3


def sgd(parameters: Any) -> torch.optim.Optimizer:
    """Without kernels that compute in another order."""
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, foreach=False)


class ZooTwins(Twins):
    """Twins of a model of the zoo, on its own batches and loss."""

    def __init__(self, case: Case, precision: str = "bf16", compile: bool = False) -> None:
        self.case = case
        super().__init__(
            self.own_loss, precision, lambda: build(case), sgd, policy="default", compile=compile
        )
        self.equal_nan = True

    def own_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The model's own loss, if it has one."""
        return self.case.loss(model(*args, **kwargs))

    def take_next(self) -> tuple[torch.Tensor, torch.Tensor]:
        """One step of both; the last is on a batch of another size, where there is one."""
        other = self.case.second_batch if self.calls == STEPS - 1 else None
        seed_everything(self.calls)
        given = self.case.inputs(other or self.case.batch)
        return self.take(*given.args, **given.kwargs)

    def hold_bitwise(self) -> None:
        """They agree at every step."""
        for _ in range(STEPS):
            assert_same(*self.take_next(), equal_nan=True)
            self.compare()


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
    twins = ZooTwins(_teacher(), precision)
    before = {name: p.clone() for name, p in twins.step.model.named_parameters()}
    twins.hold_bitwise()
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
        twins = ZooTwins(case)
        twins.hold_bitwise()
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
    ZooTwins(all_cases()[name]).hold_bitwise()


@pytest.mark.parametrize("name", [*_zoo(REFUSED)])
def test_a_model_of_several_graphs_is_refused(name: str) -> None:
    twins = ZooTwins(all_cases()[name])
    with pytest.raises(mpgraph.CaptureError, match=f"{REFUSED[name]}.*mpgraph.guard"):
        twins.take_next()


@pytest.mark.zoo
@pytest.mark.timeout(600)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("name", COMPILED)
def test_a_model_of_the_zoo_trains_compiled(name: str, precision: str) -> None:
    """Within the tolerances of test_train_step.py."""
    with torch._inductor.config.patch(fallback_random=True):
        twins = ZooTwins(all_cases()[name], precision, compile=True)
        for _ in range(STEPS):
            twins.take_next()
    tolerance = {"fp32": 1e-4, "fp16": 1e-2}[precision]
    twins.compare(rtol=tolerance, atol=tolerance)
