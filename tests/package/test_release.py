# SPDX-License-Identifier: Apache-2.0
"""Whatever runs while a release is built, tested and published is pinned."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

pytestmark = pytest.mark.needs_sources

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "tools"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
WORKFLOW = (ROOT / ".github/workflows/release.yml").read_text()


def requirements(name: str) -> list[Requirement]:
    lines = [line for line in (TOOLS / name).read_text().splitlines() if line[:1] not in ("#", "")]
    return [
        Requirement(line.removesuffix("\\")) for line in lines if not line.startswith((" ", "\t"))
    ]


def test_actions_are_pinned_by_commit() -> None:
    actions = re.findall(r"uses: *(.*)", WORKFLOW)
    assert actions
    for action in actions:
        assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action), action


def test_packages_are_installed_by_hash_only() -> None:
    commands = [WORKFLOW, (TOOLS / "release-packages").read_text()]
    settings = PROJECT["tool"]["cibuildwheel"]
    commands += [settings["before-build"], settings["before-test"]]
    lines = [line for line in "\n".join(commands).splitlines() if line[:1] != "#"]
    for line in lines:
        if re.search(r"\b(pip|pipx|uv)\b.* (install|run|wheel|download)\b", line):
            assert "python -m pip install --require-hashes" in line
    assert "test-requires" not in settings
    assert settings["build-frontend"]["args"] == ["--no-isolation"]
    for build in re.findall(r"python -m build.*", WORKFLOW):
        assert "--no-isolation" in build


def test_pins_are_complete() -> None:
    pinned = {
        canonicalize_name(pin.name): pin
        for name in ("release.txt", "release-sdists.txt")
        for pin in requirements(name)
    }
    for pin in pinned.values():
        assert re.fullmatch(r"==[\w.]+", str(pin.specifier)), pin
    needed = requirements("release.in")
    needed += map(Requirement, PROJECT["build-system"]["requires"])
    needed += map(Requirement, PROJECT["project"]["dependencies"])
    for requirement in needed:
        (version,) = pinned[canonicalize_name(requirement.name)].specifier
        assert requirement.specifier.contains(version.version), requirement
