# SPDX-License-Identifier: Apache-2.0
"""A guest that can send what OP-TEE sends: its kernel has the RPMB subsystem and a user of it."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

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
from vhost_rpmb import __version__

SOURCES = ("rpmb_route.c", "rpmb-play.c")


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
