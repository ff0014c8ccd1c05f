"""What a command works on: a function of the user's that returns a model and a call of it."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mpgraph.errors import MPGraphError

WHAT = (
    "module:function or file.py:function; the function takes nothing and returns (model, inputs): "
    "inputs is a tensor, a tuple of positional or a dict of keyword arguments"
)


def load(name: str) -> tuple[Any, Any]:
    """The model and the inputs that the named function returns.

    Raises:
        MPGraphError: There is no such module or function, or it returns something else.
    """
    place, _, function = name.rpartition(":")
    if not place or not function:
        raise MPGraphError(f"expected module:function or file.py:function, found {name!r}")
    module = _module(place)
    make = getattr(module, function, None)
    if not callable(make):
        raise MPGraphError(f"{place} has no function {function!r}")
    made = make()
    if not isinstance(made, tuple) or len(made) != 2:
        raise MPGraphError(
            f"{name} must return (model, inputs), found {type(made).__name__}"
            + (f" of {len(made)}" if isinstance(made, tuple) else "")
        )
    return made


def _module(place: str) -> Any:
    if place.endswith(".py"):
        return _from_file(Path(place))
    with _in_path(Path.cwd()):
        try:
            return importlib.import_module(place)
        except ModuleNotFoundError as error:
            # A module that is there and lacks one of its own imports says that itself.
            if error.name is None or not f"{place}.".startswith(f"{error.name}."):
                raise
            raise MPGraphError(f"there is no module {place!r} here ({Path.cwd()})") from error


def _from_file(file: Path) -> Any:
    if not file.is_file():
        raise MPGraphError(f"there is no file {str(file)!r}")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(file.stem, module)
    with _in_path(file.resolve().parent):
        spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _in_path(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def converted(model: Any, precision: str | None, policy: str) -> Any:
    """The model, converted if it is not yet."""
    from mpgraph.conversion import convert
    from mpgraph.module import MixedPrecision

    if isinstance(model, MixedPrecision):
        if precision is not None:
            raise MPGraphError("the function returns a converted model: leave --precision out")
        return model
    return convert(model, precision or "auto", policy=policy)


def add_conversion(parser: Any) -> None:
    """Options for a function that returns a model which is not converted."""
    parser.add_argument(
        "--precision", help='"bf16", "fp16", "fp32", …; for a model that is not converted'
    )
    parser.add_argument(
        "--policy", default="default", help="a preset, one line of text, or a TOML file; likewise"
    )
