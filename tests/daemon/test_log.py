# SPDX-License-Identifier: Apache-2.0
"""Lines on standard error: their form, and the limit on those that a guest can cause."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from vhost_rpmb.log import DEBUG, ERROR, INFO, LimitedLog, Logger, fatal, warn


def test_one_line_per_rule_and_interval(caplog: pytest.LogCaptureFixture) -> None:
    log = LimitedLog(Logger("vhost_rpmb.test"), interval=1000)
    for _ in range(3):
        log.report("one", "the first")
        log.report("other", "the second")
    assert [record.getMessage() for record in caplog.records] == ["the first", "the second"]


def test_next_line_counts_what_was_left_out(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 5.0
    monkeypatch.setattr("vhost_rpmb.log.time.monotonic", lambda: now)
    log = LimitedLog(Logger("vhost_rpmb.test"), interval=10)
    for _ in range(4):
        log.report("rule", "text")
    now = 15.0
    log.report("rule", "text")
    now = 25.0
    log.report("rule", "text")
    assert [record.getMessage() for record in caplog.records] == [
        "text",
        "text (3 more before)",
        "text",
    ]


def test_fatal_prints_one_line_and_returns_the_status(capfd: pytest.CaptureFixture[str]) -> None:
    assert fatal("program", "expected a,\nfound 100%s", 2) == 2
    assert capfd.readouterr() == ("", "program: error: expected a, found 100%s\n")


def test_warn_prints_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    warn("program", "text")
    assert capfd.readouterr() == ("", "program: warning: text\n")


def test_missing_stderr_is_no_error(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr", None)
    assert fatal("program", "text", 1) == 1
    assert capfd.readouterr() == ("", "")


PROGRAM = """
import sys
from vhost_rpmb import log
log.configure("program", int(sys.argv[1]))
logger = log.Logger("vhost_rpmb.test")
logger.error("100%")
logger.warning("%d of %s", 1, "two")
logger.info("info")
logger.debug("debug")
logger.log(log.FRAMES, "frame")
assert [logger.enabled(level) for level in (log.WARNING, log.FRAMES)] == [True, sys.argv[1] == "3"]
print("logging" in sys.modules)
"""


@pytest.mark.parametrize("verbosity", range(4))
def test_verbosity_selects_the_lines_and_needs_no_logging(verbosity: int) -> None:
    command = [sys.executable, "-c", PROGRAM, str(verbosity)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    time = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z "
    expected = [
        "program: error: 100%",
        "program: warning: 1 of two",
        "program: info: info",
        f"{time}program: debug: debug",
        f"{time}program: level 1: frame",
    ]
    lines = done.stderr.splitlines()
    assert len(lines) == 2 + verbosity
    assert all(map(re.fullmatch, expected, lines))
    assert done.stdout == "False\n"


def test_records_go_to_logging_unless_configured(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "vhost_rpmb.test")
    logger = Logger("vhost_rpmb.test")
    logger.error("%s", "text")
    logger.debug("omitted")
    assert caplog.record_tuples == [("vhost_rpmb.test", ERROR, "text")]
    assert logger.enabled(INFO)
    assert not logger.enabled(DEBUG)
