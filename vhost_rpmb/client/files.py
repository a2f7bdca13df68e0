# SPDX-License-Identifier: Apache-2.0
"""Files and streams of ``vhost-rpmb-client``: keys, data in and out, lines for people."""

import errno
import os
import select
import stat
import sys
import tempfile
import time

from vhost_rpmb.driver.errors import ClientError
from vhost_rpmb.errors import UsageError
from vhost_rpmb.rpmb import spec

__all__ = [
    "STANDARD_STREAM",
    "create_file",
    "create_folder",
    "name_of",
    "read_blocks",
    "read_key",
    "read_optional_key",
    "warn",
    "write_file",
    "write_stdout",
]

PROG = "vhost-rpmb-client"
STANDARD_STREAM = "-"
_FIFO_WAIT = 10  # seconds for the other end of a FIFO
_FIFO_PAUSE = 0.05  # seconds between two looks for a reader


def read_key(path: str) -> bytes:
    """Read a key, 32 bytes; UsageError where there are fewer."""
    from vhost_rpmb.storage.local.keyfile import exposure

    key, mode = _read_input(path, spec.KEY_SIZE + 1)
    if len(key) < spec.KEY_SIZE:
        raise UsageError(
            f"{name_of(path)}: expected a key of {spec.KEY_SIZE} bytes, found {len(key)}"
        )
    if path != STANDARD_STREAM and (exposed := exposure(path, mode)):
        warn(f"the key file {exposed}")
    if len(key) > spec.KEY_SIZE:
        warn(
            f"{name_of(path)}: expected a key of {spec.KEY_SIZE} bytes, found more: the rest is"
            " ignored"
        )
    return key[: spec.KEY_SIZE]


def read_optional_key(path: str | None) -> bytes | None:
    """Read a key where one is given, and warn where none is."""
    if path is None:
        warn("no KEYFILE given: answers are not authenticated")
        return None
    return read_key(path)


def read_blocks(path: str, most: int) -> bytes:
    """Read the data of up to ``most`` blocks; UsageError unless they are whole."""
    size = most * spec.BLOCK_SIZE
    data, _ = _read_input(path, size + 1)
    if not data or len(data) % spec.BLOCK_SIZE or len(data) > size:
        found = f"more than {size}" if len(data) > size else str(len(data))
        raise UsageError(
            f"{name_of(path)}: expected a multiple of {spec.BLOCK_SIZE} bytes, up to {size}, found "
            f"{found}"
        )
    return data


def _read_input(path: str, most: int) -> tuple[bytes, int]:
    """Read at most ``most`` bytes of an input file; return its mode as well."""
    try:
        if path != STANDARD_STREAM:
            with open(path, "rb", buffering=0, opener=_open_at_once) as file:
                fd = file.fileno()
                poll = select.poll()
                poll.register(fd, select.POLLIN)
                began = bool(poll.poll(_FIFO_WAIT * 1000))
                os.set_blocking(fd, True)  # a FIFO that nobody writes into is at its end then
                data = _read_up_to(fd, most)
                if not data and not began:
                    raise UsageError(
                        f"{path}: expected a program that writes into this FIFO, found none within"
                        f" {_FIFO_WAIT} s: start it first"
                    )
                return data, os.fstat(fd).st_mode
        if sys.stdin is None:
            raise UsageError("standard input is closed")
        return _read_up_to(sys.stdin.fileno(), most), 0
    except OSError as error:
        raise UsageError(f"{name_of(path)}: {error.strerror}") from None


def _open_at_once(path: str, flags: int) -> int:
    """Open a file; where it is a FIFO, without waiting for its other end."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)


def _read_up_to(fd: int, most: int) -> bytes:
    data = b""
    while len(data) < most and (part := os.read(fd, most - len(data))):
        data += part
    return data


def write_stdout(data: bytes) -> None:
    """Write all of it; ClientError where that fails."""
    if sys.stdout is None:
        raise ClientError("standard output is closed")
    try:
        _write_all(sys.stdout.fileno(), data)
    except OSError as error:
        raise ClientError(f"standard output: {error.strerror}") from None


def write_file(path: str, data: bytes) -> None:
    """Put ``data`` into a file that has all of it or, after a failure, what it had before."""
    path = os.path.realpath(path)
    try:
        try:
            mode = os.stat(path).st_mode
        except FileNotFoundError:
            mode = stat.S_IFREG | stat.S_IRUSR | stat.S_IWUSR
        if not stat.S_ISREG(mode):  # a device or a FIFO cannot be replaced
            _write_special(path, data)
            return
        fd, new = tempfile.mkstemp(dir=os.path.dirname(path), prefix=".vhost-rpmb-client-")
        try:
            try:
                _write_all(fd, data)
                os.fchmod(fd, stat.S_IMODE(mode))
            finally:
                os.close(fd)
            os.replace(new, path)
        except BaseException:
            os.unlink(new)
            raise
    except OSError as error:
        raise ClientError(f"{path}: {error.strerror}") from None


def _write_special(path: str, data: bytes) -> None:
    """Write into a device, or into a FIFO for whose reader it waits a while."""
    ends = time.monotonic() + _FIFO_WAIT
    while True:
        try:
            fd = _open_at_once(path, os.O_WRONLY)
            break
        except OSError as error:
            if error.errno != errno.ENXIO or not stat.S_ISFIFO(os.stat(path).st_mode):
                raise
        if time.monotonic() > ends:
            raise ClientError(
                f"{path}: expected a program that reads from this FIFO, found none within"
                f" {_FIFO_WAIT} s: start it first"
            )
        time.sleep(_FIFO_PAUSE)
    try:
        os.set_blocking(fd, True)
        _write_all(fd, data)
    finally:
        os.close(fd)


def create_file(path: str, data: bytes, size: int | None = None) -> None:
    """Make a new file, mode 0600, whole and durable or not at all; sparse up to ``size`` bytes.

    UsageError where the path exists already or the file cannot be created.
    """
    from vhost_rpmb.storage.local.files import sync_folder

    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise UsageError(f"{path} exists already: choose another path, or remove it") from None
    except OSError as error:
        raise UsageError(f"cannot create {path}: {error.strerror}") from None
    try:
        try:
            _write_all(fd, data)
            os.ftruncate(fd, len(data) if size is None else size)
            os.fsync(fd)
        finally:
            os.close(fd)
        sync_folder(path)
    except BaseException as error:
        os.unlink(path)
        if isinstance(error, OSError):
            raise ClientError(f"cannot create {path}: {error.strerror}") from None
        raise


def create_folder(path: str) -> None:
    """Make a new folder, mode 0700, and the folders above it where they are missing.

    UsageError where the path exists already or the folder cannot be created.
    """
    from vhost_rpmb.storage.local.files import sync_folder

    path = os.path.abspath(path)
    if os.path.lexists(path):
        raise UsageError(f"{path} exists already: choose another path, or remove it")
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        os.mkdir(path, 0o700)
        sync_folder(path)
    except OSError as error:
        raise UsageError(f"cannot create {path}: {error.strerror}") from None


def _write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


def name_of(path: str) -> str:
    """What a message calls a file."""
    return "standard input" if path == STANDARD_STREAM else path


def warn(text: str) -> None:
    """Print one warning on standard error."""
    from vhost_rpmb import log  # imported lazily: few commands warn

    log.warn(PROG, text)
