# SPDX-License-Identifier: Apache-2.0
"""Scripts of faults: what is accepted, and the one line about each error."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.injection.conftest import rule
from tests.support.daemon import Process
from tests.support.rig import make_image
from vhost_rpmb.cli import parse_options
from vhost_rpmb.errors import UsageError
from vhost_rpmb.injection.script import Action, Script, load
from vhost_rpmb.rpmb import spec

ANSWER = 'action = "answer"; result = "WRITE_FAILURE"'


def read(tmp_path: Path, text: str) -> Script:
    path = tmp_path / "script.toml"
    path.write_text(text)
    return load(str(path))


def test_rule_has_defaults(tmp_path: Path) -> None:
    script = read(tmp_path, rule('action = "empty"'))
    (found,) = script.rules
    assert script.write_counter is None
    assert (found.action, found.after, found.addresses) == (Action.EMPTY, False, None)
    assert found.requests == {1, 2, 3, 4}  # not RESULT_READ
    assert [count for count in range(5) if found.selects(count)] == [1, 2, 3, 4]


def test_all_keys_are_read(tmp_path: Path) -> None:
    text = rule(
        'request = ["DATA_WRITE", "DATA_READ"]; address = [3, 5]; from = 4; every = 2; times = 2; '
        'action = "answer"; when = "after"; result = "WRITE_COUNTER_EXPIRED"'
    )
    script = read(tmp_path, "write-counter = 5\n" + text + rule('action = "delay"', seconds=1.5))
    first, second = script.rules
    assert script.write_counter == 5
    assert first.requests == {spec.VIRTIO_RPMB_REQ_DATA_WRITE, spec.VIRTIO_RPMB_REQ_DATA_READ}
    assert [count for count in range(12) if first.selects(count)] == [4, 6]
    assert (first.result, first.after, second.seconds) == (0x80, True, 1.5)
    assert [block for block in range(8) if first.concerns(3, range(block, block + 1))] == [3, 4, 5]
    assert first.concerns(4, range(4))
    assert not first.concerns(2, range(3, 4))
    assert str(first) == "rule 1: answer WRITE_COUNTER_EXPIRED after execution"
    assert str(second) == "rule 2: delay 1.5 s before execution"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "script: expected a [[rule]] or write-counter, found 'neither'"),
        ("[[rule]", "expected TOML, found: "),
        ("rule = 3", "rule: expected tables with the head [[rule]], found 3"),
        ("rule = [3]", "rule: expected tables with the head [[rule]], found [3]"),
        ("write-counter = -1", "write-counter: expected a number 0 to 4294967295, found -1"),
        ("write-counter = 4294967296", "write-counter: expected a number 0 to 4294967295"),
        ("write-counter = true", "write-counter: expected a number"),
        ("writecounter = 1", "key: expected write-counter or rule, found 'writecounter'"),
        (rule("nth = 1"), "rule 1: action: expected answer or corrupt or delay or"),
        (rule('action = "explode"'), "rule 1: action: expected answer or"),
        (rule(ANSWER) + rule('action = "answer"'), "rule 2: result: expected result with action"),
        (rule(f"{ANSWER}; seconds = 1"), "rule 1: seconds: expected seconds with action delay"),
        (rule(f'{ANSWER}; field = "mac"'), "rule 1: field: expected field with action corrupt"),
        (rule('action = "lose"; result = 1'), "rule 1: result: expected result with action answer"),
        (
            rule(f'{ANSWER}; request = "WRITE"'),
            "request: expected one or more of PROGRAM_KEY, GET_",
        ),
        (rule(f"{ANSWER}; request = []"), "rule 1: request: expected one or more of"),
        (rule(f"{ANSWER}; request = [3]"), "rule 1: request: expected one or more of"),
        (rule(f"{ANSWER}; address = -1"), "address: expected a block, or [first, last]"),
        (rule(f"{ANSWER}; address = 65536"), "address: expected a block, or [first, last]"),
        (rule(f"{ANSWER}; address = [5, 4]"), "address: expected a block, or [first, last]"),
        (rule(f"{ANSWER}; address = [5]"), "address: expected a block, or [first, last]"),
        (rule(f'{ANSWER}; address = "5"'), "address: expected a block, or [first, last]"),
        (
            rule(f'{ANSWER}; address = 5; request = "PROGRAM_KEY"'),
            "address: expected it with DATA_WRITE or DATA_READ, found 'request PROGRAM_KEY'",
        ),
        (rule(f"{ANSWER}; nth = 0"), "rule 1: nth: expected a number 1 to 1000000000, found 0"),
        (rule(f"{ANSWER}; nth = 1.0"), "rule 1: nth: expected a number 1 to"),
        (rule(f"{ANSWER}; nth = 1; times = 2"), "rule 1: times: expected no such key beside nth"),
        (rule(f"{ANSWER}; every = 0"), "rule 1: every: expected a number 1 to"),
        (rule(f"{ANSWER}; from = true"), "rule 1: from: expected a number 1 to"),
        (
            rule(f'{ANSWER}; when = "later"'),
            "rule 1: when: expected before or after, found 'later'",
        ),
        (rule('action = "answer"; result = "BAD"'), "rule 1: result: expected OK, GENERAL_FAILURE"),
        (rule('action = "answer"; result = 65536'), "rule 1: result: expected OK, GENERAL_FAILURE"),
        (rule('action = "answer"; result = true'), "rule 1: result: expected OK, GENERAL_FAILURE"),
        (
            rule('action = "answer"; result = "OK"'),
            "result: expected OK with request DATA_WRITE or",
        ),
        (rule('action = "corrupt"; field = "data"'), "rule 1: field: expected mac or nonce or"),
        (
            rule('action = "corrupt"; field = "mac"; when = "after"'),
            "rule 1: when: expected no such key with action corrupt",
        ),
        (
            rule('action = "delay"; seconds = 0'),
            "rule 1: seconds: expected more than 0, up to 86400",
        ),
        (rule('action = "delay"; seconds = nan'), "rule 1: seconds: expected more than 0"),
        (rule('action = "delay"; seconds = "1"'), "rule 1: seconds: expected more than 0"),
        (rule('action = "delay"; seconds = 86401'), "rule 1: seconds: expected more than 0"),
        (rule(f"{ANSWER}; number = 1"), "rule 1: key: expected request or address or nth or"),
    ],
)
def test_error_names_file_rule_and_key(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(UsageError) as error:
        read(tmp_path, text)
    line = str(error.value)
    assert "\n" not in line
    assert line.startswith(f"{tmp_path / 'script.toml'}: ")
    assert expected in line
    assert line.endswith(": correct the script")


@pytest.mark.parametrize("name", ["missing.toml", "."])
def test_script_that_cannot_be_read_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="name a readable TOML file"):
        load(str(tmp_path / name))


def test_script_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "script.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="expected TOML, found"):
        load(str(path))


@pytest.mark.parametrize(("last", "accepted"), [(511, True), (512, False)])
def test_address_has_to_be_on_the_device(tmp_path: Path, last: int, accepted: bool) -> None:
    script = read(tmp_path, rule(f"{ANSWER}; address = [500, {last}]"))
    if accepted:
        script.check(512)
        return
    with pytest.raises(UsageError, match="rule 1: address: expected blocks 0 to 511 of the image"):
        script.check(512)


@pytest.mark.parametrize(
    ("options", "variables", "expected"),
    [
        (["--store=etcd:x", "--device=d"], {}, "not for a device that hosts share"),
        ([], {"INVOCATION_ID": "x"}, "found INVOCATION_ID in the environment"),
        ([], {"LISTEN_FDS": "1"}, "found LISTEN_FDS in the environment"),
        ([], {"NOTIFY_SOCKET": "/run/systemd/notify"}, "found NOTIFY_SOCKET in the environment"),
        (["--debug"], {"FDSTORE": "8"}, "found FDSTORE in the environment"),
        ([], {}, ""),
        ([], {"NOTIFY_SOCKET": "@00001"}, ""),
        (["--debug"], {"INVOCATION_ID": "x", "NOTIFY_SOCKET": "/run/systemd/notify"}, ""),
    ],
)
def test_faults_are_refused_in_production(
    tmp_path: Path, options: list[str], variables: dict[str, str], expected: str
) -> None:
    path = tmp_path / "script.toml"
    path.write_text(rule(ANSWER))
    home = [] if "--device=d" in options else ["--flash-path=image"]
    arguments = ["--socket-path=socket", f"--inject={path}", *home, *options]
    if not expected:
        script = parse_options(arguments, variables).inject
        assert script is not None
        assert len(script.rules) == 1
        return
    with pytest.raises(UsageError, match=expected):
        parse_options(arguments, variables)


def test_script_is_checked_before_the_device_is_created(tmp_path: Path) -> None:
    path, image = tmp_path / "script.toml", make_image(tmp_path / "image")
    path.write_text(rule('action = "explode"'))
    options = (f"--inject={path}", f"--flash-path={image}", "--socket-path=s")
    process = Process(tmp_path, *options, variables={"INVOCATION_ID": "", "LISTEN_FDS": ""})
    process.refused("rule 1: action: expected answer or")
    assert sorted(each.name for each in tmp_path.glob("image*")) == ["image"]
