"""One small architecture for every family of timm."""

from __future__ import annotations

import re
from collections.abc import Iterator

from .registry import Case
from .timm_models import timm

# What the name of a small member of a family tends to hold, the smallest first.
_SMALL = (
    "test_", "zepto", "atto", "femto", "pico", "nano", "xx_small", "xxs", "xxsmall", "x_small",
    "extra_small", "_xs", "tiny", "_ti_", "_t0", "_t8", "_m0", "_s0", "_b0", "mini", "small",
    "_s_", "_s", "lite",
)  # fmt: skip
_SKIPPED = re.compile("_21k|_in22|_in21|_384|_448|_512|huge|giant|gigantic|xlarge|large")


def families() -> dict[str, list[str]]:
    """Return the architectures of timm by module and by the letters that their name starts with."""
    from .torchvision_standin import import_timm

    timm_ = import_timm()
    found: dict[str, list[str]] = {}
    for module in timm_.list_modules():
        for name in timm_.list_models(module=module, pretrained=False):
            stem = re.match(r"(?:test_)?[a-z]*", name)
            assert stem is not None
            found.setdefault(f"{module}/{stem[0].removeprefix('test_')}", []).append(name)
    return found


def architectures() -> list[str]:
    """Return one architecture for every family, the one whose name promises the smallest."""
    return sorted({min(names, key=_promise) for names in families().values()})


def _promise(name: str) -> tuple[bool, int, list[int], str]:
    """Return a key that sorts small architectures first: by word, then by the numbers in it."""
    rank = next((i for i, part in enumerate(_SMALL) if part in name), len(_SMALL))
    return (bool(_SKIPPED.search(name)), rank, [int(n) for n in re.findall(r"\d+", name)], name)


def candidates(architecture: str) -> Iterator[Case]:
    """Yield the architecture at the smallest image it takes, smaller in depth where it allows."""
    for options in ({"img_size": 64}, {}):
        for size in (64, 96, 128, 224):
            if options and size != 64:
                continue
            yield timm(architecture, architecture, size, **options)
    yield timm(architecture, architecture, 256)
