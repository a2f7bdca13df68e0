# SPDX-License-Identifier: Apache-2.0
"""`RpmbClient` against a daemon over a real socket."""

from __future__ import annotations

import secrets
import signal
import threading
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from tests.support.daemon import PATIENCE
from tests.support.driver import (
    AUTHENTICATOR,
    EVENT_IDX,
    INDIRECT,
    KEY,
    MIB,
    NONCE,
    OTHER_KEY,
    THREE_REGIONS,
    VERSION_1,
)
from tests.support.oracle import Frame
from vhost_rpmb.driver.errors import BackendError, QueueError, RpmbResultError, VerificationError
from vhost_rpmb.driver.frontend import PROTOCOL_FEATURES
from vhost_rpmb.driver.ring import Segment, Used
from vhost_rpmb.driver.rpmb import FEATURES, Answer, RpmbClient, Setup
from vhost_rpmb.rpmb import frame as messages
from vhost_rpmb.rpmb import spec
from vhost_rpmb.rpmb.mac import Authenticator
from vhost_rpmb.vhost_user.wire import ProtocolFeature

pytestmark = pytest.mark.usefixtures("no_leaks")


def is_counter(answer: bytes, counter: int) -> bool:
    """Whether a verified answer has this counter."""
    return messages.check_counter(answer, NONCE, AUTHENTICATOR) == counter


SETUPS = [
    pytest.param(
        Setup(
            features=VERSION_1 | indirect | event_idx,
            regions=regions,
            segment_size=segment_size,
            first_index=0xFFFD,
        ),
        id="-".join(
            (
                "indirect" if indirect else "direct",
                "event_idx" if event_idx else "flags",
                f"{len(regions)}_regions",
                f"segments_of_{segment_size}" if segment_size else "whole",
            )
        ),
    )
    for indirect, event_idx, regions, segment_size in product(
        (0, INDIRECT),
        (0, EVENT_IDX),
        (Setup().regions, THREE_REGIONS),
        (None, 100),
    )
]


@pytest.mark.parametrize("setup", SETUPS)
def test_all_requests_in_each_setup(daemon: Callable[..., Any], setup: Setup) -> None:
    data = secrets.token_bytes(3 * 256)
    with RpmbClient.connect(daemon().socket_path, setup=setup) as client:
        assert client.config == (1, 32, 255)
        assert client.config.blocks == 512
        client.program_key(KEY)
        assert client.read_counter() == 0
        assert client.write(5, data) == 1
        assert client.write(509, data, 1) == 2
        assert client.read(5, 3) == data
        assert client.read(4, 5) == bytes(256) + data + bytes(256)
        assert client.read(511, 1) == data[512:]
        assert client.read_counter() == 2
        assert client.frontend.features == setup.features


def test_state_outlives_the_connection(daemon: Callable[..., Any]) -> None:
    served = daemon()
    with RpmbClient.connect(served.socket_path) as client:
        client.program_key(KEY)
    for number in range(5):
        with RpmbClient.connect(served.socket_path, KEY) as client:
            assert client.read_counter() == number
            client.write(number, bytes([number]) * 256)
    with RpmbClient.connect(served.socket_path) as client:
        assert client.read(0, 5) == b"".join(bytes([number]) * 256 for number in range(5))


def test_reads_beyond_the_limit_are_split_and_writes_are_not(daemon: Callable[..., Any]) -> None:
    served = daemon("--max-read-blocks=7", "--max-write-blocks=2")
    data = secrets.token_bytes(512)
    with RpmbClient.connect(served.socket_path) as client:
        assert client.config == (1, 2, 7)
        client.program_key(KEY)
        for address in range(0, 20, 2):
            client.write(address, data)
        assert client.read(0, 20) == data * 10
        with pytest.raises(RpmbResultError, match="GENERAL_FAILURE"):
            client.write(0, data + data)


def test_largest_requests(daemon: Callable[..., Any]) -> None:
    data = secrets.token_bytes(255 * 256)
    with RpmbClient.connect(daemon("--max-write-blocks=255").socket_path) as client:
        client.program_key(KEY)
        client.write(1, data)
        assert client.read(0, 512) == bytes(256) + data + bytes(256 * 256)


def test_failures_are_reported_by_name(daemon: Callable[..., Any]) -> None:
    with RpmbClient.connect(daemon().socket_path) as client:
        unready: list[Callable[[], object]] = [client.read_counter, lambda: client.read(0, 1)]
        for attempt in unready:
            with pytest.raises(RpmbResultError, match="NO_AUTH_KEY") as caught:
                attempt()
            assert not caught.value.authenticated
        with pytest.raises(ValueError, match="needs the key"):
            client.write(0, bytes(256), 0)
        client.program_key(KEY)
        failing: list[tuple[str, Callable[[], object]]] = [
            ("PROGRAM_KEY failed: WRITE_FAILURE", lambda: client.program_key(KEY)),
            ("DATA_READ failed: ADDR_FAILURE", lambda: client.read(511, 2)),
            ("DATA_WRITE failed: ADDR_FAILURE", lambda: client.write(512, bytes(256))),
            ("DATA_WRITE failed: COUNT_FAILURE", lambda: client.write(0, bytes(256), 1)),
        ]
        for text, attempt in failing:
            with pytest.raises(RpmbResultError, match=text) as caught:
                attempt()
            assert caught.value.authenticated
        forged = messages.write_request(0, bytes(256), 0, Authenticator(OTHER_KEY))
        with pytest.raises(RpmbResultError, match="DATA_WRITE failed: AUTH_FAILURE"):
            messages.check_write(client.exchange(forged, 512), 0, 0, AUTHENTICATOR)
        assert client.read_counter() == 0


def test_wrong_key_is_detected_before_a_write(daemon: Callable[..., Any]) -> None:
    served = daemon()
    with RpmbClient.connect(served.socket_path) as client:
        client.program_key(KEY)
    with RpmbClient.connect(served.socket_path, OTHER_KEY) as client:
        for attempt in (
            client.read_counter,
            lambda: client.read(0, 1),
            lambda: client.write(0, bytes(256)),
        ):
            with pytest.raises(VerificationError, match="the device has another key"):
                attempt()


@pytest.mark.parametrize("options", [(), ("--strict",)], ids=["plain", "strict"])
def test_write_after_the_last_counter_value_fails(
    daemon: Callable[..., Any], options: tuple[str, ...]
) -> None:
    served = daemon(f"--initial-counter={spec.MAX_WRITE_COUNTER - 1}", *options)
    with RpmbClient.connect(served.socket_path) as client:
        client.program_key(KEY)
        assert client.write(0, bytes([9]) * 256) == spec.MAX_WRITE_COUNTER
        with pytest.raises(RpmbResultError, match=r"DATA_WRITE .* WRITE_COUNTER_EXPIRED"):
            client.write(0, bytes(256))
        assert client.read_counter() == spec.MAX_WRITE_COUNTER
        assert client.read(0, 1) == bytes([9]) * 256


@pytest.mark.parametrize("features", [VERSION_1, VERSION_1 | EVENT_IDX, FEATURES])
def test_many_requests_in_flight(daemon: Callable[..., Any], features: int) -> None:
    setup = Setup(features=features, queue_size=128)
    with RpmbClient.connect(daemon().socket_path, setup=setup) as client:
        client.program_key(KEY)
        for _ in range(20):
            nonces = [secrets.token_bytes(16) for _ in range(64)]
            sent = {client.submit(messages.counter_request(n), 512): n for n in nonces}
            client.flush()
            while sent:
                for token, data in client.answers():
                    assert messages.check_counter(data, sent.pop(token), AUTHENTICATOR) == 0
        # Writes in flight together are executed in order.
        tokens = [
            client.submit(client.write_request(number, bytes([number]) * 256, number), 512)
            for number in range(64)
        ]
        client.flush()
        found: list[Answer] = []
        while len(found) < 64:
            found += client.answers()
        for number, (token, data) in enumerate(found):
            assert token == tokens[number]
            messages.check_write(data, number, number, AUTHENTICATOR)
        assert client.read_counter() == 64
        assert client.ring.free_descriptors == 128


def test_exchange_is_refused_while_requests_are_in_flight(daemon: Callable[..., Any]) -> None:
    with RpmbClient.connect(daemon().socket_path) as client:
        client.submit(messages.counter_request(NONCE), 512)
        with pytest.raises(ValueError, match="in flight"):
            client.read_counter()
        client.flush()
        assert len(client.answers()) == 1


def test_request_that_does_not_fit_leaks_no_memory(daemon: Callable[..., Any]) -> None:
    setup = Setup(features=VERSION_1, queue_size=4)
    with RpmbClient.connect(daemon().socket_path, setup=setup) as client:
        client.program_key(KEY)
        spans = client.memory.allocate(3 * MIB)
        client.memory.free(spans)
        for _ in range(2):
            client.submit(messages.counter_request(NONCE), 512)
        with pytest.raises(QueueError, match="does not fit"):
            client.submit(messages.counter_request(NONCE), 512)
        client.flush()
        answered = 0
        while answered < 2:
            answered += len(client.answers())
        assert client.read_counter() == 0
        assert client.memory.allocate(3 * MIB) == spans


@pytest.mark.parametrize("features", [VERSION_1, FEATURES], ids=["direct", "indirect"])
@pytest.mark.parametrize(
    ("request_cuts", "answer_cuts"),
    [
        ([512], [512]),
        ([1, 511], [511, 1]),
        ([196, 32, 256, 16, 4, 2, 2, 2, 2], [228, 284]),
        ([1] * 16 + [496], [16] * 32),
        ([500, 12], [512, 512, 100]),
    ],
)
def test_buffers_may_be_cut_anywhere(
    daemon: Callable[..., Any],
    features: int,
    request_cuts: list[int],
    answer_cuts: list[int],
) -> None:
    with RpmbClient.connect(daemon().socket_path, setup=Setup(features=features)) as client:
        client.program_key(KEY)
        request = messages.counter_request(NONCE)
        pieces = []
        for length in request_cuts:
            pieces.append(request[:length])
            request = request[length:]
        client.submit(pieces, answer_cuts)
        client.flush()
        ((_, answer),) = client.answers()
        assert is_counter(answer, 0)


def test_buffers_may_span_regions(daemon: Callable[..., Any]) -> None:
    border = 0x0020_0000
    setup = Setup(regions=THREE_REGIONS)
    with RpmbClient.connect(daemon().socket_path, setup=setup) as client:
        client.program_key(KEY)
        client.memory.reserve(border - 100, 512)
        client.memory.write(border - 100, messages.counter_request(NONCE))
        place = client.memory.allocate(512)
        client.ring.add([Segment(border - 100, 512)], [Segment(place, 512)])
        client.ring.flush()
        assert [used.length for used in client.ring.wait(PATIENCE)] == [512]
        assert is_counter(client.memory.read(place, 512), 0)
        client.memory.write(place, messages.counter_request(NONCE))
        client.ring.add([Segment(place, 512)], [Segment(border - 100, 512)])
        client.ring.flush()
        assert [used.length for used in client.ring.wait(PATIENCE)] == [512]
        assert is_counter(client.memory.read(border - 100, 512), 0)


@pytest.mark.parametrize(
    "missing",
    [
        ProtocolFeature.REPLY_ACK,
        ProtocolFeature.CONFIGURE_MEM_SLOTS,
        ProtocolFeature.STATUS,
        PROTOCOL_FEATURES & ~ProtocolFeature.CONFIG,
    ],
    ids=["no_acknowledgements", "memory_table", "no_status", "config_only"],
)
def test_optional_protocol_features_may_be_missing(
    daemon: Callable[..., Any], missing: ProtocolFeature
) -> None:
    setup = Setup(protocol_features=PROTOCOL_FEATURES & ~missing, regions=THREE_REGIONS)
    with RpmbClient.connect(daemon().socket_path, setup=setup) as client:
        assert client.frontend.protocol_features == PROTOCOL_FEATURES & ~missing
        client.program_key(KEY)
        assert client.write(0, bytes(256)) == 1
        client.reset_queue()
        assert client.read_counter() == 1


def test_broken_chain_leaves_other_chains_intact(daemon: Callable[..., Any]) -> None:
    with RpmbClient.connect(daemon().socket_path) as client:
        client.program_key(KEY)
        head = client.ring.size - 1  # add() takes low indices first
        client.ring.write_descriptor(head, 0xDEAD_0000_0000, 512)
        place = client.memory.allocate(1024)
        client.memory.write(place, messages.counter_request(NONCE))
        chain = [Segment(place, 512)], [Segment(place + 512, 512)]
        first = client.ring.add(*chain)
        client.ring.offer(head)
        last = client.ring.add(*chain)
        client.ring.flush()
        used: list[Used] = []
        while len(used) < 3:
            used += client.ring.wait(PATIENCE, peer=client.frontend.fileno())
        assert used == [(first, 512), (head, 0), (last, 512)]
        assert client.read_counter() == 0


def test_broken_ring_is_reported_and_works_after_a_reset(daemon: Callable[..., Any]) -> None:
    with RpmbClient.connect(daemon().socket_path) as client:
        client.program_key(KEY)
        for reset in (client.reset_queue, client.reset_device):
            client.ring.offer(client.ring.size)
            client.ring.flush()
            with pytest.raises(QueueError, match="reports the queue broken"):
                client.answers()
            reset()
            assert client.read_counter() == 0


def test_reset_drops_requests_in_flight(daemon: Callable[..., Any]) -> None:
    with RpmbClient.connect(daemon().socket_path) as client:
        client.program_key(KEY)
        for _ in range(3):
            client.submit(messages.counter_request(NONCE), 512)
        client.reset_queue()
        assert client.ring.in_flight == 0
        assert client.ring.free_descriptors == client.ring.size
        assert client.read_counter() == 0


def test_only_reset_device_clears_the_result(daemon: Callable[..., Any]) -> None:
    result_read = Frame(block_count=1, req_resp=spec.VIRTIO_RPMB_REQ_RESULT_READ).pack()
    with RpmbClient.connect(daemon().socket_path) as client:
        client.program_key(KEY)
        client.write(3, bytes(256), 0)
        client.reset_queue()
        frame = Frame.unpack(client.exchange(result_read, 512))
        assert (frame.req_resp, frame.address, frame.write_counter) == (0x0300, 3, 1)
        client.reset_device()
        frame = Frame.unpack(client.exchange(result_read, 512))
        assert (frame.req_resp, frame.result) == (0, 1)


def test_reset_clears_the_device_status(daemon: Callable[..., Any]) -> None:
    with RpmbClient.connect(daemon().socket_path) as client:
        assert client.frontend.get_status() == 0b1111
        client.frontend.reset_device()
        assert client.frontend.get_status() == 0
        client.frontend.start_device(FEATURES)
        assert client.frontend.get_status() == 0b1011  # all but DRIVER_OK
        client.frontend.set_status(0)
        client.frontend.start_device(FEATURES)
        assert client.frontend.get_status() == 0b1011


def test_stop_returns_the_ring_position(daemon: Callable[..., Any]) -> None:
    setup = Setup(first_index=0xFFFE)
    with RpmbClient.connect(daemon().socket_path, setup=setup) as client:
        client.program_key(KEY)
        for _ in range(4):
            client.read_counter()
        assert client.frontend.stop_ring() == client.ring.base == 3


def test_second_client_times_out(daemon: Callable[..., Any]) -> None:
    served = daemon()
    with RpmbClient.connect(served.socket_path) as first:
        with pytest.raises(BackendError, match="one front-end at a time"):
            RpmbClient.connect(served.socket_path, timeout=0.3)
        first.program_key(KEY)
    with RpmbClient.connect(served.socket_path, KEY) as third:
        assert third.read_counter() == 0


def test_killed_daemon_is_reported(daemon: Callable[..., Any]) -> None:
    served = daemon()
    with RpmbClient.connect(served.socket_path, timeout=PATIENCE) as client:
        client.program_key(KEY)
        served.send(signal.SIGSTOP)
        client.submit(messages.counter_request(NONCE), 512)
        client.flush()
        killer = threading.Timer(0.1, served.send, [signal.SIGKILL])
        killer.start()
        with pytest.raises(BackendError, match="closed the connection with 1 requests"):
            client.answers()
        killer.join()
        with pytest.raises(BackendError, match="closed the connection"):
            client.reset_queue()
    served.wait()
    with pytest.raises(BackendError, match="cannot connect"):
        RpmbClient.connect(served.socket_path)


def test_hanging_daemon_times_out(daemon: Callable[..., Any]) -> None:
    served = daemon()
    with RpmbClient.connect(served.socket_path) as client:
        client.program_key(KEY)
        served.send(signal.SIGSTOP)
        client._timeout = client.frontend._timeout = 0.3
        try:
            with pytest.raises(BackendError, match=r"within 0\.3 s"):
                client.read_counter()
            with pytest.raises(BackendError, match=r"within 0\.3 s"):
                client.reset_queue()
        finally:
            served.send(signal.SIGCONT)


def test_key_of_a_wrong_length_is_refused(daemon: Callable[..., Any]) -> None:
    path = daemon().socket_path
    with pytest.raises(ValueError, match="32 bytes, not 31"):
        RpmbClient.connect(path, bytes(31))
    with RpmbClient.connect(path) as client:
        with pytest.raises(ValueError, match="32 bytes, not 33"):
            client.program_key(bytes(33))
        with pytest.raises(RpmbResultError, match="NO_AUTH_KEY"):
            client.read_counter()


def test_connections_leave_no_mapping(daemon: Callable[..., Any]) -> None:
    served = daemon()
    with RpmbClient.connect(served.socket_path) as client:
        client.program_key(KEY)
    for _ in range(50):
        with RpmbClient.connect(served.socket_path, KEY) as client:
            client.read_counter()
            assert "guest-memory" in Path("/proc/self/maps").read_text()
    assert "guest-memory" not in Path("/proc/self/maps").read_text()
