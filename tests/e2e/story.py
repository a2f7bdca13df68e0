# SPDX-License-Identifier: Apache-2.0
"""The main use of the device as a sequence of commands, each with its expected output.

The demo prints it and the end-to-end test runs it, on one of two stages: a guest with the
unmodified mmc tool, or, without a guest, the client of this package, which has the same verbs.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from tests.e2e.kit import Kit
from tests.e2e.vm import VirtualMachine
from tests.support import oracle
from tests.support.daemon import Daemon, installed_program
from tests.support.oracle import BLOCK_SIZE

KEY = bytes(range(0x41, 0x61))
OTHER_KEY = bytes(reversed(KEY))
LETTER = b"Only a holder of the key can change this.".ljust(BLOCK_SIZE, b".")
RECORDED = b"A recorded write.".ljust(BLOCK_SIZE, b".")

DATA_WRITE_RESPONSE = 0x0300
OK = 0
COUNT_FAILURE = 3


class StoryError(AssertionError):
    """A step did not show the expected result."""


class Stage(Protocol):
    """A daemon on one image, and a user of its device."""

    cast: str  # what `start` starts
    prompt: str

    def start(self) -> None:
        """Start the daemon and the user of the device; files are new, the image stays."""

    def stop(self) -> None:
        """Stop both."""

    def rpmb(self, verb: str, *arguments: str) -> str:
        """The shell command for one of mmc-utils' RPMB verbs."""

    def shell(self, command: str) -> tuple[int, str]:
        """Exit status and output of a shell command."""

    def put_file(self, name: str, content: bytes) -> None:
        """Make a file for the shell commands."""

    def send_frames(self, name: str) -> tuple[str, bytes]:
        """Send a file of frames as it is: how that is done, and the one frame of the answer."""


class GuestStage:
    """A Linux guest and its mmc tool."""

    cast = "Daemon and guest"
    prompt = "guest# "

    def __init__(self, kit: Kit, daemon: Daemon) -> None:
        self._kit = kit
        self._daemon = daemon
        self._vm: VirtualMachine | None = None

    @property
    def vm(self) -> VirtualMachine:
        """The running guest."""
        assert self._vm is not None
        return self._vm

    def start(self) -> None:
        self._daemon.start()
        self._vm = VirtualMachine(self._kit, self._daemon.socket_path)

    def stop(self) -> None:
        if self._vm is not None:
            self._vm.close()
            self._vm = None
        self._daemon.stop()

    def rpmb(self, verb: str, *arguments: str) -> str:
        return shlex.join(("mmc", "rpmb", verb, "/dev/rpmb0", *arguments))

    def shell(self, command: str) -> tuple[int, str]:
        return self.vm.run(command)

    def put_file(self, name: str, content: bytes) -> None:
        self.vm.put_file(name, content)

    def send_frames(self, name: str) -> tuple[str, bytes]:
        command = f"rpmb-send /dev/rpmb0 1 < {name} > answer"
        status, output = self.vm.run(command)
        if status != 0:
            raise StoryError(f"{command}: {output}")
        return command, self.vm.get_file("answer")


class ClientStage:
    """The client of this package, on the host."""

    cast = "Daemon and client"
    prompt = "$ "

    def __init__(self, folder: Path, daemon: Daemon) -> None:
        """Work in `folder`."""
        self._folder = folder
        self._daemon = daemon

    def start(self) -> None:
        self._daemon.start()

    def stop(self) -> None:
        self._daemon.stop()

    def rpmb(self, verb: str, *arguments: str) -> str:
        program = installed_program("vhost-rpmb-client", "vhost_rpmb.client")
        socket_path = os.path.relpath(self._daemon.socket_path, self._folder)
        return shlex.join((*program, f"--socket-path={socket_path}", verb, *arguments))

    def shell(self, command: str) -> tuple[int, str]:
        result = subprocess.run(
            command,
            shell=True,
            cwd=self._folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )
        return result.returncode, result.stdout.rstrip("\n")

    def put_file(self, name: str, content: bytes) -> None:
        path = self._folder / name
        path.touch(0o600)  # it may be a key
        path.write_bytes(content)

    def send_frames(self, name: str) -> tuple[str, bytes]:
        from vhost_rpmb.driver.rpmb import RpmbClient

        frames = (self._folder / name).read_bytes()
        with RpmbClient.connect(str(self._daemon.socket_path)) as client:
            return f"(the file {name} is sent as it is)", client.exchange(frames, 512)


def write_frames(key: bytes, counter: int, address: int, data: bytes) -> bytes:
    """An authenticated write request of one block and the request for its result."""
    return oracle.write_data(counter, address, data, key=key) + oracle.read_result()


def check_write_answer(key: bytes, answer: bytes) -> tuple[int, int]:
    """Result and write counter in the answer to a write; its MAC is checked."""
    (frame,) = oracle.split(answer)
    if frame.key_mac != oracle.mac_of(frame, key=key):
        raise StoryError(f"expected an answer with the key's MAC, found {answer.hex()}")
    if frame.req_resp != DATA_WRITE_RESPONSE:
        raise StoryError(f"response type 0x{frame.req_resp:04x} to a write")
    return frame.result, frame.write_counter


class _Teller:
    """Runs commands on a stage, prints them and checks their output."""

    def __init__(self, stage: Stage, say: Callable[[str], None]) -> None:
        self._stage = stage
        self._say = say

    def chapter(self, text: str) -> None:
        self._say(f"\n== {text}")

    def note(self, text: str) -> None:
        self._say(f"   # {text}")

    def file(self, name: str, content: bytes, what: str) -> None:
        """A file for the commands to come."""
        self._stage.put_file(name, content)
        self.note(f"file {name}: {what}")

    def works(self, command: str, shows: str = "", why: str = "") -> None:
        """A command that succeeds with an output that matches the expression `shows`."""
        self._run(command, succeeds=True, shows=shows, why=why)

    def refused(self, command: str, shows: str, why: str) -> None:
        """A command that fails with an output that matches the expression `shows`."""
        self._run(command, succeeds=False, shows=shows, why=why)

    def _run(self, command: str, succeeds: bool, shows: str, why: str) -> None:
        self._say(f"{self._stage.prompt}{command}")
        status, output = self._stage.shell(command)
        if output:
            self._say(output)
        if (status == 0) is not succeeds or not re.search(shows, output):
            expected = "success" if succeeds else "a failure"
            raise StoryError(
                f"{command}: expected {expected} and an output with {shows!r}, "
                f"found exit status {status} and {output!r}"
            )
        if why:
            self.note(why)

    def write_is_answered(self, name: str, result: int, counter: int, why: str) -> None:
        """A file with a recorded write gets this result and shows this write counter."""
        command, answer = self._stage.send_frames(name)
        self._say(f"{self._stage.prompt}{command}")
        found = check_write_answer(KEY, answer)
        if found != (result, counter):
            raise StoryError(
                f"{command}: expected result {result} and counter {counter}, found {found}"
            )
        self.note(f"result 0x{result:04x}, write counter {counter}: {why}")


def tell(stage: Stage, say: Callable[[str], None]) -> None:
    """Run all steps, from a new image on; `say` gets the transcript.

    Raises StoryError at the first step with an unexpected result. Leaves the stage stopped.
    """
    teller = _Teller(stage, say)
    try:
        _tell_first_life(stage, teller)
        stage.stop()
        _tell_second_life(stage, teller)
    finally:
        stage.stop()


def _recorded_write() -> bytes:
    return write_frames(KEY, counter=1, address=3, data=RECORDED)


def _tell_first_life(stage: Stage, teller: _Teller) -> None:
    rpmb = stage.rpmb

    teller.chapter("First start of a new device")
    stage.start()
    teller.refused(rpmb("read-counter"), "0x0007", "no key is programmed yet")

    teller.chapter("The key is programmed, once")
    teller.file("key", KEY, "32 bytes")
    teller.works(rpmb("write-key", "key"))
    teller.works(rpmb("read-counter"), "0x00000000", "a new write counter")

    teller.chapter("A block is written and read back")
    teller.file("letter", LETTER, "a block of 256 bytes")
    teller.works(rpmb("write-block", "2", "letter", "key"))
    teller.works(rpmb("read-block", "2", "1", "copy", "key"))
    teller.works(
        "cmp letter copy && cut -c 1-60 copy", "Only a holder", "the block, verified with the key"
    )
    teller.works(rpmb("read-counter"), "0x00000001", "each write is counted")

    teller.chapter("A write is recorded in transit")
    teller.file(
        "recorded", _recorded_write(), "an authenticated write to block 3, made for counter 1"
    )
    teller.write_is_answered("recorded", OK, 2, "it was accepted")
    teller.write_is_answered("recorded", COUNT_FAILURE, 2, "refused when it is sent again")


def _tell_second_life(stage: Stage, teller: _Teller) -> None:
    rpmb = stage.rpmb

    teller.chapter(f"{stage.cast} are stopped, and started again on the same image")
    stage.start()
    teller.file("key", KEY, "the same key")
    teller.file("letter", LETTER, "the same block")
    teller.file("recorded", _recorded_write(), "the same recorded write")
    teller.file("other-key", OTHER_KEY, "32 other bytes")

    teller.chapter("Data, key and write counter are still there")
    teller.works(rpmb("read-counter"), "0x00000002")
    teller.works(rpmb("read-block", "2", "1", "copy", "key"))
    teller.works(
        "cmp letter copy && cut -c 1-60 copy", "Only a holder", "the same block, the same key"
    )
    teller.refused(
        rpmb("read-block", "2", "1", "forged", "other-key"),
        "MAC",
        "verification with another key fails",
    )

    teller.chapter("The key cannot be replaced")
    teller.refused(rpmb("write-key", "other-key"), "0x0005", "programming again is refused")
    teller.refused(
        rpmb("write-block", "2", "letter", "other-key"),
        "0x0002|MAC",
        "and so is a write with another key",
    )

    teller.chapter("The recorded write cannot be replayed")
    teller.write_is_answered("recorded", COUNT_FAILURE, 2, "refused, its counter is outdated")

    teller.chapter("The holder of the key continues to write")
    teller.works(rpmb("write-block", "4", "letter", "key"))
    teller.works(rpmb("read-counter"), "0x00000003", "the count continues")
