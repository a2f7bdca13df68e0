# SPDX-License-Identifier: Apache-2.0
"""The guest driver as its users build it: from the source tree, and by DKMS."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.e2e.cache import ISOLATED, Say, Steps
from tests.e2e.kit import DRIVER_FOLDER, DRIVER_SOURCES
from tests.e2e.workshop import Workshop, make_workshop
from tests.support.documents import ROOT, blocks_that_begin, commands
from vhost_rpmb import __version__

# The first test may have to make the workshop.
pytestmark = [pytest.mark.qemu, pytest.mark.long, pytest.mark.timeout(900)]

MODULE = "virtio_rpmb.ko"
# Debian's sparse is older than Linux 7.3. That does not start it unless told twice, in headers
# without the script that tries it, and has one word that it does not know.
SPARSE = ("C=2", "KBUILD_CHECKSRC=2", "CF=-D__typeof_unqual__=__typeof__")
# It takes the length of a text for no constant; Linux 7.3 checks one in each of these.
MODULE_INFORMATION = re.compile(r"MODULE_\w+\(|module_param_")
# What a package does to the system is undone: it sees a copy in memory.
ON_A_COPY = (
    'mount -t tmpfs none "$1" && mkdir "$1/upper" "$1/work" "$1/root" && '
    'mount -t overlay -o "lowerdir=$0,upperdir=$1/upper,workdir=$1/work" none "$1/root" && '
    'cp "$2" "$1/root/tmp" && mount -t proc proc "$1/root/proc" && '
    'exec chroot "$1/root" env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin sh -euc "$3"'
)


@pytest.fixture(scope="session")
def workshop(say: Say) -> Workshop:
    return make_workshop(say)


@pytest.mark.parametrize("routing", [False, True], ids=["plain", "routing"])
@pytest.mark.parametrize("architecture", ["amd64", "arm64"])
@pytest.mark.parametrize("version", ["6.12", "7.3"])
def test_driver_builds_without_warnings(
    workshop: Workshop, version: str, architecture: str, routing: bool, tmp_path: Path
) -> None:
    """With the warnings of W=1 as errors, and sparse."""
    headers = workshop.headers(version, architecture)
    log = tmp_path / "log"
    steps = Steps("driver", log, print)
    with workshop.folder() as folder:
        # As in the source tree, where the version comes from.
        for name in DRIVER_SOURCES:
            copy(folder, DRIVER_FOLDER / name)
        copy(folder, ROOT / "vhost_rpmb/__init__.py")
        inside = workshop.inside(folder)
        make = ("make", f"KDIR={headers.kdir}", *headers.variables)
        driver: tuple[str | Path, ...] = ("-C", inside / "guest/linux", "W=1e", *SPARSE)
        if routing:
            workshop.copy_rpmb_core(folder / "core")
            shutil.copy(DRIVER_FOLDER / "Makefile", folder / "core")
            steps.run_inside(workshop.system, *make, "-C", inside / "core")
            driver += (f"RPMB_CORE={inside}/core",)
        log.write_text("")
        steps.run_inside(workshop.system, *make, *driver)
        module = folder / "guest/linux" / MODULE
        assert modinfo(module, "version") == __version__
        assert modinfo(module, "vermagic").split()[0] == headers.release
        assert modinfo(module, "license") == "GPL"
        assert modinfo(module, "depends") == ("rpmb-core" if routing else "")
        lines = log.read_text().splitlines()
    # Sparse warns of the kernel's headers too.
    ours = [line for line in lines if re.search(r"(core|ioctl|route)\.c:|virtio_rpmb\.h:", line)]
    assert not [line for line in ours if not is_module_information(line)]
    checked = {Path(line.split()[-1]).name for line in lines if "CHECK " in line}
    assert checked == {"core.c", "ioctl.c", *(["route.c"] if routing else [])}
    assert not any("WARNING: modpost" in line for line in lines)


def is_module_information(complaint: str) -> bool:
    name, line, _, text = complaint.split(":", 3)
    source = (DRIVER_FOLDER / Path(name).name).read_text().splitlines()[int(line) - 1]
    return text == " error: bad constant expression" and bool(MODULE_INFORMATION.match(source))


def copy(folder: Path, path: Path) -> None:
    target = folder / path.relative_to(ROOT)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(path, target)


def modinfo(module: Path, field: str) -> str:
    """A field of a module, as modinfo prints it: this machine may lack that."""
    found = re.findall(rf"\0{field}=([^\0]*)\0".encode(), b"\0" + module.read_bytes())
    assert len(found) == 1, f"{field}: {found}"
    return bytes(found[0]).decode()


def test_dkms_package_is_installed_and_builds(workshop: Workshop, tmp_path: Path) -> None:
    build, _ = commands(blocks_that_begin("guest", "make guest-dkms")[0])
    done = subprocess.run(build.split(), cwd=ROOT, capture_output=True, text=True, check=True)
    package = ROOT / f"build/virtio-rpmb-dkms_{__version__}_all.deb"
    assert str(package.relative_to(ROOT)) in done.stdout.splitlines()
    copy_folder = tmp_path / "copy"
    copy_folder.mkdir()
    releases = [workshop.headers(version, "amd64").release for version in ("6.12", "7.3")]
    modules = " ".join(f"/lib/modules/{release}/updates/dkms/{MODULE}" for release in releases)
    script = (
        # A system has kernels of its own architecture.
        f"rm -r /lib/modules/*-arm64; dpkg --install /tmp/{package.name}; echo; echo INSTALLED; "
        f"for module in {modules}; do "
        "modinfo -F version $module*; modinfo -F alias $module*; done; "
        "udevadm verify --resolve-names=never /usr/lib/udev/rules.d/60-virtio-rpmb.rules; "
        "echo REMOVED; dpkg --purge virtio-rpmb-dkms; dkms status; "
        "test ! -e /usr/src/virtio-rpmb-*; "
        "echo LEFT $(find /lib/modules -name 'virtio_rpmb.ko*' | wc -l)"
    )
    result = subprocess.run(
        [
            *ISOLATED,
            *("sh", "-c", ON_A_COPY, workshop.system, copy_folder, package, script),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert result.returncode == 0, result.stdout
    assert "Error" not in result.stdout, result.stdout
    installed = result.stdout.partition("INSTALLED\n")[2].partition("REMOVED")[0]
    assert installed.count(f"{__version__}\nvirtio:d0000001Cv*\n") == len(releases), installed
    assert "0 udev rules files have been checked" not in installed
    assert result.stdout.endswith("LEFT 0\n"), result.stdout
