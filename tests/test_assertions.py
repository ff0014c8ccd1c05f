"""``assert_policy``: each way to fail says which operators, where, why, and what to do."""

from __future__ import annotations

import functools
import re
from typing import Any

import pytest
import torch
from torch import nn

import mpgraph
from mpgraph.errors import PolicyError
from mpgraph.report.records import Graph, Node
from mpgraph.report.report import Report


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.norm = nn.LayerNorm(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        with torch.autocast("cpu", enabled=False):
            x = x.float().exp()
        return self.norm(x).softmax(-1)


@functools.cache
def report(precision: str = "bf16", policy: str = "default") -> Report:
    inputs = (torch.ones(3, 4),)
    return mpgraph.explain(
        mpgraph.convert(Model(), precision, policy=policy, example_inputs=inputs)
    )


def failure(subject: Any, **asked: Any) -> str:
    with pytest.raises(PolicyError) as caught:
        mpgraph.assert_policy(subject, **asked)
    return re.sub(r"\.py:\d+", ".py:N", str(caught.value))


def test_a_model_that_does_as_asked_passes() -> None:
    model = mpgraph.convert(Model(), "bf16", example_inputs=(torch.ones(3, 4),))
    mpgraph.assert_policy(
        model,
        fp32=["softmax", "aten.layer_norm*"],
        lower="linear",
        forbid={"softmax": ["bf16", "fp16"], "linear": "fp32"},
        max_casts=2,
        max_cast_bytes=1000,
        no_unknown=True,
    )


def test_an_operator_that_should_be_float32_and_is_not() -> None:
    subject = report(policy="default; op=softmax run=compute")
    assert failure(subject, fp32=["softmax"]) == (
        "Model (bf16, policy default; op=softmax run=compute) fails 1 assertion of assert_policy:\n"
        "- fp32='softmax': 1 of 1 operator runs in bf16\n"
        "    softmax, from test_assertions.py:N: return self.norm(x).softmax(-1)\n"
        "      because: the policy says compute; override 1: op=softmax\n"
        "  To change that: policy.pin(op='softmax', run='fp32')."
    )


def test_an_operator_that_should_be_lowered_and_is_not() -> None:
    subject = report(policy="default; module=layers.1 run=fp32")
    message = failure(subject, lower="linear")
    assert "- lower='linear': 1 of 2 operators runs in fp32" in message
    assert "    linear_1 in layers.1, from test_assertions.py:N: x = layer(x)" in message
    assert "policy.pin(op='linear', module='layers.1', run='compute')" in message


def test_a_forbidden_dtype() -> None:
    message = failure(report(), forbid={"linear": "bf16"})
    assert "- forbid={'linear': 'bf16'}: 2 of 2 operators run in bf16" in message
    assert "    linear in layers.0, from test_assertions.py:N: x = layer(x)" in message
    assert "      because: matrix units take 16-bit inputs" in message
    assert "To change that: policy.pin(op='linear', run='fp32')." in message


def test_a_dtype_that_does_not_exist_cannot_be_forbidden() -> None:
    message = failure(report(), forbid={"linear": "float61"})
    assert message == (
        "forbid takes bf16, fp16, fp32, fp64, found 'float61'; close to it: 'fp64', 'fp16', 'fp32'"
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "torch.bfloat16", torch.bfloat16], ids=repr)
def test_a_dtype_by_its_long_name_is_answered_with_the_short_one(dtype: Any) -> None:
    message = failure(report(), forbid={"linear": dtype})
    assert f"found {dtype!r}; close to it: 'bf16'" in message


@pytest.mark.parametrize(
    "asked", [{"fp32": ["sofmax"]}, {"lower": "sofmax"}, {"forbid": {"sofmax": "bf16"}}], ids=str
)
def test_an_operator_that_the_model_does_not_have(asked: dict[str, Any]) -> None:
    message = failure(report(), **asked)
    assert "the model has no such operator on floating-point values" in message
    assert "; close to it: 'softmax'" in message


def test_without_a_near_miss_the_models_operators_are_listed() -> None:
    assert "; it has linear ×2, to, exp, layer_norm" in failure(report(), fp32="qqq")


def test_too_many_casts() -> None:
    message = failure(report(), max_casts=0)
    assert "- max_casts=0: the casts of a call of graph 1 (Model train (x: fp32[3, 4]))" in message
    assert "come to 2; the largest:" in message
    assert "    fp32 -> bf16, 72 B, for linear: x_bf16 in layers.0, from test_asser" in message
    assert "    bf16 -> fp32, 72 B, the model's own: to, from test_assertions.py:N" in message
    assert "pin them to one" in message


def test_too_many_bytes_of_casts() -> None:
    message = failure(report(), max_cast_bytes=100)
    assert "- max_cast_bytes=100: " in message
    assert "come to 144 bytes; the largest:" in message


def test_an_operator_without_a_row() -> None:
    node = Node(
        "f", "mylib.f.default", "body", runs_in="bf16", reason="the operator table has no row",
        source="no row: follows its inputs", line="m.py:3: f(x)",
    )  # fmt: skip
    assert failure(Report("Model", graphs=(Graph(nodes=(node,)),)), no_unknown=True) == (
        "Model fails 1 assertion of assert_policy:\n"
        "- no_unknown: 1 operator without a row in the operator table\n"
        "    f in body, from m.py:N: f(x)\n"
        "      because: the operator table has no row; no row: follows its inputs\n"
        "  Say how it runs, for example: policy.pin(op='mylib.f.default', run='fp32')."
    )


def test_inside_the_models_own_region_a_pin_is_not_the_remedy() -> None:
    message = failure(report(), lower="exp")
    assert "because: inside the model's own autocast(enabled=False)" in message
    assert "The model's own torch.autocast region decides there: change it in the model." in message


def test_a_float32_model_cannot_be_pinned_to_16_bit() -> None:
    message = failure(report("fp32"), lower="linear")
    assert "Precision fp32 lowers nothing: convert the model to bf16 or fp16." in message


def test_every_failure_is_in_one_message() -> None:
    message = failure(report(), fp32=["linear", "sofmax"], max_casts=0, forbid={"softmax": "fp32"})
    assert message.startswith("Model (bf16, policy default) fails 4 assertions of assert_policy:\n")
    assert message.count("\n- ") == 4


def test_long_lists_are_cut() -> None:
    nodes = tuple(Node(f"n{i}", "aten.exp.default", runs_in="bf16") for i in range(9))
    message = failure(Report("Model", graphs=(Graph(nodes=nodes),)), fp32="exp")
    assert "    and 4 more" in message
    assert "n5" not in message


def test_one_part_of_a_model_can_be_asked_about() -> None:
    subject = report(policy="default; module=layers.1 run=fp32")
    mpgraph.assert_policy(subject.filter(module="layers.1"), fp32="linear")
    assert "module=layers.0) fails" in failure(subject.filter(module="layers.0"), fp32="linear")


def test_to_ask_for_nothing_is_a_mistake() -> None:
    assert "was asked for nothing" in failure(report())
