# SPDX-License-Identifier: Apache-2.0
"""What a build makes of the two parsers besides the man pages: completions for the shells."""

from pathlib import Path

import build_manpages
import shtab

from vhost_rpmb import arguments, cli
from vhost_rpmb.client import cli as client_cli

FOLDER = Path("build/completions")
NAMES = {"bash": "{}", "zsh": "_{}", "fish": "{}.fish"}


class build_py(build_manpages.build_py):  # noqa: N801
    """Builds the package, the man pages and the completions."""

    def run(self) -> None:
        """Make the completions first, so that they are there to be installed."""
        FOLDER.mkdir(parents=True, exist_ok=True)
        for parser in (cli.build_parser(), client_cli.build_parser()):
            for each in arguments.parsers(parser):
                for action in each._actions:
                    if action.type is arguments.path_argument:
                        action.complete = shtab.FILE
            for shell, name in NAMES.items():
                path = FOLDER / name.format(parser.prog)
                path.write_text(shtab.complete(parser, shell=shell))
        super().run()
