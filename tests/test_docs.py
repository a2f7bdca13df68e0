# SPDX-License-Identifier: Apache-2.0
"""The command lines of the man pages and the README, run as they are printed.

QEMU's are not among them: tests/e2e attaches real guests. Neither is what builds and installs.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAN_PAGES = ("vhost-user-rpmb", "vhost-rpmb-client")
ELSEWHERE = ("qemu-system", "make ", "pip ")
WAIT = "while ! test -S rpmb.sock; do sleep 0.05; done"


def of_man_page(name: str) -> list[str]:
    """The examples of a man page, one a block."""
    source = (ROOT / "docs" / "man" / f"{name}.inc").read_text()
    examples = source.partition("[EXAMPLES]\n")[2].partition("\n[")[0]
    blocks = re.findall(r"^\.nf\n(.*?)^\.fi$", examples, re.MULTILINE | re.DOTALL)
    return [block.replace("\\-", "-").replace("\\e", "\\") for block in blocks]


def of_readme() -> list[str]:
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"^\n((?:    .*\n)+)", text, re.MULTILINE)
    return [re.sub("^    ", "", block, flags=re.MULTILINE) for block in blocks]


def script(blocks: list[str]) -> str:
    """One script of all blocks; a daemon that a block starts serves what follows it."""
    lines = ["set -eu"]
    for block in blocks:
        for line in block.replace("\\\n", " ").splitlines():
            command = line.partition("    #")[0].strip()
            if not command or command.startswith(ELSEWHERE):
                continue
            if command.startswith("vhost-user-rpmb "):
                # A person would start the next one only after ending this one.
                lines += ['for job in $(jobs -p); do kill "$job"; done', "wait"]
                lines += [f"{command.removesuffix('&')} &", WAIT]
            else:
                lines.append(command)
    return "\n".join([*lines, 'for job in $(jobs -p); do kill "$job"; done', "wait"])


@pytest.mark.parametrize("name", [*MAN_PAGES, "README"])
def test_the_examples_run_as_printed(name: str, tmp_path: Path) -> None:
    blocks = of_readme() if name == "README" else of_man_page(name)
    program = script(blocks)
    assert program.count("vhost-") >= 2
    done = subprocess.run(
        ["bash", "-c", program],
        cwd=tmp_path,
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, f"{program}\n{done.stderr}"
