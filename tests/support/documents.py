# SPDX-License-Identifier: Apache-2.0
"""The command lines and files that the documentation prints, for the tests that run them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
GUIDES = ROOT / "docs" / "guides"


class Block(NamedTuple):
    """A block that is printed as it is to be typed or stored; ``language`` is "sh", "xml", ..."""

    language: str
    text: str


def blocks_of_guide(name: str) -> list[Block]:
    """The blocks of a guide, in order."""
    text = (GUIDES / f"{name}.md").read_text()
    found = re.findall(r"^```([a-z]+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(language, text) for language, text in found]


def blocks_that_begin(name: str, beginning: str) -> list[str]:
    """The blocks of a guide that begin so; there is one at least."""
    found = [text for _, text in blocks_of_guide(name) if text.startswith(beginning)]
    assert found
    return found


def blocks_of_man_page(name: str) -> list[Block]:
    """The examples of a man page."""
    source = (ROOT / "docs" / "man" / f"{name}.inc").read_text()
    examples = source.partition("[EXAMPLES]\n")[2].partition("\n[")[0]
    found = re.findall(r"^\.nf\n(.*?)^\.fi$", examples, re.MULTILINE | re.DOTALL)
    return [Block("sh", text.replace("\\-", "-").replace("\\e", "\\")) for text in found]


def blocks_of_readme() -> list[Block]:
    """The command lines of the README."""
    text = (ROOT / "README.md").read_text()
    found = re.findall(r"^\n((?:    .*\n)+)", text, re.MULTILINE)
    return [Block("sh", re.sub("^    ", "", text, flags=re.MULTILINE)) for text in found]


def demo_of_readme() -> list[str]:
    """The lines of the demo that the README shows."""
    text = (ROOT / "README.md").read_text()
    shown = re.search(r"^```text\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert shown is not None
    return shown[1].splitlines()


def commands(block: str) -> list[str]:
    """The commands of a block, each on one line, without comments."""
    lines = (line.partition("    # ")[0] for line in block.replace("\\\n", "").splitlines())
    return [command for line in lines if (command := " ".join(line.split()))]
