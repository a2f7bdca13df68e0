# SPDX-License-Identifier: Apache-2.0
"""What the command lines of both programs have in common."""

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from vhost_rpmb.errors import UsageError

__all__ = ["Parser", "parsers", "path_argument"]

_WRONG_CHOICE = re.compile(r"invalid choice: '([^']*)'")


class Parser(argparse.ArgumentParser):
    """Reports what is wrong as a ``UsageError`` that names the nearest right word.

    The usage is not printed and the process does not end. Options cannot be abbreviated: a new one
    would change what an abbreviation means.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(
            allow_abbrev=False,
            formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, width=98),
            **options,
        )
        self._given: Sequence[str] | None = None

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Remember what is parsed, for the message of an error."""
        self._given = sys.argv[1:] if args is None else args
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Raise UsageError."""
        raise UsageError(f"{message}{self._nearest(message)} (see {self.prog} --help)")

    def _nearest(self, message: str) -> str:
        import difflib  # only here: it is not for a start as usual

        if choice := _WRONG_CHOICE.search(message):
            wrong = [choice[1]]
            choices = [action.choices for action in self._actions if action.choices]
            candidates = [(wrong, {str(word) for row in choices for word in row})]
        else:
            candidates = list(self._options_in_use())
        for wrong, right in candidates:
            for word in wrong:
                if found := difflib.get_close_matches(word, sorted(right), 1):
                    return f"; did you mean {found[0]} instead of {word}?"
        return ""

    def _options_in_use(self) -> Iterator[tuple[list[str], set[str]]]:
        """Give the unknown options, and those known there: behind the command, then before it.

        A command that is in use has been given the words behind its name.
        """
        given = [
            (parser, parser._given)
            for parser in parsers(self)
            if isinstance(parser, Parser) and parser._given is not None
        ]
        behind = 0
        for parser, words in reversed(given):
            right = set(parser._option_string_actions)
            own = [word.partition("=")[0] for word in words[: len(words) - behind]]
            yield [word for word in own if word.startswith("--") and word not in right], right
            behind = len(words)


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Give the parser and those of its commands."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from parsers(command)


def path_argument(text: str) -> str:
    """Return ``text``, which has to be usable as a path."""
    if not text:
        raise argparse.ArgumentTypeError("expected a path, found an empty string")
    return text
