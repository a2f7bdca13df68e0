# SPDX-License-Identifier: Apache-2.0
"""The imports that docs/architecture.md allows are those of the tree; named files and names exist.

`import` and `cimport` count, also those inside functions and those for type checkers only. The
latter are no cycle, because they do not run.
"""

from __future__ import annotations

import ast
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

pytestmark = pytest.mark.needs_sources
ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "vhost_rpmb"
DOCUMENTS = ("CONTRIBUTING.md", "docs/architecture.md")
ENGINES = ("vhost_rpmb._fast", "vhost_rpmb._pure")
ENGINE_TESTS = ("tests/rpmb/", "tests/virtio/")
CYTHON_IMPORT = re.compile(r"^ *from (vhost_rpmb[\w.]*) c?import (\([^)]*\)|.*)$", re.MULTILINE)
PATH = re.compile(r"`([\w.@-]+(?:/[\w.@-]+)*/?[\w.@-]*)(?:::([\w.]+))?`")


class Import(NamedTuple):
    importer: str
    imported: str
    runs: bool  # not for type checkers only


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


SOURCES = [
    path for path in sorted(PACKAGE.rglob("*")) if path.suffix in (".py", ".pyi", ".pyx", ".pxd")
]
MODULES = {module_name(path) for path in SOURCES}


def of_python(path: Path) -> Iterator[Import]:
    tree = ast.parse(path.read_text())
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "vhost_rpmb":
                runs = id(node) not in for_types and path.suffix != ".pyi"
                yield Import(module_name(path), resolve(name), runs)


def of_cython(path: Path) -> Iterator[Import]:
    text = path.read_text()
    assert not re.search(r"^ *c?import vhost_rpmb", text, re.MULTILINE), path
    for module, names in CYTHON_IMPORT.findall(text):
        for name in re.findall(r"[\w*]+", re.sub("#.*", "", names)):
            imported = resolve(f"{module}.{name}")
            if imported != module_name(path):  # a .pyx file includes its own .pxd file
                yield Import(module_name(path), imported, True)


def resolve(name: str) -> str:
    """The module that a dotted name belongs to."""
    return name if name in MODULES else name.rpartition(".")[0]


def imports() -> set[Import]:
    return {
        each
        for path in SOURCES
        for each in (of_python if path.suffix in (".py", ".pyi") else of_cython)(path)
    }


IMPORTS = imports()


def rows() -> dict[str, set[str]]:
    """The table of the page: a module or package, and those that it may import."""
    text = (ROOT / "docs/architecture.md").read_text()
    table = re.findall(r"^\| `([\w.]+)` \|[^|\n]*\| ([^|\n]*) \|$", text, re.MULTILINE)
    return {name: set(re.findall(r"`([\w.]+)`", allowed)) for name, allowed in table}


ROWS = rows()


def row_of(module: str) -> str:
    """The row of a module: that of the longest name that leads to it."""
    name = module.removeprefix("vhost_rpmb").removeprefix(".") or "vhost_rpmb"
    while name not in ROWS:
        name, dot, _ = name.rpartition(".")
        assert dot, f"{module} has no row"
    return name


def test_each_module_has_a_row_and_each_row_a_module() -> None:
    assert {row_of(module) for module in MODULES} == set(ROWS)


def test_allowed_imports_lead_downward() -> None:
    names = list(ROWS)
    for position, (name, allowed) in enumerate(ROWS.items()):
        assert allowed <= set(names[position + 1 :]), name


def test_imports_are_the_allowed_ones() -> None:
    found: dict[str, set[str]] = {name: set() for name in ROWS}
    for importer, imported, _ in IMPORTS:
        if row_of(importer) != row_of(imported):
            found[row_of(importer)].add(row_of(imported))
    assert found == ROWS


def test_no_module_imports_by_a_computed_name() -> None:
    for path in SOURCES:
        assert not re.search(r"[^.]import_module\(|__import__\(", path.read_text()), path


def test_no_cycle() -> None:
    graph: dict[str, set[str]] = {}
    for importer, imported, runs in IMPORTS:
        if runs:
            graph.setdefault(importer, set()).add(imported)
    graphlib.TopologicalSorter(graph).prepare()


def test_only_the_choice_of_the_engine_and_tests_of_engines_import_them() -> None:
    for importer, imported, _ in IMPORTS:
        if imported.startswith(ENGINES) and not importer.startswith(ENGINES):
            assert importer == "vhost_rpmb.engine"
    for folder in ("bench", "tests", "tools"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if any(each.imported.startswith(ENGINES) for each in of_python(path)):
                assert str(path.relative_to(ROOT)).startswith(ENGINE_TESTS)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_named_files_and_names_exist(document: str) -> None:
    text = re.sub(r"```.*?```", "", (ROOT / document).read_text(), flags=re.DOTALL)
    named = 0
    for path, names in PATH.findall(text):
        if "/" not in path and not names:
            continue
        named += 1
        assert (ROOT / path).exists(), path
        source = (ROOT / path).read_text() if names else ""
        for name in filter(None, names.split(".")):
            definition = rf"\b(def|class) {name}\b|^ *{name}\b[^=\n]*=|^ *cdef .*\b{name}\("
            assert re.search(definition, source, re.MULTILINE), f"{path}::{names}"
    assert named
    folder = (ROOT / document).parent
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert target.startswith("https://") or (folder / target).exists(), target


def test_named_tests_exist() -> None:
    """Pages may name tests without their folder."""
    files = [*(ROOT / "tests").rglob("*.py"), *(ROOT / "bench").glob("*.py")]
    tests = {path: path.read_text() for path in files}
    defined = {name for text in tests.values() for name in re.findall(r"def (test_\w+)", text)}
    defined |= {path.name for path in tests}
    for page in sorted((ROOT / "docs").rglob("*.md")):
        prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
        named = set(re.findall(r"\btest_\w+(?:\.py)?", prose)) - {"test_x"}
        assert named <= defined, page
