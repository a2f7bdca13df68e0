# SPDX-License-Identifier: Apache-2.0
"""Shell completions, generated from the two parsers during a build."""

from pathlib import Path

import build_manpages
import shtab

from vhost_rpmb import arguments, cli
from vhost_rpmb.client import cli as client_cli

FOLDER = Path("build/completions")
NAMES = {"bash": "{}", "zsh": "_{}", "fish": "{}.fish"}


class build_py(build_manpages.build_py):  # noqa: N801
    """Build the package, the man pages and the completions."""

    def run(self) -> None:
        """Generate the completions first, so that they can be installed."""
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
