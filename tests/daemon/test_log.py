# SPDX-License-Identifier: Apache-2.0
"""Lines on standard error: their form, and the limit on those that a guest can cause."""

from __future__ import annotations

import logging

import pytest

from vhost_rpmb.log import LimitedLog, fatal, warn


def test_one_line_per_rule_and_interval(caplog: pytest.LogCaptureFixture) -> None:
    log = LimitedLog(logging.getLogger("vhost_rpmb.test"), interval=1000)
    for _ in range(3):
        log.report("one", "the first")
        log.report("other", "the second")
    assert [record.getMessage() for record in caplog.records] == ["the first", "the second"]


def test_next_line_counts_what_was_left_out(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 5.0
    monkeypatch.setattr("vhost_rpmb.log.time.monotonic", lambda: now)
    log = LimitedLog(logging.getLogger("vhost_rpmb.test"), interval=10)
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
