# SPDX-License-Identifier: Apache-2.0
"""The page of measurements shows one run, and another daemon can be measured as ours are."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench import page, plots
from bench.daemon import counter_of
from tests.support.daemon import Daemon, environment
from tests.support.documents import ROOT
from tests.support.oracle import KEY

pytestmark = pytest.mark.needs_sources

RUN = json.loads(page.RUN.read_text())


def test_tables_are_those_of_the_run() -> None:
    text = page.PAGE.read_text()
    assert page.filled(text, RUN) == text
    for goal in RUN["goals"]:
        assert goal["name"] in text


def test_figures_have_their_tests() -> None:
    """Each row and each goal of the run is made by a test of today's suite."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "bench"]
    collected = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    shown = [*RUN["rows"], *RUN["goals"]]
    assert shown
    assert {each["test"] for each in shown} <= set(collected)


@pytest.mark.parametrize("theme", plots.THEMES)
def test_plots_show_the_run(tmp_path: Path, theme: str) -> None:
    plots.draw(RUN, tmp_path)
    texts = {
        name: re.sub(r"<[^>]*>", "\n", (tmp_path / f"{name}-{theme}.svg").read_text())
        for name in plots.PLOTS
    }
    for goal in RUN["goals"]:
        assert goal["name"] in texts["goals"]
        label = f"{page.number(goal['reached'])} ({page.limit(goal)})"
        assert label in texts["goals"]
    rows = page.rows_of(RUN, "test_latency")
    assert rows
    for row in rows:
        assert f"{row['work']}, {row['depth']} in flight, {row['placement']}" in texts["latency"]
        assert f"{page.number(row['p50_us'])} µs" in texts["latency"]
    for name in plots.PLOTS:
        assert f"plots/{name}-{theme}.svg" in page.PAGE.read_text()


def peer_commands(socket: Path, key: Path, rows: str) -> list[str]:
    """What ``make bench-peer`` runs, without what it installs."""
    command = ["make", "--dry-run", "bench-peer", f"SOCKET={socket}", f"KEY={key}"]
    more = [f"BENCH_ARGS=-k '{rows}'"]
    lines = subprocess.run(
        [*command, *more], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.replace("\\\n", "")
    found = [line for line in lines.splitlines() if re.search(r"\bbench[./]", line)]
    assert len(found) == 2
    return found


def measure_peer(daemon: Daemon, key: Path, rows: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", " && ".join(peer_commands(daemon.socket_path, key, rows))],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )


@pytest.mark.timeout(1200)  # 82,000 requests, one after another
def test_peer_is_measured_beside_ours(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_bytes(KEY)
    with Daemon(tmp_path, engine="pure") as daemon:
        os.sched_setaffinity(daemon.pid, {0})
        done = measure_peer(daemon, key, "two")
        written = counter_of(daemon.socket_path, KEY)
    assert done.returncode == 0, done.stdout + done.stderr
    assert written  # by the measurement
    kinds = page.kinds(page.reduced(json.loads((ROOT / "build/peer.json").read_text())))
    rows = re.findall(r"^\| (.*) \| 1 \| two CPUs \| (.*) \| (.*) \| (.*) \|$", done.stdout, re.M)
    assert [work for work, *_ in rows] == ["counter", "read", "durable write"]
    for work, ours, theirs, ratio in rows:
        found = kinds[work, 1, "two CPUs"]
        assert ours == page.number(found["ours"]["p50_us"])
        assert theirs == page.number(found["peer"]["p50_us"])
        assert float(theirs) / float(ours) == pytest.approx(float(ratio), rel=0.02)


def test_peer_elsewhere_and_a_wrong_key_are_refused(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_bytes(KEY)
    with Daemon(tmp_path, engine="pure") as daemon:
        os.sched_setaffinity(daemon.pid, {0, 1})
        elsewhere = measure_peer(daemon, key, "two and counter")
        key.write_bytes(KEY[1:])
        wrong_key = measure_peer(daemon, key, "two and counter")
    assert "expected the daemon at" in elsewhere.stdout + elsewhere.stderr
    assert "start it by taskset" in elsewhere.stdout + elsewhere.stderr
    assert "expected a key of 32 bytes in" in wrong_key.stdout + wrong_key.stderr
    assert elsewhere.returncode != 0
    assert wrong_key.returncode != 0
