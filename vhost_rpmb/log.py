# SPDX-License-Identifier: Apache-2.0
"""Lines on standard error, of both programs: one format, and a limit on what a peer can cause.

Each line names the program and the severity. Where standard error goes to systemd's journal it
begins with the priority of sd-daemon(3).

The programs do without `logging`, whose import takes 1 MiB of memory and 3 ms of each start. In a
process that does not call `configure`, such as a test suite, it gets all records, under the names
of the modules.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress

__all__ = [
    "DEBUG",
    "ERROR",
    "FRAMES",
    "INFO",
    "WARNING",
    "FailureLog",
    "LimitedLog",
    "Logger",
    "configure",
    "fatal",
    "warn",
]

# Levels, with the numbers of `logging`.
FRAMES, DEBUG, INFO, WARNING, ERROR = 1, 10, 20, 30, 40
_LEVELS = (WARNING, INFO, DEBUG, FRAMES)  # by verbosity
# Of syslog, and the words for the reader; a frame is a detail of debugging.
_PRIORITIES = {ERROR: 3, WARNING: 4, INFO: 6, DEBUG: 7}
_SEVERITIES = {ERROR: "error", WARNING: "warning", INFO: "info", DEBUG: "debug", FRAMES: "level 1"}
_JOURNAL_VARIABLE = "JOURNAL_STREAM"


class _Output:
    """Where the lines of a program go, from a level on."""

    def __init__(self, program: str, level: int) -> None:
        self._program = program
        self.level = level
        self._journal = _goes_to_journal()

    def write(self, level: int, text: str) -> None:
        """Write one line, as far as there is a standard error."""
        line = f"{self._prefix(level)}{self._program}: {_SEVERITIES[level]}: {text}\n"
        with suppress(OSError, ValueError):  # closed
            if sys.stderr is not None:
                sys.stderr.write(line)
                sys.stderr.flush()

    def _prefix(self, level: int) -> str:
        """The priority for the journal, which records the time; elsewhere the time, if DEBUG."""
        if self._journal and level in _PRIORITIES:
            return f"<{_PRIORITIES[level]}>"
        if level > DEBUG:
            return ""
        now = time.time()
        # UTC, because the sandbox may have no file of time zones.
        second = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now))
        return f"{second}.{int(now % 1 * 1000):03}Z "


_output: _Output | None = None


class Logger:
    """Logs the records of a module: texts with arguments in the style of ``%``."""

    def __init__(self, name: str) -> None:
        self._name = name

    def enabled(self, level: int) -> bool:
        """Whether records of a level are kept."""
        if _output is not None:
            return level >= _output.level
        import logging  # imported lazily: see above

        return logging.getLogger(self._name).isEnabledFor(level)

    def log(self, level: int, text: str, *arguments: object) -> None:
        """Log a record of a level."""
        if _output is None:
            import logging  # imported lazily: see above

            logging.getLogger(self._name).log(level, text, *arguments)
        elif level >= _output.level:
            _output.write(level, text % arguments if arguments else text)

    def error(self, text: str, *arguments: object) -> None:
        """Log an error."""
        self.log(ERROR, text, *arguments)

    def warning(self, text: str, *arguments: object) -> None:
        """Log a warning."""
        self.log(WARNING, text, *arguments)

    def info(self, text: str, *arguments: object) -> None:
        """Log what --verbose shows."""
        self.log(INFO, text, *arguments)

    def debug(self, text: str, *arguments: object) -> None:
        """Log what a second --verbose shows."""
        self.log(DEBUG, text, *arguments)


class LimitedLog:
    """Warnings that a guest or a front-end can cause: one line for each rule and interval.

    A rule is one of a fixed set of texts, so that the table stays small. The first line after the
    interval gives the number of omitted lines.
    """

    def __init__(self, target: Logger, interval: float = 10.0) -> None:
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

    def __init__(self, target: Logger, recovered: str = "") -> None:
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
    global _output  # noqa: PLW0603
    _output = _Output(program, _LEVELS[min(verbosity, len(_LEVELS) - 1)])


def warn(program: str, text: str) -> None:
    """Print one warning on standard error, whatever is configured."""
    _print(program, WARNING, text)


def fatal(program: str, text: str, status: int) -> int:
    """Print the line that states why the program ends; return its exit status."""
    _print(program, ERROR, text)
    return status


def _print(program: str, level: int, text: str) -> None:
    _Output(program, level).write(level, " ".join(text.splitlines()))


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
