# SPDX-License-Identifier: Apache-2.0
"""The rules of a script, on the device of either engine in this process."""

from __future__ import annotations

import random
import time

import pytest

from tests.injection.conftest import FaultyRig, rule
from tests.support.oracle import (
    ADDR,
    AUTH,
    COUNT,
    EXPIRED,
    GENERAL,
    KEY,
    NO_KEY,
    NONCE,
    OK,
    READ,
    WRITE,
    A,
    Frame,
    mac_of,
    program_key,
    read_counter,
    read_data,
    read_result,
    sealed,
    write_data,
)
from tests.support.rig import Rig
from vhost_rpmb.virtio import features

BLOCK = 256
MAX = 0xFFFF_FFFF


def results(frames: list[Frame]) -> list[int]:
    """The results of answers, whose MACs have to be right."""
    assert all(frame.key_mac == mac_of(frame) for frame in frames)
    return [frame.result for frame in frames]


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        ("nth = 2", {2}),
        ("from = 3", {3, 4, 5, 6, 7, 8}),
        ("every = 3", {1, 4, 7}),
        ("from = 2; every = 2; times = 2", {2, 4}),
        ("times = 3", {1, 2, 3}),
    ],
)
def test_selection_counts_the_requests_of_the_rule(
    faulty: FaultyRig, selection: str, expected: set[int]
) -> None:
    """Over all connections and resets; other requests do not count."""
    rig = faulty(
        rule(f'request = "GET_WRITE_COUNTER"; action = "answer"; result = 0x85; {selection}')
    )
    failed = set()
    for number in range(1, 9):
        rig.read(0)
        if results(rig.chain(read_counter())) == [0x85]:
            failed.add(number)
        rig.device.clear_register() if number % 2 else rig.device.reset()
    assert failed == expected


def test_addresses_may_be_a_range(faulty: FaultyRig) -> None:
    rig = faulty(rule('address = [10, 19]; action = "answer"; result = "ADDR_FAILURE"'))
    for number, address in enumerate((9, 20)):
        assert rig.write(number, address, A).result == OK
        assert rig.read(address) == [A]
    for address in (10, 19):
        assert rig.write(2, address, A) == sealed(
            req_resp=0x300, address=address, result=ADDR, write_counter=2
        )
        assert rig.chain(read_data(address)) == [
            sealed(req_resp=0x400, address=address, block_count=1, result=ADDR, nonce=NONCE)
        ]
    assert results(rig.chain(read_data(5, 6), 6)) == [ADDR]
    assert results(rig.chain(read_data(5, 0), 6)) == [ADDR]  # as OP-TEE: what the room holds
    assert [frame.result for frame in rig.chain(read_data(5, 0), 5)] == [OK] * 5
    assert rig.write(2, 8, A, A, A).result == ADDR


def test_key_is_refused_and_then_programmed(faulty: FaultyRig) -> None:
    rig = faulty(
        rule('request = "PROGRAM_KEY"; action = "answer"; result = "GENERAL_FAILURE"', nth=1)
        + rule(
            'request = "PROGRAM_KEY"; action = "answer"; result = "WRITE_FAILURE"; when = "after"',
            nth=2,
        ),
        keyed=False,
    )
    request = program_key() + read_result()
    assert rig.chain(request) == [Frame(req_resp=0x100, result=GENERAL)]
    assert rig.chain(read_counter())[0].result == NO_KEY
    assert rig.chain(request) == [sealed(req_resp=0x100, result=WRITE)]  # it is programmed
    assert results(rig.chain(read_counter())) == [OK]
    assert rig.store.key == KEY


def test_result_of_a_later_chain_is_altered_too(faulty: FaultyRig) -> None:
    """Some drivers ask for the result in a chain of its own; the next write ends the fault."""
    rig = faulty(
        rule('request = "DATA_WRITE"; nth = 1; action = "answer"; result = "WRITE_FAILURE"')
    )
    assert rig.chain(write_data(0, 7, A), 0) == []
    for _ in range(2):
        assert rig.chain(read_result()) == [sealed(req_resp=0x300, result=WRITE, address=7)]
    assert rig.chain(read_result(2)) == [sealed(result=GENERAL)]
    assert rig.chain(write_data(0, 7, A), 0) == []
    assert rig.chain(read_result()) == [sealed(req_resp=0x300, address=7, write_counter=1)]
    rig.device.reset()
    assert rig.chain(read_result()) == [sealed(result=GENERAL)]


@pytest.mark.parametrize("end", ["reset", "clear_register"])
def test_altered_result_ends_with_its_connection(faulty: FaultyRig, end: str) -> None:
    rig = faulty(rule('request = "DATA_WRITE"; action = "answer"; result = "WRITE_FAILURE"'))
    assert rig.chain(write_data(0, 7, A), 0) == []
    getattr(rig.device, end)()
    assert rig.chain(read_result()) == [sealed(result=GENERAL)]


def test_chain_of_several_requests_is_altered_in_part(faulty: FaultyRig) -> None:
    rig = faulty(rule('request = "DATA_READ"; nth = 2; action = "answer"; result = "READ_FAILURE"'))
    request = write_data(0, 3, A) + 2 * read_data(3) + read_counter() + read_result()
    answers = rig.chain(request, 4)
    assert results(answers) == [OK, READ, OK, OK]
    assert [answer.req_resp for answer in answers] == [0x400, 0x400, 0x200, 0x300]
    assert answers[0].data == A
    assert results(rig.chain(read_counter() + read_data(3, 2) + read_counter(), 2)) == [OK, GENERAL]


def test_answer_without_room_is_left_out(faulty: FaultyRig) -> None:
    rig = faulty(rule('request = "DATA_READ"; action = "answer"; result = "READ_FAILURE"'))
    assert results(rig.chain(read_counter() + read_data(3) + read_counter(), 1)) == [OK]
    assert rig.chain(read_data(3), 0) == []


def test_result_read_is_altered(faulty: FaultyRig) -> None:
    rig = faulty(rule('request = "RESULT_READ"; nth = 2; action = "answer"; result = 7'))
    assert rig.write(0, 1, A).result == OK
    assert rig.write(1, 1, A) == sealed(req_resp=0x300, address=1, write_counter=2, result=NO_KEY)
    assert rig.write(2, 1, A).result == OK


def test_write_is_acknowledged_and_not_done(faulty: FaultyRig) -> None:
    rig = faulty(rule('request = "DATA_WRITE"; nth = 1; action = "answer"; result = "OK"'))
    assert rig.write(0, 0, A) == sealed(req_resp=0x300, write_counter=1)
    assert rig.read(0) == [bytes(BLOCK)]
    assert rig.store.counter == 0


def test_delayed_requests_keep_their_order(faulty: FaultyRig) -> None:
    rig = faulty(rule('every = 2; action = "delay"; seconds = 0.01'))
    heads = []
    for number in range(6):
        heads.append(
            rig.ring.add(rig.put(write_data(number, number, A) + read_result()), rig.room(512))
        )
    assert [used.head for used in rig.process()] == heads
    assert rig.store.counter == 6


def test_delayed_chain_survives_a_stop_of_the_queue(faulty: FaultyRig) -> None:
    """It is executed once, although the ring is set up again at the position before it."""
    rig = faulty(rule('action = "delay"; seconds = 0.3; when = "after"; request = "DATA_WRITE"'))
    room = rig.room(512)
    rig.ring.add(rig.put(write_data(0, 5, A) + read_result()), room)
    rig.ring.publish()
    base = rig.queue.base
    rig.device.process(rig.queue)
    assert (rig.queue.base, rig.store.counter) == (base, 1)
    rig.queue.set_base(base)
    assert len(rig.process()) == 1
    answer = Frame.unpack(rig.guest.read(*room[0]))
    assert answer == sealed(req_resp=0x300, address=5, write_counter=1)


def test_delayed_chain_is_recorded_in_flight(faulty: FaultyRig) -> None:
    rig = faulty(rule('nth = 1; action = "delay"; seconds = 0.01'))
    rig.track()
    for _ in range(3):
        rig.ring.add(rig.put(read_counter()), rig.room(512))
    assert len(rig.process()) == 3
    assert not any(rig.record[16::16])


def test_lost_chain_stays_in_flight(faulty: FaultyRig) -> None:
    rig = faulty(rule('nth = 2; action = "lose"'))
    rig.track()
    heads = [rig.ring.add(rig.put(read_counter()), rig.room(512)) for _ in range(3)]
    assert [used.head for used in rig.process()] == [heads[0], heads[2]]
    assert [rig.record[16 + 16 * head] for head in heads] == [0, 1, 0]


@pytest.mark.parametrize(("action", "offered"), [("lose", False), ("empty", True)])
def test_in_order_is_not_offered_where_answers_are_lost(
    faulty: FaultyRig, action: str, offered: bool
) -> None:
    rig = faulty(rule(f'nth = 1000; action = "{action}"'))
    assert bool(rig.device.features & features.OPTIONAL["in-order"]) == offered
    assert rig.device.features | features.OPTIONAL["in-order"] == features.DEFAULT


@pytest.mark.parametrize("field", ["mac", "nonce", "address", "block_count", "write_counter"])
def test_field_of_each_frame_is_changed(faulty: FaultyRig, field: str) -> None:
    """Under a MAC that is right, unless the MAC is the field."""
    rig = faulty(rule(f'request = "DATA_READ"; nth = 2; action = "corrupt"; field = "{field}"'))
    rig.write(0, 2, A)
    before, after = rig.chain(read_data(2, 3), 3), rig.chain(read_data(2, 3), 3)
    if field == "mac":
        assert before[:2] == after[:2]
        assert before[2][1:] == after[2][1:]
        assert before[2].key_mac != after[2].key_mac
        return
    assert after[2].key_mac == mac_of(*(frame._replace(key_mac=bytes(32)) for frame in after))
    for old, new in zip(before, after, strict=True):
        assert getattr(new, field) != getattr(old, field)
        same = {field: getattr(old, field), "key_mac": old.key_mac}
        assert new._replace(**same) == old


def test_answers_of_all_kinds_are_corrupted(faulty: FaultyRig) -> None:
    rig = faulty(rule('action = "corrupt"; field = "req_resp"'))
    assert rig.chain(read_counter())[0].req_resp == 0x201
    assert rig.write(0, 2, A) == sealed(req_resp=0x301, address=2, write_counter=1)
    assert rig.chain(write_data(1, 2, A), 0) == []
    assert rig.chain(read_result()) == [sealed(req_resp=0x301, address=2, write_counter=2)]
    assert rig.chain(read_data(0), 0) == []  # no answer to corrupt


def test_write_counter_jumps_before_the_key_is_programmed(faulty: FaultyRig) -> None:
    rig = faulty("write-counter = 7", keyed=False)
    rig.program()
    assert rig.write(7, 0, A) == sealed(req_resp=0x300, write_counter=8)


def test_expired_counter_marks_the_answers_of_rules(faulty: FaultyRig) -> None:
    rig = faulty(
        f"write-counter = {MAX}\n"
        + rule('request = "DATA_READ"; action = "answer"; result = "READ_FAILURE"')
        + rule('request = "DATA_WRITE"; action = "answer"; result = "OK"')
    )
    assert results(rig.chain(read_data(0))) == [READ | EXPIRED]
    assert rig.write(MAX, 0, A) == sealed(req_resp=0x300, result=EXPIRED, write_counter=MAX)


def test_rules_act_together(faulty: FaultyRig) -> None:
    """All delays add up; the first of the rules that answer decides the result."""
    rig = faulty(
        rule('action = "delay"; seconds = 0.1')
        + rule('action = "delay"; seconds = 0.1; when = "after"')
        + rule('action = "answer"; result = "AUTH_FAILURE"; nth = 1')
        + rule('action = "answer"; result = "COUNT_FAILURE"')
        + rule('action = "corrupt"; field = "address"')
    )
    started = time.monotonic()
    assert rig.write(0, 0, A) == sealed(req_resp=0x300, result=AUTH, address=1)
    assert time.monotonic() - started >= 0.2
    assert rig.write(0, 0, A).result == COUNT


@pytest.mark.parametrize("length", [0, 1, 511, 513, 513 * 512, 2049 * 512, 1 << 21])
def test_malformed_chain_passes_without_a_rule(faulty: FaultyRig, length: int) -> None:
    rig = faulty(rule('action = "answer"; result = "AUTH_FAILURE"'))
    assert rig.chain(program_key()[:1] + bytes(length - 1) if length else b"") == [
        sealed(result=GENERAL)
    ]
    assert rig.raw_chain(b"x" * 100, 0) == b""


def random_script(source: random.Random) -> str:
    """A few rules of all kinds but `disconnect`, which only a connection has."""
    rules = []
    for _ in range(source.randrange(1, 5)):
        when = source.choice(("before", "after"))
        action, when = source.choice(
            [
                ('action = "answer"; result = "WRITE_FAILURE"', when),
                ('action = "answer"; result = "GENERAL_FAILURE"', when),
                ('action = "delay"; seconds = 0.001', when),
                ('action = "empty"', when),
                ('action = "lose"', when),
                ('action = "corrupt"; field = "mac"', ""),
                ('action = "corrupt"; field = "nonce"', ""),
            ]
        )
        text = f'{action}; when = "{when}"' if when else action
        rules.append(
            rule(text, **{"from": source.randrange(1, 6), "every": source.randrange(2, 9)})
        )
    return "".join(rules)


def drive(rig: Rig, source: random.Random, requests: int) -> tuple[int, dict[int, bytes]]:
    """Send writes; return the write counter and the blocks that have to be there in the end.

    A write was done exactly if it moved the counter, by one; no other answer reveals it.
    """
    counter = rig.store.counter
    blocks: dict[int, bytes] = {}
    for _ in range(requests):
        address, data = source.randrange(500), source.randbytes(BLOCK)
        rig.ring.add(rig.put(write_data(counter, address, data) + read_result()), rig.room(512))
        rig.process()
        assert rig.store.counter in (counter, counter + 1)
        if rig.store.counter > counter:
            blocks[address] = data
            counter += 1
        assert rig.store.image[address * BLOCK :][:BLOCK] == blocks.get(address, bytes(BLOCK))
    return counter, blocks


@pytest.mark.parametrize("seed", range(6))
def test_no_rule_changes_what_is_durable(faulty: FaultyRig, seed: int) -> None:
    """Reopened, the device has each write that was executed, and nothing else."""
    source = random.Random(seed)
    rig = faulty(random_script(source))
    counter, blocks = drive(rig, source, 30)
    again = faulty('[[rule]]\naction = "empty"\nfrom = 1000\n', keyed=False)
    assert again.store.counter == counter
    assert not any(again.store.damaged)
    for address in range(512):
        found = bytes(again.store.image[address * BLOCK : (address + 1) * BLOCK])
        assert found == blocks.get(address, bytes(BLOCK))
