# SPDX-License-Identifier: Apache-2.0
"""A FUSE file system that answers one process only, until its standard input ends.

``python fuse.py FOLDER PID`` mounts it at FOLDER, with one file of any name. To all others it lets
open the file and answers nothing that is asked about it, nor its being closed.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import stat
import struct
import sys

# <linux/fuse.h>
LOOKUP, FORGET, GETATTR, SETATTR, OPEN, STATFS, RELEASE = 1, 2, 3, 4, 14, 17, 18
FLUSH, INIT, INTERRUPT, BATCH_FORGET = 25, 26, 36, 42
IN_HEADER = struct.Struct("=IIQQIIII")
OUT_HEADER = struct.Struct("=IiQ")
SIZE = 1 << 20
FILE = 2  # its node

MNT_DETACH = 2
libc = ctypes.CDLL(None, use_errno=True)


def attributes(node: int) -> bytes:
    mode = stat.S_IFREG | 0o600 if node == FILE else stat.S_IFDIR | 0o700
    return struct.pack("=6Q10I", node, SIZE, 0, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)


def answer(opcode: int, node: int, friend: bool) -> bytes | int | None:
    """What belongs into the answer, an error number, or None for no answer."""
    if opcode == INIT:
        return struct.pack("=IIIIHHIIHH8I", 7, 31, 0, 0, 0, 0, 4096, 1, 1, 0, *[0] * 8)
    if opcode == LOOKUP:
        return struct.pack("=4Q2I", FILE, 0, 3600, 0, 0, 0) + attributes(FILE)
    if opcode == OPEN:
        return struct.pack("=QII", 0, 0, 0)
    if opcode == GETATTR and (friend or node != FILE):
        return struct.pack("=QII", 0, 0, 0) + attributes(node)
    if opcode in (FLUSH, RELEASE) and friend:
        return b""
    if opcode in (GETATTR, STATFS, FLUSH, RELEASE, FORGET, INTERRUPT, BATCH_FORGET):
        return None
    return errno.ENOSYS


def serve(device: int, friend: int) -> None:
    request = os.read(device, 1 << 16)
    _, opcode, unique, node, _, _, pid, _ = IN_HEADER.unpack_from(request)
    found = answer(opcode, node, pid == friend)
    if isinstance(found, bytes):
        os.write(device, OUT_HEADER.pack(OUT_HEADER.size + len(found), 0, unique) + found)
    elif found is not None:
        os.write(device, OUT_HEADER.pack(OUT_HEADER.size, -found, unique))


def main() -> None:
    folder, friend = os.fsencode(sys.argv[1]), int(sys.argv[2])
    device = os.open("/dev/fuse", os.O_RDWR)
    options = b"fd=%d,rootmode=40000,user_id=0,group_id=0" % device
    if libc.mount(b"silent", folder, b"fuse", 0, options):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    try:
        print("ready", flush=True)
        while 0 not in (ready := select.select([0, device], [], [])[0]):
            if ready:
                serve(device, friend)
    finally:
        libc.umount2(folder, MNT_DETACH)


main()
