"""The wheel holds the whole package, and the pins agree with the ranges."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]


def modules_on_disk() -> set[str]:
    """Every file that a user's import or type checker may ask for, as the wheel should name it."""

    def names(folder: Path, prefix: str) -> Iterator[str]:
        for path in folder.rglob("*"):
            relative = path.relative_to(folder)
            # rglob follows the link passes/ on some Python versions and not on others.
            if prefix == "mpgraph" and relative.parts[0] == "passes":
                continue
            if path.suffix == ".py" or path.name == "py.typed":
                yield str(PurePosixPath(prefix, *relative.parts))

    return {*names(ROOT / "mpgraph", "mpgraph"), *names(ROOT / "passes", "mpgraph/passes")}


def build_wheel(source: Path) -> set[str]:
    """The names of the package files in a wheel built from ``source``."""
    build = "from setuptools import build_meta; build_meta.build_wheel('dist')"
    (source / "dist").mkdir()
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    (wheel,) = (source / "dist").glob("*.whl")
    return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of what a wheel is made from, so that nothing is built in the working tree."""
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    for name in ("mpgraph", "passes"):
        shutil.copytree(
            ROOT / name,
            tmp_path / name,
            symlinks=True,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    return tmp_path


def test_wheel_holds_every_module(source):
    assert build_wheel(source) == modules_on_disk()


def test_wheel_is_the_same_where_the_link_became_a_text_file(source):
    # What a download as a zip archive, or git on Windows, makes of the link.
    link = source / "mpgraph" / "passes"
    link.unlink()
    link.write_text("../passes")
    assert build_wheel(source) == modules_on_disk()


def test_passes_is_one_module_in_a_checkout():
    assert (ROOT / "mpgraph" / "passes").resolve() == ROOT / "passes"


def test_every_pin_is_within_the_range_that_pyproject_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {
        pin.name.replace("_", "-").lower(): next(iter(pin.specifier)).version
        for pin in (Requirement(line) for line in lines if line and not line.startswith("#"))
    }
    for requirement in map(Requirement, itertools.chain(*groups)):
        pin = pins[requirement.name.replace("_", "-").lower()]
        assert requirement.specifier.contains(pin), f"{requirement} excludes the pin {pin}"
