# SPDX-License-Identifier: Apache-2.0
"""Fuzz one target: ``python -m tests.fuzz TARGET [libFuzzer option or corpus folder ...]``.

Needs Atheris, and the compiled engine built with the sanitizers and coverage; `make fuzz` sees to
both.
"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
import traceback
from pathlib import Path

atheris = importlib.import_module("atheris")  # not in the environment that the linters see

# The engine reports its coverage by itself; of Python, what reads a front-end's bytes.
with atheris.instrument_imports(include=["vhost_rpmb.vhost_user"]):
    from tests.fuzz import TARGETS
    from vhost_rpmb import engine as engines


def _abort(unraisable: sys.UnraisableHookArgs) -> None:
    """An exception where none can be raised, as in a checked leaf function, is a finding."""
    traceback.print_exception(unraisable.exc_value)
    os.abort()


def main() -> None:
    name = sys.argv.pop(1)
    sys.unraisablehook = _abort
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir="/dev/shm") as folder:
        targets = []
        for engine in engines.ENGINES:
            place = Path(folder) / engine
            place.mkdir()
            targets.append(TARGETS[name](engines.load(engine), place))

        def run_both(data: bytes) -> None:
            fast, pure = (target.run(data) for target in targets)
            assert fast == pure, "the engines left different things behind"

        atheris.Setup(sys.argv, run_both)
        atheris.Fuzz()


main()
