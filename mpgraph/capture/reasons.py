"""Why torch.export could not trace a model, in plain words.

torch says it in terms of its own: unbacked symbols, fake tensors. A row names one of its
exceptions, or a built-in one, and what its text holds. torch's own text goes to the log.
"""

from __future__ import annotations

import re

_BRANCH = "it branches on the values of a tensor"
_TRANSFORM = "a function transform such as vmap around operators"
_NUMBER = "it makes a Python number (a size, an index) of a tensor's value"
_REPLACED = "its parameter {0} is another tensor, as torch.func.functional_call makes it"
_SIZE = "the size of one of its tensors depends on the values of another"

# By name, since some exist in some versions of torch only; the first row that fits holds.
_ROWS: tuple[tuple[str, str, str], ...] = (
    ("GuardOnDataDependentSymNode", r"Could not extract specialized", _NUMBER),
    ("GuardOnDataDependentSymNode", r"expression \w+ ", _NUMBER),
    ("GuardOnDataDependentSymNode", r"", _BRANCH),
    ("DataDependentOutputException", r"(?:item|_local_scalar_dense)", _NUMBER),
    ("DataDependentOutputException", r"aten\.(\w+)", "it asks {0} about the values of tensors"),
    ("DynamicOutputShapeException", r"aten\.(\w+)", "{0} yields as many values as the data say"),
    ("PendingUnbackedSymbolNotFound", r"", _SIZE),
    ("SpecViolationError", r"parameter (?:model\.)?(\S+) is not an instance of", _REPLACED),
    ("UnsupportedOperatorException", r"(\w+\.\w+)", "operator {0} cannot be traced"),
    ("UnsupportedFakeTensorException", r"", "it uses a kind of tensor that cannot be traced"),
    ("ConstraintViolationError", r"", "the sizes of its inputs depend on each other"),
    ("UserError", r"(?i)data-dependent|dynamic control flow|unbacked", _BRANCH),
    ("UserError", r"(?i)constraint", "the sizes of its inputs depend on each other"),
    ("RuntimeError", r"\.numpy\(\)|numpy\.ndarray", "it makes a numpy array of a tensor"),
    ("RuntimeError", r"[Cc]annot access data pointer", "it reads a tensor's memory directly"),
    ("NotImplementedError", r"torch\._C\.Generator", "it draws from a random generator of its own"),
    ("AssertionError", r"Expected FakeTensor, got <class 'torch\.Tensor'>", _TRANSFORM),  # 2.11
    ("TypeError", r"format string passed to Fake", "it writes the value of a tensor into a text"),
)  # fmt: skip


def plain_reason(error: BaseException) -> str:
    """What the model does that torch.export cannot trace; "" for an error of another kind.

    Such an error is torch's, and not one that the model raises in eager mode too.
    """
    names = {cls.__name__ for cls in type(error).__mro__}
    for name, pattern, words in _ROWS:
        if name in names and (found := re.search(pattern, str(error))):
            return words.format(*found.groups())
    return ""
