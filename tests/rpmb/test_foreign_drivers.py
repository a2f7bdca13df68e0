# SPDX-License-Identifier: Apache-2.0
"""Requests as software of others sends them: NuttX, ACRN, OP-TEE, Linux before the standard.

What they do with features and the legacy transport is in tests/vhost_user/test_foreign_drivers.py.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest

from tests.support.documents import GUIDES
from tests.support.optee import PUT, Exchange, Model, played, recorded, workload
from tests.support.oracle import (
    FRAME_SIZE,
    GENERAL,
    KEY,
    NONCE,
    OK,
    A,
    B,
    Frame,
    mac_of,
    program_key,
    read_counter,
    read_data,
    read_result,
    sealed,
    split,
    write_data,
)
from tests.support.rig import Rig, RigFactory, make_image
from vhost_rpmb.driver.ring import Segment
from vhost_rpmb.virtio import rules
from vhost_rpmb.virtio.flags import FAULTS

HEADER = (0xC010_B551).to_bytes(4, "little") + bytes(8)  # command, result, target
EARLY = "probably one from before the virtio specification"


@pytest.fixture
def plain(make_rig: RigFactory) -> Rig:
    """A device whose driver negotiated no feature, and programmed a key."""
    rig = make_rig(features=0)
    rig.program()
    return rig


def command_list(commands: int) -> bytes:
    """The number of commands, then flags, number of frames and position of each."""
    lines = [
        bytes((1, 0, 0, 0, 1, 0, 0, 0)) + number.to_bytes(8, "little") for number in range(commands)
    ]
    return commands.to_bytes(8, "little") + b"".join(lines)


def run(rig: Rig, readable: Sequence[Segment], writable: Sequence[Segment]) -> bytes:
    """Run one chain of these buffers; return what was written."""
    head = rig.ring.add(readable, writable)
    (used,) = rig.process()
    assert used.head == head
    return b"".join(rig.guest.read(*segment) for segment in writable)[: used.length]


@pytest.mark.parametrize("features", [0, None], ids=["no features", "all"])
def test_key_frame_with_a_response_buffer_and_no_result_read(
    make_rig: RigFactory, features: int | None
) -> None:
    """It is executed, and the buffer returned as it was; the result is read in a later chain."""
    rig = make_rig() if features is None else make_rig(features=features)
    room = rig.room(FRAME_SIZE)
    assert run(rig, rig.put(program_key()), room) == b""
    assert rig.guest.read(*room[0]) == b"\xaa" * FRAME_SIZE
    assert rig.store.key == KEY
    assert rig.chain(read_result()) == [sealed(req_resp=0x100)]


@pytest.mark.parametrize("where", ["before", "between", "behind"])
def test_empty_command_costs_its_chain_only(plain: Rig, where: str) -> None:
    """A command of no blocks is a buffer of length zero, which virtio does not allow."""
    request = plain.put(write_data(0, 5, A), ()) + plain.put(read_result())
    place = {"before": 0, "between": 1, "behind": 2}[where]
    request.insert(place, Segment(request[0].address, 0))
    assert run(plain, request, plain.room(FRAME_SIZE)) == b""
    assert plain.flags & FAULTS
    assert plain.queue.take_faults() == {rules.CHAIN_RULES[rules.CHAIN_EMPTY_DESCRIPTOR]: 1}
    assert plain.store.counter == 0
    assert plain.write(0, 5, A).result == OK


def test_one_command_alone_has_no_request(plain: Rig, caplog: pytest.LogCaptureFixture) -> None:
    """NuttX makes the last command of a list the answer, and so the only one too."""
    answer = run(plain, [], plain.room(FRAME_SIZE))
    assert split(answer) == [sealed(result=GENERAL)]
    assert EARLY in caplog.text
    assert plain.chain(read_counter()) == [sealed(req_resp=0x200, nonce=NONCE)]


@pytest.mark.parametrize("offset", [1, 3, 7, 255])
def test_frames_on_odd_addresses(plain: Rig, offset: int) -> None:
    """Each command is one buffer, wherever the caller has it."""
    place = plain.guest.allocate(1 << 14, 4096)
    commands = [write_data(0, 5, A, B), read_result()]
    readable = []
    for number, command in enumerate(commands):
        address = place + 0x1000 * number + offset
        plain.guest.write(address, command)
        readable.append(Segment(address, len(command)))
    answer = run(plain, readable, [Segment(place + 0x2000 + offset, FRAME_SIZE)])
    assert split(answer) == [sealed(req_resp=0x300, address=5, write_counter=1)]
    writable = [
        Segment(place + 0x2000 + offset, FRAME_SIZE),
        Segment(place + 0x2800 + offset, FRAME_SIZE),
    ]
    frames = split(run(plain, plain.put(read_data(5, 2)), writable))
    assert [frame.data for frame in frames] == [A, B]


@pytest.mark.parametrize("frames", [1, 2, 8, 31])
def test_one_descriptor_a_frame(plain: Rig, frames: int) -> None:
    blocks = [bytes([number]) * 256 for number in range(frames)]
    sizes = (FRAME_SIZE,) * (frames + 1)
    request = plain.put(write_data(0, 5, *blocks) + read_result(), sizes)
    answer = split(run(plain, request, plain.room(FRAME_SIZE)))
    assert answer == [sealed(req_resp=0x300, address=5, write_counter=1)]
    room = plain.room(frames * FRAME_SIZE, sizes)
    assert len(room) == frames
    answers = split(run(plain, plain.put(read_data(5, frames)), room))
    assert [frame.data for frame in answers] == blocks


@pytest.mark.parametrize("commands", [0, 1, 2, 3])
def test_header_before_the_frames_is_a_failure_with_a_hint(
    plain: Rig, caplog: pytest.LogCaptureFixture, commands: int
) -> None:
    """No frame behind it is executed; the log names the probable driver, once in a while."""
    head = HEADER + (command_list(commands) if commands else b"")
    request = head + write_data(0, 5, A) + read_result()
    sizes = (len(HEADER), len(head) - len(HEADER)) if commands else (len(HEADER),)
    for _ in range(20):
        answer = run(plain, plain.put(request, sizes), plain.room(FRAME_SIZE))
        assert split(answer) == [sealed(result=GENERAL)]
    assert plain.store.counter == 0
    lines = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(lines) == 1
    text = lines[0].getMessage()
    assert f"found {len(request)} bytes, {len(head)} more than frames" in text
    assert EARLY in text
    assert plain.write(0, 5, A).result == OK


@pytest.mark.parametrize("frames", [1, 2])
def test_header_and_frames_in_a_writable_buffer(
    plain: Rig, caplog: pytest.LogCaptureFixture, frames: int
) -> None:
    """ACRN's first driver has one buffer for request and answer; its content is not read."""
    place = plain.put(HEADER + command_list(1) + frames * write_data(0, 5, A))
    answer = run(plain, [], place)
    assert split(answer) == [sealed(result=GENERAL)]
    assert plain.store.counter == 0
    assert "found no device-readable bytes" in caplog.text
    assert EARLY in caplog.text


@pytest.mark.parametrize("length", [1, 511, 513, 512 + 13, 512 * 513])
def test_other_malformed_request_has_no_hint(
    plain: Rig, caplog: pytest.LogCaptureFixture, length: int
) -> None:
    assert plain.chain(bytes(length)) == [sealed(result=GENERAL)]
    assert f"found {length} bytes" in caplog.text
    assert "correct the driver of the guest" in caplog.text
    assert EARLY not in caplog.text


def test_malformed_request_without_room_is_logged_too(
    plain: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    assert plain.raw_chain(HEADER + read_counter(), 0) == b""
    assert EARLY in caplog.text


def test_key_behind_a_header_is_not_logged(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(1)
    assert rig.chain(HEADER + program_key() + read_result()) == [Frame(result=GENERAL)]
    assert KEY.hex() not in caplog.text
    assert rig.store.key is None


def test_batch_that_cannot_be_made_durable_reports_once(
    plain: Rig, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is executed twice."""
    monkeypatch.setattr(type(plain.store), "commit", lambda *_: False)
    plain.ring.add(plain.put(write_data(0, 5, A)), plain.room(FRAME_SIZE))
    plain.ring.add(plain.put(b"x" * 100), plain.room(FRAME_SIZE))
    assert len(plain.process()) == 2
    assert caplog.text.count("found 100 bytes") == 1
    assert "more before" not in caplog.text


def in_guide(name: str, pattern: str) -> list[int]:
    """The numbers in the sentence of a guide that is written so."""
    text = " ".join((GUIDES / f"{name}.md").read_text().split())
    found = re.search(pattern, text)
    assert found is not None, "the guide says something else"
    return [int(number) for number in found.groups()]


def served(rig: Rig, exchanges: Iterable[Exchange]) -> bool:
    """Whether the device answers all as OP-TEE expects."""
    return all(
        rig.chain(exchange.chain, len(exchange.answer) // FRAME_SIZE) == split(exchange.answer)
        for exchange in exchanges
    )


def test_limit_of_reads_for_the_table_of_optee(make_rig: RigFactory, tmp_path: Path) -> None:
    """The guide names the lowest limit with which it can store an object at all."""
    (limit,) = in_guide("optee", r"A limit below (\d+) makes the device unusable")
    for read_blocks in (limit, limit - 1):
        image = make_image(tmp_path / f"reads{read_blocks}")
        rig, model = make_rig(image, max_read_blocks=read_blocks), Model()
        assert served(rig, [model.program_key()])
        assert served(rig, played(model, recorded()[PUT])) == (read_blocks == limit)


def test_limit_of_reads_for_all_that_optee_does(make_rig: RigFactory) -> None:
    (limit,) = in_guide("optee", r"Start the daemon with `--max-read-blocks=(\d+)`")
    assert served(make_rig(max_read_blocks=limit), workload(Model()))


def test_limits_for_the_linux_driver_of_2022(make_rig: RigFactory, tmp_path: Path) -> None:
    """It checks a MAC in every frame, and takes block addresses below the capacity in units."""
    write_blocks, read_blocks = in_guide(
        "guest", r"work with `--max-write-blocks=(\d+) --max-read-blocks=(\d+)` and an image above"
    )
    image = make_image(tmp_path / "above", 2)
    rig = make_rig(image, max_write_blocks=write_blocks, max_read_blocks=read_blocks)
    rig.program()
    capacity, most_written, most_read = rig.device.config
    assert capacity > 1  # otherwise it takes block 0 only
    for address in range(capacity):
        block = bytes([address]) * 256
        assert rig.write(address, address, *[block] * most_written).result == OK
        answers = rig.chain(read_data(address, most_read), most_read)
        assert [answer.data for answer in answers] == [block]
        assert all(answer.key_mac == mac_of(answer) for answer in answers)
