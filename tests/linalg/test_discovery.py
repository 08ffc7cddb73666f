"""Methods are found by file name, built by name, and refused with the names there are."""

import importlib
import sys
from abc import ABC
from pathlib import Path

import pytest

from dynarank._discovery import describe, discover, resolve
from dynarank.integrators.base import AbstractIntegrator
from dynarank.layers._factored import AbstractFactoredLayer
from dynarank.ranks.base import AbstractRankPolicy
from dynarank.ranks.fixed import Fixed
from dynarank.schedules.base import AbstractSchedule

FOLDERS = {
    "dynarank.layers": AbstractFactoredLayer,
    "dynarank.integrators": AbstractIntegrator,
    "dynarank.ranks": AbstractRankPolicy,
    "dynarank.schedules": AbstractSchedule,
}


@pytest.mark.parametrize("package", FOLDERS)
def test_every_file_is_one_method_under_its_own_name(package: str):
    found = discover(package, FOLDERS[package])
    folder = Path(importlib.import_module(package).__path__[0])
    files = {path.stem for path in folder.glob("*.py") if not path.stem.startswith("_")} - {"base"}
    assert set(found) == files
    for name, cls in found.items():
        assert cls.__module__ == f"{package}.{name}"
        heirs = [heir for heir in cls.__subclasses__() if heir.__module__.startswith("dynarank.")]
        assert not heirs, f"{cls.__name__} is final"


@pytest.mark.parametrize("package", FOLDERS)
def test_every_method_says_what_it_is(package: str):
    for cls in discover(package, FOLDERS[package]).values():
        sentence, reference = describe(cls)
        assert len(sentence) > 20, f"{cls.__name__} has no first sentence"
        assert "\n" not in reference


@pytest.mark.parametrize("package", ["dynarank.layers", "dynarank.integrators"])
def test_every_layer_and_integrator_names_its_source(package: str):
    for cls in discover(package, FOLDERS[package]).values():
        assert "http" in describe(cls)[1], f"{cls.__name__} has no reference with a link"


def make_package(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str) -> str:
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text("")
    (folder / name / "base.py").write_text("raise RuntimeError('base is not a method')")
    (folder / name / "_hidden.py").write_text("raise RuntimeError('hidden is not a method')")
    (folder / name / "method.py").write_text(text)
    monkeypatch.syspath_prepend(folder)
    return name


class Base(ABC):  # noqa: B024
    """Stands for an abstract method."""


@pytest.mark.parametrize(("classes", "count"), [("", 0), ("class A(Base): ...\nclass B(Base): ...", 2)])
def test_a_file_without_one_final_class_is_refused(tmp_path, monkeypatch, classes: str, count: int):
    monkeypatch.setitem(sys.modules, "stand_in_base", sys.modules[__name__])
    package = make_package(tmp_path, monkeypatch, f"methods_{count}", f"from stand_in_base import Base\n{classes}")
    with pytest.raises(RuntimeError, match=rf"{package}\.method must hold one final Base, found {count}"):
        discover(package, Base)


def test_resolve_builds_by_name_and_passes_instances_through():
    arguments = ("rank policy", "dynarank.ranks", AbstractRankPolicy)
    assert resolve(*arguments, "fixed", rank=3) == Fixed(3)
    policy = Fixed(2)
    assert resolve(*arguments, policy) is policy


def test_resolve_refuses_what_it_cannot_build():
    arguments = ("rank policy", "dynarank.ranks", AbstractRankPolicy)
    with pytest.raises(ValueError, match=r"unknown rank policy 'fix'\. Available: .*fixed"):
        resolve(*arguments, "fix")
    with pytest.raises(TypeError, match="rank policy must be a name or an instance of AbstractRankPolicy, got int"):
        resolve(*arguments, 3)
    with pytest.raises(TypeError, match="options rank need a name, got an instance"):
        resolve(*arguments, Fixed(), rank=3)
