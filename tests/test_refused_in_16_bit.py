"""What torch refuses in 16 bit, under torch.autocast too, trains in fp32."""

import pytest
import torch
from torch import nn

import mpgraph

FUNCTIONS = {
    "slogdet": lambda x: torch.linalg.slogdet(x).logabsdet,
    "torch.slogdet": lambda x: torch.slogdet(x)[1],
    "logdet": torch.logdet,
    "vander": lambda x: torch.linalg.vander(x[0], N=3).sum(),
    "pinv": lambda x: torch.linalg.pinv(x).sum(),
    "pinv with a bound": lambda x: torch.linalg.pinv(x, rtol=0.01).sum(),
}
# Of the gradient: the first scale of fp16 is 2**16.
SMALL = 2.0**-12


class Model(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.linear, self.function = nn.Linear(4, 4), function

    def forward(self, x):
        return self.function(self.linear(x))


def model_and_input(name):
    torch.manual_seed(0)
    model = Model(FUNCTIONS[name])
    with torch.no_grad():
        model.linear.weight += 3 * torch.eye(4)  # of a positive determinant
    return model, torch.eye(4) + 0.1 * torch.randn(4, 4)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast_refuses_it_and_it_trains_in_fp32_here(name, dtype):
    model, x = model_and_input(name)
    with torch.autocast("cpu", dtype), pytest.raises(RuntimeError, match=r"Low precision|float"):
        model(x)
    mixed = mpgraph.convert(model, dtype)
    found = mixed(x)
    (found * SMALL).backward()
    with torch.autocast("cpu", dtype):
        inner = model.linear(x).detach()
    wide = inner.double().requires_grad_()
    (FUNCTIONS[name](wide) * SMALL).backward()
    assert found.dtype is torch.float32
    assert found.item() == pytest.approx(FUNCTIONS[name](inner.double()).item(), rel=1e-4)
    # The gradient of a bias is that of its column.
    tolerance = 8 * torch.finfo(dtype).eps * float(wide.grad.abs().sum())
    torch.testing.assert_close(
        model.linear.bias.grad, wide.grad.sum(0).float(), rtol=0, atol=tolerance
    )


@pytest.mark.parametrize("name", ["slogdet", "pinv"])
def test_a_policy_that_leaves_it_in_16_bit_gets_the_error_of_torch_with_the_line(name):
    model, x = model_and_input(name)
    mixed = mpgraph.convert(model, "bf16", policy="autocast-cpu")
    with pytest.raises(RuntimeError, match=r"Low precision|float") as caught:
        mixed(x)
    assert any("test_refused_in_16_bit" in note for note in getattr(caught.value, "__notes__", []))


@pytest.mark.parametrize("name", ["slogdet", "pinv"])
def test_the_dynamo_backend_has_it_in_fp32_too(name):
    model, x = model_and_input(name)
    expected = mpgraph.convert(model, "bf16")(x)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="mpgraph", options={"precision": "bf16"})
    torch.testing.assert_close(compiled(x), expected)


def test_torch_refuses_it_as_before_once_a_model_is_captured():
    model, x = model_and_input("slogdet")
    mpgraph.convert(model, "bf16")(x)
    with pytest.raises(RuntimeError, match="Low precision"):
        torch.linalg.slogdet(torch.eye(3, dtype=torch.bfloat16))
