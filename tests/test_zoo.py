"""Converted models against eager torch.autocast, bit for bit.

The quick subset runs always; `-m zoo` runs every case of the zoo. tools/zoo.py does the same with
each model in a process of its own, and goes on to every model of transformers and timm.
"""

from __future__ import annotations

import importlib.util

import pytest

from tests.zoo.check import check_case
from tests.zoo.compare import Verdict
from tests.zoo.registry import FAMILIES, Case, family_cases
from tests.zoo.subject import converter


def _cases() -> list[object]:
    return [
        pytest.param(case, id=case.name, marks=() if case.is_quick else pytest.mark.zoo)
        for family in FAMILIES
        for case in family_cases(family)
    ]


def _require_libraries(case: Case) -> None:
    for prefix, library in (("hf", "transformers"), ("timm", "timm")):
        if case.family.startswith(prefix) and importlib.util.find_spec(library) is None:
            pytest.skip(f"needs {library}")


@pytest.mark.parametrize("case", _cases())
def test_converted_model_equals_eager_autocast(case: Case) -> None:
    _require_libraries(case)
    outcome = check_case(case, converter("auto", "bf16", "autocast-cpu"))
    if outcome.verdict is Verdict.EAGER_FAILS:
        pytest.skip(f"eager autocast cannot train it: {outcome.cause}")
    expected = Verdict.CLOSE if case.known_difference else Verdict.BITWISE
    assert outcome.verdict is expected, f"{outcome.cause}\n{outcome.detail}"
