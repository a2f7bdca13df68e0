# SPDX-License-Identifier: Apache-2.0
"""The argument parser that both programs use."""

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import Any, NoReturn

from vhost_rpmb.errors import UsageError
from vhost_rpmb.values import WrongValue, path

__all__ = ["Parser", "converted", "nearest", "parsers", "path_argument"]

_WRONG_CHOICE = re.compile(r"invalid choice: '([^']*)'")


class Parser(argparse.ArgumentParser):
    """Raises ``UsageError`` for a wrong argument and suggests the nearest valid word.

    It neither prints the usage nor ends the process. Options cannot be abbreviated: a new option
    could change the meaning of an abbreviation.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(
            allow_abbrev=False,
            formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, width=98),
            **options,
        )
        self._arguments: Sequence[str] | None = None  # as parsed

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as usual, and keep the arguments for the text of an error."""
        self._arguments = sys.argv[1:] if args is None else args
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Raise UsageError."""
        raise UsageError(f"{message}{self._suggestion(message)} (see {self.prog} --help)")

    def _suggestion(self, message: str) -> str:
        if choice := _WRONG_CHOICE.search(message):
            unknown = [choice[1]]
            choices = [action.choices for action in self._actions if action.choices]
            candidates = [(unknown, {str(word) for row in choices for word in row})]
        else:
            candidates = list(self._unknown_options())
        for unknown, valid in candidates:
            for word in unknown:
                if found := nearest(word, valid):
                    return f"; did you mean {found} instead of {word}?"
        return ""

    def _unknown_options(self) -> Iterator[tuple[list[str], set[str]]]:
        """Yield the unknown and the valid options: after the command's name, then before it.

        The parser of the command in use has parsed the arguments after its name.
        """
        used = [
            (parser, parser._arguments)
            for parser in parsers(self)
            if isinstance(parser, Parser) and parser._arguments is not None
        ]
        after = 0
        for parser, arguments in reversed(used):
            valid = set(parser._option_string_actions)
            own = [word.partition("=")[0] for word in arguments[: len(arguments) - after]]
            yield [word for word in own if word.startswith("--") and word not in valid], valid
            after = len(arguments)


def nearest(word: str, valid: Iterable[str]) -> str | None:
    """Return the valid word that a wrong one resembles most, if it resembles any."""
    import difflib  # imported lazily: not needed on a normal start

    return next(iter(difflib.get_close_matches(word, sorted(valid), 1)), None)


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Yield the parser and the parsers of its commands."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from parsers(command)


@cache
def converted(convert: Callable[[str], object]) -> Callable[[str], Any]:
    """Return the type of an argument, of which the parser prints the errors; one for each."""

    def argument(text: str) -> object:
        try:
            return convert(text)
        except WrongValue as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return argument


path_argument = converted(path)
