"""The folder of an exported step: graphs, state, and what is in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mpgraph.onnx.ports import Port
from mpgraph.runtime import manifest as files


def tensor_of(name: str, value: torch.Tensor, symbol: str) -> files.Tensor:
    """How a manifest describes a tensor; the batch size is called ``batch``."""
    shape = tuple(n if isinstance(n, int) else size_name(n, symbol) for n in value.shape)
    return files.Tensor(name, dtype_name(value.dtype), shape)


def size_name(size: Any, symbol: str) -> int | str:
    """A symbolic size by its name."""
    text = str(size.node.expr)
    if text.lstrip("-").isdigit():
        return int(text)
    return "batch" if text == symbol else text.replace(symbol, "batch")


def dtype_name(dtype: torch.dtype) -> str:
    """As numpy spells it."""
    return str(dtype).removeprefix("torch.")


def state_of_ports(
    ports: Sequence[Port], in_place: frozenset[str], pieces: Mapping[str, tuple[int, ...]]
) -> tuple[Any, ...]:
    """How a manifest describes the state."""
    return tuple(
        files.StateTensor(
            port.name, dtype_name(port.value.dtype), tuple(map(int, port.value.shape)),
            next_name(port.name), port.kind, port.same, port.name in in_place,
            pieces.get(port.name, ()),
        )
        for port in ports
    )  # fmt: skip


def next_name(name: str) -> str:
    """The output that holds the next value of a state tensor."""
    return f"next.{name}"


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors to a safetensors file; parameters that are one tensor are written once each."""
    from safetensors.torch import save_file

    save_file({name: value.contiguous().clone() for name, value in tensors.items()}, str(path))
    path.chmod(0o644)  # safetensors leaves it readable for its owner alone


def value_of(port: Port) -> torch.Tensor:
    """The value that a port has now, on the CPU."""
    assert port.read is not None
    found = port.read()
    if not isinstance(found, torch.Tensor):
        return torch.tensor(found, dtype=port.value.dtype)
    return found.detach().to("cpu", port.value.dtype)
