# SPDX-License-Identifier: Apache-2.0
"""Checks of an answer: MAC, fields, result."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.support.driver import AUTHENTICATOR, KEY, NONCE, OTHER_KEY
from tests.support.oracle import Frame, pack, sign
from vhost_rpmb.driver.errors import RpmbResultError, VerificationError
from vhost_rpmb.rpmb import frame as messages
from vhost_rpmb.rpmb import spec
from vhost_rpmb.rpmb.results import result_name


def signed(*frames: Frame, key: bytes = KEY) -> bytes:
    return pack(sign(frames, key))


COUNTER_FRAME = Frame(nonce=NONCE, write_counter=7, req_resp=0x0200)
WRITE_FRAME = Frame(write_counter=8, address=3, req_resp=0x0300)
READ_FRAME = Frame(data=bytes([1]) * 256, nonce=NONCE, address=3, block_count=2, req_resp=0x0400)


def check_counter(answer: bytes) -> int:
    return messages.check_counter(answer, NONCE, AUTHENTICATOR)


def check_write(answer: bytes) -> int:
    return messages.check_write(answer, 3, 7, AUTHENTICATOR)


def check_read(answer: bytes) -> bytes:
    return messages.check_read(answer, 3, 2, NONCE, AUTHENTICATOR)


def test_valid_answers_are_accepted() -> None:
    assert check_counter(signed(COUNTER_FRAME)) == 7
    assert check_write(signed(WRITE_FRAME)) == 8
    second = READ_FRAME._replace(data=bytes([2]) * 256)
    assert check_read(signed(READ_FRAME, second)) == bytes([1]) * 256 + bytes([2]) * 256
    messages.check_program_key(signed(Frame(req_resp=0x0100)), AUTHENTICATOR)


def test_all_fields_but_the_mac_are_checked_without_a_key() -> None:
    answer = signed(COUNTER_FRAME, key=OTHER_KEY)
    assert messages.check_counter(answer, NONCE, None) == 7
    with pytest.raises(VerificationError, match="nonce"):
        messages.check_counter(answer, bytes(16), None)


@pytest.mark.parametrize("length", [0, 1, 511, 513])
def test_length_other_than_whole_frames_is_refused(length: int) -> None:
    with pytest.raises(VerificationError, match=f"expected an answer of 512 .* found {length}"):
        check_counter(bytes(length))


@pytest.mark.parametrize("count", [1, 3])
def test_unexpected_number_of_frames_is_refused(count: int) -> None:
    with pytest.raises(VerificationError, match=f"expected number of frames 2, found {count}"):
        check_read(signed(*[READ_FRAME] * count))


@pytest.mark.parametrize(
    ("check", "frame", "field"),
    [
        (check_counter, COUNTER_FRAME._replace(req_resp=0x0400), "req_resp"),
        (check_counter, COUNTER_FRAME._replace(req_resp=0), "req_resp"),
        (check_counter, COUNTER_FRAME._replace(nonce=bytes(16)), "nonce"),
        (check_write, WRITE_FRAME._replace(write_counter=7), "write_counter"),
        (check_write, WRITE_FRAME._replace(write_counter=9), "write_counter"),
        (check_write, WRITE_FRAME._replace(address=4), "address"),
        (check_write, WRITE_FRAME._replace(req_resp=0x0100), "req_resp"),
        (check_write, WRITE_FRAME._replace(nonce=NONCE), "nonce"),
    ],
)
def test_unexpected_field_under_a_valid_mac_is_refused(
    check: Callable[[bytes], object], frame: Frame, field: str
) -> None:
    with pytest.raises(VerificationError, match=field):
        check(signed(frame))


@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize(
    "wrong",
    [
        READ_FRAME._replace(nonce=bytes(16)),
        READ_FRAME._replace(address=4),
        READ_FRAME._replace(block_count=1),
        READ_FRAME._replace(req_resp=0x0200),
        READ_FRAME._replace(result=1),
    ],
)
def test_unexpected_field_in_any_frame_of_a_read_is_refused(position: int, wrong: Frame) -> None:
    frames = [READ_FRAME, READ_FRAME]
    frames[position] = wrong
    with pytest.raises(VerificationError):
        check_read(signed(*frames))


@pytest.mark.parametrize("offset", [228, 484, 503, 512 + 196, 512 + 228, 1023])
def test_any_changed_byte_of_a_read_is_refused(offset: int) -> None:
    answer = bytearray(signed(READ_FRAME, READ_FRAME))
    answer[offset] ^= 1
    with pytest.raises(VerificationError):
        check_read(bytes(answer))


def test_mac_by_another_key_is_refused() -> None:
    with pytest.raises(VerificationError, match="MAC"):
        check_counter(signed(COUNTER_FRAME, key=OTHER_KEY))


@pytest.mark.parametrize(
    ("result", "name"),
    [
        (1, "GENERAL_FAILURE"),
        (2, "AUTH_FAILURE"),
        (3, "COUNT_FAILURE"),
        (4, "ADDR_FAILURE"),
        (5, "WRITE_FAILURE"),
        (6, "READ_FAILURE"),
        (7, "NO_AUTH_KEY"),
        (0x85, "WRITE_FAILURE, WRITE_COUNTER_EXPIRED"),
        (8, "unknown result"),
    ],
)
def test_failures_have_the_names_of_the_specification(result: int, name: str) -> None:
    with pytest.raises(RpmbResultError) as caught:
        check_read(signed(READ_FRAME._replace(result=result)))
    assert str(caught.value) == f"DATA_READ failed: {name} (result 0x{result:04x})"
    assert caught.value.result == result
    assert caught.value.authenticated


def test_failure_tells_whether_it_is_authenticated() -> None:
    failure = Frame(result=spec.VIRTIO_RPMB_RES_GENERAL_FAILURE)  # as one without a type
    for answer, authenticated in (
        (signed(failure), True),
        (signed(failure, key=OTHER_KEY), False),
        (failure.pack(), False),
    ):
        with pytest.raises(RpmbResultError) as caught:
            check_counter(answer)
        assert caught.value.authenticated is authenticated


def test_expired_bit_is_success_except_for_the_write_after_the_last() -> None:
    last = spec.MAX_WRITE_COUNTER
    assert check_counter(signed(COUNTER_FRAME._replace(result=0x80, write_counter=last))) == last
    answer = signed(Frame(write_counter=last, address=3, result=0x80, req_resp=0x0300))
    assert messages.check_write(answer, 3, last - 1, AUTHENTICATOR) == last
    with pytest.raises(RpmbResultError, match=r"WRITE_COUNTER_EXPIRED \(result 0x0080\)"):
        messages.check_write(answer, 3, last, AUTHENTICATOR)
    assert result_name(0) == "OK"
    assert result_name(0x80) == "WRITE_COUNTER_EXPIRED"


@pytest.mark.parametrize("length", [0, 255, 257])
def test_write_takes_whole_blocks(length: int) -> None:
    with pytest.raises(ValueError, match=f"not {length}"):
        messages.write_request(0, bytes(length), 0, AUTHENTICATOR)
