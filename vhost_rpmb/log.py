# SPDX-License-Identifier: Apache-2.0
"""Lines on standard error, of both programs: one format, and a limit on what a peer can cause.

Each line names the program and the severity. Where standard error goes to systemd's journal it
begins with the priority of sd-daemon(3).
"""

from __future__ import annotations

import logging
import os
import time

__all__ = ["FailureLog", "Formatter", "LimitedLog", "configure", "fatal", "warn"]

_LEVELS = (logging.WARNING, logging.INFO, logging.DEBUG, logging.NOTSET + 1)  # by verbosity
_PRIORITIES = {logging.ERROR: 3, logging.WARNING: 4, logging.INFO: 6, logging.DEBUG: 7}  # syslog
_JOURNAL_VARIABLE = "JOURNAL_STREAM"


class Formatter(logging.Formatter):
    """Formats a line as ``program: severity: text``, with its priority for the journal.

    The journal records the time; elsewhere debug lines begin with it.
    """

    def __init__(self, program: str) -> None:
        super().__init__()
        self._program = program
        journal = _goes_to_journal()
        self._prefixes = {level: f"<{_PRIORITIES[level]}>" for level in _PRIORITIES if journal}

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, without its end."""
        prefix = self._prefixes.get(record.levelno, "")
        if record.levelno <= logging.DEBUG and not prefix:
            # UTC, because the sandbox may have no file of time zones.
            second = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            prefix = f"{second}.{int(record.msecs):03}Z "
        severity = record.levelname.lower()
        return f"{prefix}{self._program}: {severity}: {super().format(record)}"


class LimitedLog:
    """Warnings that a guest or a front-end can cause: one line for each rule and interval.

    A rule is one of a fixed set of texts, so that the table stays small. The first line after the
    interval gives the number of omitted lines.
    """

    def __init__(self, target: logging.Logger, interval: float = 10.0) -> None:
        self._target = target
        self._interval = interval  # seconds
        self._next: dict[str, float] = {}
        self._omitted: dict[str, int] = {}

    def report(self, rule: str, text: str) -> None:
        """Log `text`, unless a line for `rule` was logged within the interval."""
        now = time.monotonic()
        if now < self._next.get(rule, now):
            self._omitted[rule] = self._omitted.get(rule, 0) + 1
            return
        self._next[rule] = now + self._interval
        omitted = self._omitted.pop(rule, 0)
        self._target.warning("%s%s", text, f" ({omitted} more before)" if omitted else "")


class FailureLog:
    """Failures that can last: a line when one begins or changes, and ``recovered`` after the last.

    A guest can repeat the request that fails.
    """

    def __init__(self, target: logging.Logger, recovered: str = "") -> None:
        self._target = target
        self._recovered = recovered
        self._last = ""

    def report(self, failure: str) -> None:
        """Log the present failure, unless it is known; empty: there is none."""
        if failure and failure != self._last:
            self._target.error("%s", failure)
        elif self._last and not failure and self._recovered:
            self._target.warning("%s", self._recovered)
        self._last = failure


def configure(program: str, verbosity: int) -> None:
    """Send the package's log to standard error, from warnings (0) to everything (3)."""
    package = logging.getLogger("vhost_rpmb")
    package.handlers[:] = [_handler(program)]
    package.propagate = False
    package.setLevel(_LEVELS[min(verbosity, len(_LEVELS) - 1)])


def warn(program: str, text: str) -> None:
    """Print one warning on standard error, whatever is configured."""
    _print(program, logging.WARNING, text)


def fatal(program: str, text: str, status: int) -> int:
    """Print the line that states why the program ends; return its exit status."""
    _print(program, logging.ERROR, text)
    return status


def _print(program: str, level: int, text: str) -> None:
    line = " ".join(text.splitlines())
    record = logging.LogRecord("vhost_rpmb", level, __file__, 0, line, None, None)
    _handler(program).handle(record)


def _handler(program: str) -> logging.Handler:
    handler = logging.StreamHandler()
    handler.setFormatter(Formatter(program))
    return handler


def _goes_to_journal() -> bool:
    """Tell whether standard error is the stream that systemd connected to the journal."""
    journal = os.environ.get(_JOURNAL_VARIABLE)
    if journal is None:
        return False
    try:
        stream = os.fstat(2)
    except OSError:
        return False
    return journal == f"{stream.st_dev}:{stream.st_ino}"
