# SPDX-License-Identifier: Apache-2.0
"""OP-TEE's kernel side without OP-TEE: its recorded requests, and a guest that can send them.

``tests/data/optee-workload.tsv`` is what OP-TEE 4.10 sent in one run of many puts, gets, in-place
writes and deletes of objects. Frames and answers are made here from the numbers in it, by an
independent model of the device.
"""

from __future__ import annotations

import csv
import random
import shutil
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from tests.e2e.archive import Archive
from tests.e2e.cache import Say, Steps, cached, say_it
from tests.e2e.kit import (
    DRIVER_FOLDER,
    DRIVER_SOURCES,
    DRIVER_VERSION,
    RPMB_SEND_FLAGS,
    TOOLS_FOLDER,
    Kit,
)
from tests.e2e.workshop import Workshop, make_workshop
from tests.support import oracle
from tests.support.documents import ROOT
from tests.support.oracle import BLOCK_SIZE, Frame
from vhost_rpmb import __version__

WORKLOAD = ROOT / "tests/data/optee-workload.tsv"
SOURCES = ("rpmb_route.c", "rpmb-play.c")
COUNTS = struct.Struct("=II")  # frames of a request and of its answer
RESPONSE = 8  # the bits by which the type of an answer is that of the request


class Exchange(NamedTuple):
    """Frames as OP-TEE sends and expects them: it leaves RESULT_READ to the kernel."""

    request: bytes
    answer: bytes

    def pack(self) -> bytes:
        sizes = (len(self.request) // oracle.FRAME_SIZE, len(self.answer) // oracle.FRAME_SIZE)
        return COUNTS.pack(*sizes) + self.request + self.answer


class Model:
    """A device: what it answers to the next request."""

    def __init__(self, key: bytes = oracle.KEY, blocks: int = 512) -> None:
        self.content = bytearray(blocks * BLOCK_SIZE)
        self.counter = 0
        self._key = key
        self._random = random.Random(blocks)

    def program_key(self) -> Exchange:
        answer = self._answer(oracle.PROGRAM_KEY)
        return Exchange(oracle.program_key(self._key, block_count=0), answer)

    def read_counter(self) -> Exchange:
        nonce = self._nonce()
        answer = self._answer(oracle.GET_WRITE_COUNTER, nonce=nonce, write_counter=self.counter)
        return Exchange(oracle.read_counter(nonce, block_count=0), answer)

    def write(self, address: int, count: int) -> Exchange:
        blocks = [self._random.randbytes(BLOCK_SIZE) for _ in range(count)]
        request = oracle.write_data(self.counter, address, *blocks, key=self._key)
        self.counter += 1
        start = address * BLOCK_SIZE
        self.content[start : start + count * BLOCK_SIZE] = b"".join(blocks)
        answer = self._answer(oracle.DATA_WRITE, address=address, write_counter=self.counter)
        return Exchange(request, answer)

    def read(self, address: int, count: int) -> Exchange:
        nonce = self._nonce()
        frames = [
            Frame(
                data=bytes(self.content[number * BLOCK_SIZE :][:BLOCK_SIZE]),
                nonce=nonce,
                address=address,
                block_count=count,
                req_resp=oracle.DATA_READ << RESPONSE,
            )
            for number in range(address, address + count)
        ]
        answer = oracle.pack(oracle.sign(frames, self._key))
        return Exchange(oracle.read_data(address, 0, nonce), answer)

    def _answer(self, kind: int, **fields: int | bytes) -> bytes:
        return oracle.sealed(self._key, **fields, req_resp=kind << RESPONSE).pack()

    def _nonce(self) -> bytes:
        return self._random.randbytes(16)


def workload(model: Model) -> Iterator[Exchange]:
    """The recorded requests, the key before them."""
    yield model.program_key()
    with WORKLOAD.open() as rows:
        for row in csv.DictReader(rows, delimiter="\t"):
            address, blocks = int(row["address"]), int(row["blocks"])
            if row["request"] == "GET_WRITE_COUNTER":
                yield model.read_counter()
            elif row["request"] == "DATA_WRITE":
                yield model.write(address, blocks)
            else:
                yield model.read(address, blocks)


def with_files(kit: Kit, folder: Path, **files: bytes) -> Kit:
    """The kit with more files in its guest's root."""
    archive = Archive()
    for name, content in files.items():
        archive.add(name, 0o100644, content)
    path = folder / "initramfs"
    path.write_bytes(kit.initramfs.read_bytes() + archive.finish())
    return replace(kit, initramfs=path)


def make_routing_kit(kit: Kit, say: Say = say_it) -> Kit:
    """The kit with the kernel's RPMB subsystem, a driver that registers, and a user of it."""
    workshop = make_workshop(say)
    paths = [
        *(DRIVER_FOLDER / name for name in DRIVER_SOURCES),
        *(TOOLS_FOLDER / name for name in SOURCES),
        Path(__file__),
    ]
    sources = [path.read_bytes() for path in paths]
    folder = cached(
        f"routing-{kit.architecture.name}",
        (kit.initramfs.parent.name, workshop.system.name, sources, __version__),
        lambda folder, steps: _fill(folder, steps, kit, workshop),
        say,
    )
    return replace(kit, initramfs=folder / "initramfs")


def _fill(folder: Path, steps: Steps, kit: Kit, workshop: Workshop) -> None:
    build = Path(tempfile.mkdtemp(prefix="routing-", dir=kit.system / "tmp"))
    inside = Path("/") / build.relative_to(kit.system)
    release = kit.kernel.name.removeprefix("vmlinuz-")
    prefix = kit.architecture.compiler_prefix
    make = ("make", f"KDIR=/lib/modules/{release}/build", *kit.architecture.make_variables)
    try:
        with steps.step("driver with kernel routing"):
            workshop.copy_rpmb_core(build / "core")
            shutil.copytree(DRIVER_FOLDER, build / "driver")
            (build / "user").mkdir()
            shutil.copy(TOOLS_FOLDER / "rpmb_route.c", build / "user")
            for name in ("core", "user"):
                shutil.copy(DRIVER_FOLDER / "Makefile", build / name)
            (build / "user/Kbuild").write_text(
                "obj-m := rpmb_route.o\nccflags-y := -DCONFIG_RPMB_MODULE\n"
                f"KBUILD_EXTRA_SYMBOLS := {inside}/core/Module.symvers\n"
            )
            core = f"RPMB_CORE={inside}/core"
            steps.run_inside(kit.system, *make, "-C", inside / "core")
            steps.run_inside(
                kit.system, *make, "-C", inside / "driver", core, DRIVER_VERSION, "W=1e"
            )
            steps.run_inside(kit.system, *make, "-C", inside / "user", "W=1e")
            modules = {
                name: build / place / name
                for place, name in (
                    ("core", "rpmb-core.ko"),
                    ("driver", "virtio_rpmb.ko"),
                    ("user", "rpmb_route.ko"),
                )
            }
            for path in modules.values():
                target = inside / path.relative_to(build)
                steps.run_inside(kit.system, f"{prefix}strip", "--strip-debug", target)
            shutil.copy(TOOLS_FOLDER / "rpmb-play.c", build)
            program = (inside / "rpmb-play", inside / "rpmb-play.c")
            steps.run_inside(kit.system, f"{prefix}gcc", *RPMB_SEND_FLAGS, "-o", *program)
        archive = Archive()
        for name, path in (modules | {"usr/bin/rpmb-play": build / "rpmb-play"}).items():
            archive.add(name, 0o100755, path.read_bytes())
        (folder / "initramfs").write_bytes(kit.initramfs.read_bytes() + archive.finish())
    finally:
        shutil.rmtree(build)
