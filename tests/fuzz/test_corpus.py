# SPDX-License-Identifier: Apache-2.0
"""Every input of the fuzz corpora, on both engines, which have to leave the same things behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuzz import TARGETS
from tests.fuzz.targets import Target
from vhost_rpmb import engine as engines

CORPUS = Path(__file__).parent / "corpus"
INPUTS = sorted(CORPUS.glob("*/*"))


@pytest.fixture(scope="module", params=sorted(TARGETS))
def targets(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, list[Target]]]:
    """One target on each engine."""
    made = [
        TARGETS[request.param](engines.load(name), tmp_path_factory.mktemp(name))
        for name in engines.ENGINES
    ]
    yield request.param, made
    for target in made:
        target.close()


def test_inputs_leave_the_same_behind(targets: tuple[str, list[Target]]) -> None:
    name, (fast, pure) = targets
    inputs = [path for path in INPUTS if path.parent.name == name]
    assert inputs
    for path in inputs:
        data = path.read_bytes()
        assert fast.run(data) == pure.run(data), path.name


def test_every_input_belongs_to_a_target() -> None:
    assert {path.parent.name for path in INPUTS} == set(TARGETS)
