# SPDX-License-Identifier: Apache-2.0
"""The two engines have the same names, signatures and numbers."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from types import ModuleType

import pytest

import vhost_rpmb
from vhost_rpmb import _fast, _pure, engine
from vhost_rpmb.errors import OperatorError

PACKAGE = Path(vhost_rpmb.__file__).parent
MODULES = (
    *("memory", "inflight", "ring", "split", "packed", "virtqueue", "loop", "mac", "batch"),
    *("device", "library"),
)
CLASSES = ("Authenticator", "GuestMemory", "Hashes", "Library", "Loop", "Virtqueue", "RpmbDevice")


def test_the_engines_export_the_same_names() -> None:
    assert sorted(_fast.__all__) == sorted(_pure.__all__)


@pytest.mark.parametrize("name", MODULES)
def test_each_module_has_a_twin_with_the_same_names(name: str) -> None:
    twins = [vars(package)[name] for package in (_fast, _pure)]
    assert all(isinstance(twin, ModuleType) for twin in twins)
    assert twins[0].__all__ == twins[1].__all__


@pytest.mark.parametrize("name", CLASSES)
def test_classes_have_the_same_public_attributes(name: str) -> None:
    fast, pure = getattr(_fast, name), getattr(_pure, name)
    public = {attribute for attribute in dir(pure) if not attribute.startswith("_")}
    assert {attribute for attribute in dir(fast) if not attribute.startswith("_")} == public
    for attribute in public:
        assert callable(getattr(fast, attribute)) == callable(getattr(pure, attribute))
        assert inspect.getdoc(getattr(pure, attribute)), attribute


def signatures(path: Path, name: str) -> dict[str, str]:
    """Read the signatures of a class's public methods out of a Python or stub file."""
    found = {}
    for node in ast.parse(path.read_text()).body:
        if not isinstance(node, ast.ClassDef) or node.name != name:
            continue
        for method in node.body:
            if isinstance(method, ast.FunctionDef) and (
                not method.name.startswith("_") or method.name == "__init__"
            ):
                arguments, returns = ast.unparse(method.args), method.returns
                found[f"{node.name}.{method.name}"] = (
                    f"({arguments}) -> {ast.unparse(returns) if returns else ''}"
                )
    return found


@pytest.mark.parametrize("name", CLASSES)
def test_signatures_are_the_same(name: str) -> None:
    """Of the stubs, which lint checks against the compiled modules, and the reference."""
    module = getattr(_fast, name).__module__.rpartition(".")[2]
    stub = signatures(PACKAGE / "_fast" / f"{module}.pyi", name)
    assert stub == signatures(Path(inspect.getfile(getattr(_pure, name))), name)
    assert stub


@pytest.mark.parametrize("name", ["device_id", "num_queues"])
def test_the_device_is_the_same_kind(name: str) -> None:
    assert getattr(_fast.RpmbDevice, name) == getattr(_pure.RpmbDevice, name)


def test_an_engine_that_is_neither_is_refused() -> None:
    with pytest.raises(ValueError, match="fast, pure"):
        engine.load("slow")


def test_a_compiled_engine_that_cannot_be_loaded_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(name: str) -> object:
        raise ImportError(f"undefined symbol in {name}")

    monkeypatch.setattr(engine, "_import", broken)
    with pytest.raises(OperatorError, match=r"undefined symbol.*--debug"):
        engine.load("fast")
