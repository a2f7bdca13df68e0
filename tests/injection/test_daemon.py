# SPDX-License-Identifier: Apache-2.0
"""Conversations with a real daemon that injects faults, one for each action."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest

from tests.injection.conftest import FaultyDaemon, rule
from tests.support.daemon import processor_time, until
from tests.support.oracle import EXPIRED, KEY, READ, WRITE, A, B, Frame, read_counter, sealed
from vhost_rpmb.driver.errors import BackendError, RpmbResultError, VerificationError
from vhost_rpmb.driver.rpmb import RpmbClient
from vhost_rpmb.engine import Engine
from vhost_rpmb.rpmb import spec

BLOCK = 256
BEFORE = 'request = "DATA_WRITE"; when = "before"'
AFTER = 'request = "DATA_WRITE"; when = "after"'


def authentic(error: pytest.ExceptionInfo[RpmbResultError]) -> int:
    """The result, of an answer with the right MAC."""
    assert error.value.authenticated
    return error.value.result


def abandon(client: RpmbClient) -> None:
    """Close a client whose daemon does not answer any more."""
    client.__exit__(BackendError, None, None)


def test_writes_fail_before_and_after_they_are_durable(faulty_daemon: FaultyDaemon) -> None:
    answer = 'action = "answer"; result = "WRITE_FAILURE"'
    device = faulty_daemon(rule(f"{BEFORE}; {answer}", nth=3) + rule(f"{AFTER}; {answer}", nth=5))
    with device.client(KEY) as client:
        for number in range(2):
            client.write(number, A)
        with pytest.raises(RpmbResultError) as error:
            client.write(2, A)
        assert authentic(error) == WRITE
        assert (client.read_counter(), client.read(2, 1)) == (2, bytes(BLOCK))
        assert client.write(2, B, counter=2) == 3  # the same counter again
        with pytest.raises(RpmbResultError) as error:
            client.write(3, A)
        assert authentic(error) == WRITE
        with pytest.raises(RpmbResultError, match="COUNT_FAILURE"):
            client.write(3, B, counter=3)
    device.kill()
    device.start()
    with device.client(KEY) as client:
        assert client.read_counter() == 4
        assert client.read(2, 2) == B + A
    assert "rule 1: answer WRITE_FAILURE before execution: DATA_WRITE, number 3" in device.log
    assert f"faults are injected as {device.inject_path} says" in device.log


def test_reads_of_a_block_fail(faulty_daemon: FaultyDaemon) -> None:
    device = faulty_daemon(
        rule('request = "DATA_READ"; address = 510; action = "answer"; result = "READ_FAILURE"')
    )
    with device.client(KEY) as client:
        client.write(510, A)  # the rule is about reads
        for first, count in ((510, 1), (508, 4), (510, 2)):
            with pytest.raises(RpmbResultError) as error:
                client.read(first, count)
            assert authentic(error) == READ
        assert client.read(505, 5) + client.read(511, 1) == bytes(6 * BLOCK)


@pytest.mark.parametrize("when", ["before", "after"])
def test_delay_holds_the_answer_and_nothing_else(faulty_daemon: FaultyDaemon, when: str) -> None:
    """Messages are served meanwhile, and the delay has its full length."""
    seconds = 0.5
    device = faulty_daemon(
        rule(f'request = "DATA_WRITE"; nth = 2; action = "delay"; when = "{when}"', seconds=seconds)
    )
    with device.client(KEY) as client:
        client.write(0, A)
        request = client.write_request(1, A, 1)
        started = time.monotonic()
        client.submit(request, spec.FRAME_SIZE)
        client.flush()
        assert client.frontend.read_config(3) == bytes(client.config)
        ((_, answer),) = client.answers()
        assert time.monotonic() - started >= seconds
        assert Frame.unpack(answer) == sealed(address=1, write_counter=2, req_resp=0x300)
        assert client.write(2, A) == 3


@pytest.mark.parametrize("when", ["before", "after"])
def test_stop_ends_a_delay(faulty_daemon: FaultyDaemon, when: str) -> None:
    device = faulty_daemon(
        rule(f'request = "DATA_WRITE"; action = "delay"; seconds = 3600; when = "{when}"')
    )
    client = device.client(KEY)
    client.submit(client.write_request(0, A, 0), spec.FRAME_SIZE)
    client.flush()
    until(lambda: "rule 1: delay 3600 s" in device.log)
    device.send(signal.SIGTERM)
    assert device.wait() == 0
    abandon(client)
    device.kill()
    device.start()
    with device.client(KEY) as client:
        assert client.read_counter() == (when == "after")


def test_front_end_that_leaves_ends_a_delay(faulty_daemon: FaultyDaemon) -> None:
    device = faulty_daemon(rule('nth = 1; action = "delay"; seconds = 3600'))
    client = device.client(KEY)
    client.submit(read_counter(), spec.FRAME_SIZE)
    client.flush()
    until(lambda: "rule 1: delay 3600 s" in device.log)
    before = processor_time(device.pid)
    time.sleep(1.0)
    assert processor_time(device.pid) - before < 0.5  # it sleeps
    client.close()  # GET_VRING_BASE is answered
    with device.client(KEY) as client:
        assert client.write(0, A) == 1


def test_lost_answer_stays_lost_and_the_queue_works(faulty_daemon: FaultyDaemon) -> None:
    device = faulty_daemon(
        rule(f'{AFTER}; nth = 2; action = "lose"') + rule(f'{BEFORE}; nth = 4; action = "lose"')
    )
    with device.client(KEY) as client:
        client.write(0, A)
        lost = client.submit(client.write_request(1, A, 1), spec.FRAME_SIZE)
        client.submit(read_counter(), spec.FRAME_SIZE)
        client.flush()
        ((token, answer),) = client.answers()
        assert token != lost
        assert Frame.unpack(answer).write_counter == 2
        assert client.ring.in_flight == 1
        client.reset_queue()
        assert client.read(1, 1) == A
        with pytest.raises(RpmbResultError, match="COUNT_FAILURE"):
            client.write(1, A, counter=1)
        client.submit(client.write_request(2, A, 2), spec.FRAME_SIZE)  # not executed
        client.submit(read_counter(), spec.FRAME_SIZE)
        client.flush()
        ((_, answer),) = client.answers()
        assert Frame.unpack(answer).write_counter == 2
        client.reset_device()
        assert client.write(2, B) == 3


def test_chain_returns_without_an_answer(faulty_daemon: FaultyDaemon) -> None:
    device = faulty_daemon(
        rule(f'{BEFORE}; nth = 1; action = "empty"') + rule(f'{AFTER}; nth = 2; action = "empty"')
    )
    with device.client(KEY) as client:
        for counter in (0, 1):
            with pytest.raises(VerificationError, match="found 0"):
                client.write(0, A, counter=0)
            assert client.read_counter() == counter


@pytest.mark.parametrize("when", ["before", "after"])
def test_connection_ends(faulty_daemon: FaultyDaemon, when: str) -> None:
    """A write that was durable is answered OK when its chain comes again, as after a crash."""
    device = faulty_daemon(
        rule(f'request = "DATA_WRITE"; nth = 2; action = "disconnect"; when = "{when}"')
    )
    client = device.client(KEY)
    client.write(0, A)
    request = client.write_request(1, B, 1)
    with pytest.raises(BackendError):
        client.exchange(request, spec.FRAME_SIZE)
    abandon(client)
    with device.client(KEY) as client:
        answer = Frame.unpack(client.exchange(request, spec.FRAME_SIZE))
        assert answer == sealed(address=1, write_counter=2, req_resp=0x300)
        assert (client.read_counter(), client.read(1, 1)) == (2, B)
        with pytest.raises(RpmbResultError, match="COUNT_FAILURE"):
            client.write(1, A, counter=1)
    assert "front-end disconnected: injected by rule 1" in device.log


def test_answers_are_corrupted(faulty_daemon: FaultyDaemon) -> None:
    """The fields of all kinds of answers are in test_device.py."""
    device = faulty_daemon(
        rule('request = "DATA_READ"; every = 2; action = "corrupt"; field = "mac"')
    )
    with device.client(KEY) as client:
        for _ in range(3):
            with pytest.raises(VerificationError, match="MAC"):
                client.read(0, 4)
            assert client.read(0, 4) == bytes(4 * BLOCK)


def test_write_counter_jumps_at_the_start(faulty_daemon: FaultyDaemon) -> None:
    device = faulty_daemon("write-counter = 0xFFFF_FFF0")
    with device.client(KEY) as client:
        assert client.read_counter() == 0xFFFF_FFF0
        assert client.write(0, A) == 0xFFFF_FFF1
    device.kill()
    device.start()  # it only increases
    assert "write-counter=4294967280" in device.log
    with device.client(KEY) as client:
        for number in range(14):
            client.write(number, A, counter=0xFFFF_FFF1 + number)
        with pytest.raises(RpmbResultError) as error:
            client.write(0, A)
        assert authentic(error) == WRITE | EXPIRED


def test_nothing_is_imported_for_a_device_without_faults(engine: Engine) -> None:
    program = (
        "import sys; before = set(sys.modules);"  # coverage imports tomllib
        "import vhost_rpmb.cli, vhost_rpmb.daemon.server as server;"
        "vhost_rpmb.cli.parse_options(['--socket-path=s', '--flash-path=f'], {});"
        f"server.engine.load({engine.name!r});"
        "found = set(sys.modules) - before;"
        "print([name for name in found if 'injection' in name or name == 'tomllib'])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("[]\n", "")
