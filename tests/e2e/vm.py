# SPDX-License-Identifier: Apache-2.0
"""Linux guests on QEMU, driven over their console; one with the RPMB device of a running daemon."""

from __future__ import annotations

import base64
import re
import secrets
import shlex
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from tests.e2e.kit import Kit
from vhost_rpmb.closing import Closing

READY = b"Guest is ready."
BOOT_TIMEOUT = 300.0  # seconds; a boot takes about 6, on a busy machine more
# A terminal takes lines of at most 4095 bytes.
LINE_MAX = 4000
FILE_CHUNK = 2048
MARK_MAX = 100


class GuestError(Exception):
    """The guest did not do what was waited for; the text ends with its console's last lines."""


class Guest(Closing):
    """A guest from the start of QEMU to `close`; usable in a ``with`` statement.

    The guest's console is QEMU's standard input and output, so `command_line` started by hand gives
    a shell in the guest.
    """

    def __init__(self, command_line: list[str]) -> None:
        """Start QEMU and wait until the guest takes commands; GuestError when it does not."""
        self.command_line = command_line
        self._token = secrets.token_hex(8)
        self._commands = 0
        self._console = bytearray()
        self._news = threading.Condition()
        # Apart from the console, where a message could end up within a command's output.
        self._messages = bytearray()
        self._process = subprocess.Popen(
            self.command_line,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,  # Ctrl-C is for us, not for QEMU
        )
        self._readers = [
            threading.Thread(target=self._read, args=stream, daemon=True)
            for stream in (
                (self._process.stdout, self._console),
                (self._process.stderr, self._messages),
            )
        ]
        self._open_streams = len(self._readers)
        for reader in self._readers:
            reader.start()
        try:
            self._enter(0)
        except BaseException:
            self.close()
            raise

    def run(self, command: str, timeout: float = 300.0) -> tuple[int, str]:
        """Run a shell command in the guest: its exit status, and its output (both streams).

        Raises GuestError after `timeout` seconds or when QEMU ends.
        """
        self._commands += 1
        mark = f"{self._token}-{self._commands}"
        start = len(self._console)
        # The guest's shell puts the markers together: an echo of this line has none.
        self._send(
            f"printf '%s-begin\\n' {mark};"
            f" (eval {shlex.quote(command)}) </dev/null;"
            f" printf '\\n%s-end %d.\\n' {mark} $?"
        )
        pattern = re.compile(rf"\r?\n{mark}-end (\d+)\.".encode())
        end = self._wait(pattern, start, timeout, f"the end of: {command}")
        begin = self._console.index(f"{mark}-begin".encode(), start)
        output = self._console[self._console.index(b"\n", begin) + 1 : end.start()]
        return int(end[1]), output.decode(errors="replace").replace("\r\n", "\n").rstrip("\n")

    def put_file(self, path: str, content: bytes) -> None:
        """Make a file in the guest."""
        succeed(self, f": > {shlex.quote(path)}")
        for start in range(0, len(content), FILE_CHUNK):
            text = base64.b64encode(content[start : start + FILE_CHUNK]).decode()
            succeed(self, f"echo {text} | base64 -d >> {shlex.quote(path)}")

    def get_file(self, path: str) -> bytes:
        """The content of a file in the guest."""
        return base64.b64decode(succeed(self, f"base64 {shlex.quote(path)}"))

    def reboot(self, command: str = "reboot -f") -> None:
        """Reboot the guest; QEMU and its connection to the daemon go on."""
        self.reboot_by(lambda: self._send(command))

    def reboot_by(self, action: Callable[[], object]) -> None:
        """Do what resets the guest, and wait until it takes commands again."""
        start = len(self._console)
        action()
        self._enter(start)

    def close(self) -> None:
        """End QEMU, as pulling the plug would."""
        self._process.kill()
        self._process.wait()
        for reader in self._readers:
            reader.join()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            if pipe is not None:
                pipe.close()

    def _enter(self, start: int) -> None:
        """Wait for the guest's shell and turn it into one without line editing, prompt and echo."""
        self._wait(re.compile(re.escape(READY)), start, BOOT_TIMEOUT, "the guest to boot")
        self._send("stty -echo; exec sh 2>&1 | cat")
        self.run("true", timeout=BOOT_TIMEOUT)

    def _send(self, line: str) -> None:
        if len(line) > LINE_MAX:
            raise ValueError(f"a guest command of {len(line)} bytes, at most {LINE_MAX} fit")
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line.encode() + b"\n")
        except BrokenPipeError:
            raise GuestError(self._report("QEMU has ended")) from None

    def _wait(
        self, pattern: re.Pattern[bytes], start: int, timeout: float, what: str
    ) -> re.Match[bytes]:
        """Wait for a text of at most MARK_MAX bytes; what has come is searched once."""
        deadline = time.monotonic() + timeout
        with self._news:
            while True:
                match = pattern.search(self._console, start)
                if match:
                    return match
                if not self._open_streams:
                    raise GuestError(self._report(f"QEMU ended while waiting for {what}"))
                if b"Kernel panic" in self._console[start:]:
                    raise GuestError(self._report(f"the guest panicked, waiting for {what}"))
                left = deadline - time.monotonic()
                if left <= 0:
                    raise GuestError(self._report(f"waited {timeout:g} s for {what}"))
                start = max(start, len(self._console) - MARK_MAX)
                self._news.wait(left)

    def _read(self, stream: IO[bytes], into: bytearray) -> None:
        while chunk := stream.read(65536):
            with self._news:
                into += chunk
                self._news.notify_all()
        with self._news:
            self._open_streams -= 1
            self._news.notify_all()

    def _report(self, what: str) -> str:
        tail = "\n".join(self._console.decode(errors="replace").splitlines()[-30:])
        messages = self._messages.decode(errors="replace").strip() or "none"
        return f"{what}\nQEMU's messages: {messages}\nThe console's last lines:\n{tail}"


def succeed(guest: Guest, command: str) -> str:
    """Run a shell command in a guest; return its output. Raises GuestError if it fails."""
    status, output = guest.run(command)
    if status != 0:
        raise GuestError(f"exit status {status} from {command!r}: {output}")
    return output


class VirtualMachine(Guest):
    """The kit's guest, whose RPMB device is the daemon at a socket."""

    def __init__(self, kit: Kit, socket_path: Path, monitor_path: Path | None = None) -> None:
        command_line = qemu_command_line(kit, socket_path)
        if monitor_path is not None:
            command_line += ["-qmp", f"unix:{monitor_path},server=on,wait=off"]
        super().__init__(command_line)


def qemu_command_line(kit: Kit, socket_path: Path) -> list[str]:
    """The QEMU command line for a guest whose RPMB device is the daemon at a socket."""
    device = f"vhost-user-test-device{kit.architecture.transport}"
    return [
        *kit.qemu,
        *("-nodefaults", "-no-user-config", "-display", "none", "-serial", "mon:stdio"),
        *kit.architecture.machine,
        *("-object", "memory-backend-memfd,id=mem,size=256M,share=on"),
        *("-m", "256"),
        *("-kernel", str(kit.kernel), "-initrd", str(kit.initramfs)),
        # On a busy machine the check of the timer can end in a panic.
        *("-append", f"console={kit.architecture.console} quiet no_timer_check"),
        *("-chardev", f"socket,id=rpmb,path={socket_path}"),
        *("-device", f"{device},chardev=rpmb,virtio-id=28,num_vqs=1,vq_size=64,config_size=3"),
    ]
