# SPDX-License-Identifier: Apache-2.0
"""The guest kit: what it takes to boot a Linux guest with an RPMB device, made once and cached.

Two folders below ``${XDG_CACHE_HOME:-~/.cache}/vhost-rpmb/``:

- ``system-<hash>``: a Debian made by debootstrap, with QEMU, a Linux kernel and its headers,
  mmc-utils, busybox and a compiler. The hash is over the recipe below.
- ``guest-<hash>``: the initramfs with the driver module built in there. The hash is over the system
  folder's and this folder's sources.

Either is made under another name, gets the marker ``.complete`` last and is renamed then, so what
has the marker is whole. Run as a program this file makes the kit and prints where it is.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SUITE = "trixie"
BACKPORTS = "trixie-backports"
# The meta-packages: exact versions disappear from mirrors. The cloud kernel is the same source with
# fewer modules, a third of the size.
PACKAGES = (
    "qemu-system-x86",
    "linux-image-cloud-amd64",
    "linux-headers-cloud-amd64",
    "mmc-utils",
    "busybox-static",
    "make",
    "gcc",
    "libc6-dev",
)
DPKG_CONFIG = """\
force-unsafe-io
path-exclude=/usr/share/doc/*
path-exclude=/usr/share/man/*
path-exclude=/usr/share/locale/*
"""
APT_CONFIG = """\
APT::Install-Recommends "false";
Acquire::Languages "none";
"""
# To be raised when the steps of _make_system change and the values above do not.
RECIPE_VERSION = 1

# The settings of this machine's apt that the kit's apt needs too, to reach the same mirror.
INHERITED_APT_SETTINGS = (
    "Acquire::http::Proxy",
    "Acquire::https::Proxy",
    "Acquire::Check-Valid-Until",
    "Acquire::Check-Date",
)

ISOLATED = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
KEYRINGS = (  # of Debian 12, and of later ones
    Path("/usr/share/keyrings/debian-archive-keyring.gpg"),
    Path("/usr/share/keyrings/debian-archive-keyring.pgp"),
)
GUEST_FOLDER = Path(__file__).resolve().parent / "guest"
GUEST_SOURCES = ("Kbuild", "Makefile", "init", "rpmb-send.c", "virtio_rpmb.c")
MARKER = ".complete"


class KitUnavailable(Exception):
    """The kit cannot be made on this machine; the text says why, and what would help."""


@dataclass(frozen=True, slots=True)
class Kit:
    """A whole kit: paths into the cache, and how its QEMU is started."""

    system: Path
    kernel: Path
    initramfs: Path

    @property
    def qemu(self) -> list[str]:
        """The start of a QEMU command line.

        QEMU runs outside the system folder, so that socket paths mean the same to it and to the
        daemon, but on the folder's dynamic loader, libraries and firmware.
        """
        share = self.system / "usr/share"
        return [
            str(self.system / "lib64/ld-linux-x86-64.so.2"),
            "--library-path",
            str(self.system / "usr/lib/x86_64-linux-gnu"),
            str(self.system / "usr/bin/qemu-system-x86_64"),
            "-L",
            str(share / "qemu"),
            "-L",
            str(share / "seabios"),
        ]


def cache_folder() -> Path:
    """The folder where the kit is kept; may not exist yet."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "vhost-rpmb"


def make_kit(say: Callable[[str], None] = lambda text: print(text, flush=True)) -> Kit:
    """Return the cached kit, or make it first; `say` gets one line for each step done.

    Raises KitUnavailable where a kit cannot be made, and RuntimeError when the driver does not
    build.
    """
    cache = cache_folder()
    system = cache / f"system-{_hash_system()}"
    guest = cache / f"guest-{_hash_guest(system)}"
    if not (_complete(system) and _complete(guest)):
        _check_machine()
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache / "lock", say):
            steps = _Steps(cache / "kit.log", say)
            _remove_half_made(cache)
            if not _complete(system):
                with _made_whole(system) as folder:
                    _make_system(folder, steps)
            if not _complete(guest):
                with _made_whole(guest) as folder:
                    _make_guest(system, folder, steps)
    (kernel,) = (system / "boot").glob("vmlinuz-*")
    return Kit(system, kernel, guest / "initramfs")


def _hash_system() -> str:
    recipe = (SUITE, BACKPORTS, PACKAGES, DPKG_CONFIG, APT_CONFIG, RECIPE_VERSION)
    return hashlib.sha256(repr(recipe).encode()).hexdigest()[:12]


def _hash_guest(system: Path) -> str:
    digest = hashlib.sha256(system.name.encode())
    for path in (Path(__file__), *(GUEST_FOLDER / name for name in GUEST_SOURCES)):
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:12]


def _complete(folder: Path) -> bool:
    return (folder / MARKER).exists()


def _check_machine() -> None:
    if platform.machine() != "x86_64":
        raise KitUnavailable(f"the guest kit needs an x86_64 machine, this is {platform.machine()}")
    if os.geteuid() != 0:
        raise KitUnavailable("the guest kit is made with debootstrap, which needs root")
    for program, package in (
        ("debootstrap", "debootstrap"),
        ("apt-config", "apt"),
        ("unshare", "util-linux"),
    ):
        if shutil.which(program) is None:
            raise KitUnavailable(f"{program} is not installed: apt-get install {package}")


@contextmanager
def _locked(path: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the cache against other makers; what they made meanwhile is found afterwards."""
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("guest kit: another process is making it, waiting for that")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _remove_half_made(cache: Path) -> None:
    for path in cache.glob("making-*"):
        shutil.rmtree(path)
    for path in (*cache.glob("system-*"), *cache.glob("guest-*")):
        if not _complete(path):
            shutil.rmtree(path)


@contextmanager
def _made_whole(target: Path) -> Iterator[Path]:
    """A folder to be filled, which becomes `target` when the body ends well."""
    folder = Path(tempfile.mkdtemp(prefix=f"making-{target.name}-", dir=target.parent))
    folder.chmod(0o755)
    try:
        yield folder
        os.sync()
        (folder / MARKER).touch()
        folder.rename(target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


class _Steps:
    """Runs the kit's commands; each step is a line with its time, all output goes to the log."""

    def __init__(self, log: Path, say: Callable[[str], None]) -> None:
        self._log = log
        self._say = say

    @contextmanager
    def step(self, what: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self._say(f"guest kit: {what} ({time.monotonic() - start:.1f} s)")

    def run(self, *command: str | Path, env: dict[str, str] | None = None) -> None:
        """Run a command in namespaces of its own: its mounts and processes end with it."""
        with self._log.open("ab") as log:
            result = subprocess.run(
                [*ISOLATED, *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "LC_ALL": "C", **(env or {})},
            )
        if result.returncode != 0:
            tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-15:])
            raise subprocess.CalledProcessError(result.returncode, command, tail)

    def run_inside(self, system: Path, *command: str | Path) -> None:
        """Run a command inside the system folder, with /proc there."""
        script = 'mount -t proc proc "$0/proc" && exec chroot "$0" "$@"'
        self.run(
            *("sh", "-c", script, system, *command),
            env={
                "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
                "DEBIAN_FRONTEND": "noninteractive",
                "INITRD": "No",  # no initramfs of Debian's own
            },
        )


def _apt(*command: str) -> list[str]:
    """The lines that one of this machine's apt programs prints."""
    return subprocess.run(command, capture_output=True, text=True).stdout.splitlines()


def _mirror() -> str:
    """The Debian mirror that this machine's apt uses."""
    fields = "$(ORIGIN) $(LABEL) $(REPO_URI)"
    for line in _apt("apt-get", "indextargets", "--format", fields, "Created-By: Packages"):
        if line.startswith(("Debian Debian http://", "Debian Debian https://")):
            return line.split()[2].rstrip("/")
    raise KitUnavailable("no Debian mirror: apt on this machine knows none")


def _inherited_apt_config() -> str:
    lines = _apt("apt-config", "dump", *INHERITED_APT_SETTINGS)
    return "".join(f"{line}\n" for line in lines if line.startswith(INHERITED_APT_SETTINGS))


def _proxies() -> dict[str, str]:
    """Environment with the proxies of this machine's apt, for programs other than apt."""
    found = {}
    for scheme in ("http", "https"):
        for line in _apt("apt-config", "dump", f"Acquire::{scheme}::Proxy"):
            proxy = line.partition('"')[2].partition('"')[0]
            if line.startswith(f"Acquire::{scheme}::Proxy ") and proxy not in ("", "DIRECT"):
                found[f"{scheme}_proxy"] = proxy
    return found


def _check_mirror(mirror: str, proxies: dict[str, str]) -> None:
    """Fail early, and with the reason, where no Debian mirror can be reached."""
    url = f"{mirror}/dists/{BACKPORTS}/InRelease"
    by_scheme = {name.removesuffix("_proxy"): proxy for name, proxy in proxies.items()}
    handler = urllib.request.ProxyHandler(by_scheme or None)
    try:
        urllib.request.build_opener(handler).open(url, timeout=30).close()
    except (urllib.error.URLError, TimeoutError, OSError) as error:
        reason = getattr(error, "reason", error)
        raise KitUnavailable(f"no Debian mirror: {url} cannot be read ({reason})") from error


def _make_system(folder: Path, steps: _Steps) -> None:
    mirror, proxies = _mirror(), _proxies()
    _check_mirror(mirror, proxies)
    keyring = next((path for path in KEYRINGS if path.exists()), None)
    if keyring is None:
        raise KitUnavailable("no Debian keys: apt-get install debian-archive-keyring")
    try:
        with steps.step("Debian base system"):
            steps.run(
                "debootstrap",
                "--variant=minbase",
                "--force-check-gpg",
                f"--keyring={keyring}",
                *(["--include=ca-certificates"] if mirror.startswith("https:") else []),
                SUITE,
                folder,
                mirror,
                env=proxies,
            )
        with steps.step("QEMU, Linux, mmc-utils, compiler"):
            (folder / "etc/dpkg/dpkg.cfg.d/kit").write_text(DPKG_CONFIG)
            (folder / "etc/apt/apt.conf.d/kit").write_text(APT_CONFIG + _inherited_apt_config())
            (folder / "etc/apt/sources.list").write_text(
                f"deb {mirror} {SUITE} main\ndeb {mirror} {BACKPORTS} main\n"
            )
            steps.run_inside(folder, "apt-get", "update")
            steps.run_inside(folder, "apt-get", "-y", "-t", BACKPORTS, "install", *PACKAGES)
            steps.run_inside(folder, "apt-get", "clean")
            shutil.rmtree(folder / "var/lib/apt/lists")
    except subprocess.CalledProcessError as error:
        hint = ""
        if "unknown key" in error.output:
            hint = "\nThe installed keys are too old: apt-get install debian-archive-keyring"
        raise KitUnavailable(
            f"making the kit's Debian failed, the log ends with:\n{error.output}{hint}"
        ) from error


def _make_guest(system: Path, folder: Path, steps: _Steps) -> None:
    build = Path(tempfile.mkdtemp(prefix="build-", dir=system / "tmp"))
    try:
        with steps.step("guest driver"):
            for name in GUEST_SOURCES:
                shutil.copy(GUEST_FOLDER / name, build)
            inside = Path("/tmp") / build.name
            (headers,) = (system / "lib/modules").glob("*/build")
            kdir = Path("/") / headers.relative_to(system)
            try:
                steps.run_inside(system, "make", "-C", inside, f"KDIR={kdir}", "W=1")
                steps.run_inside(system, "strip", "--strip-debug", inside / "virtio_rpmb.ko")
            except subprocess.CalledProcessError as error:
                raise RuntimeError(
                    f"the guest driver does not build, the log ends with:\n{error.output}"
                ) from error
        with steps.step("initramfs"):
            (folder / "initramfs").write_bytes(_initramfs(system, build))
    finally:
        shutil.rmtree(build)


def _initramfs(system: Path, build: Path) -> bytes:
    archive = _Archive()
    for name in ("bin", "dev", "lib64", "proc", "sys", "tmp", "usr", "usr/bin", "usr/lib"):
        archive.add(name, stat.S_IFDIR | 0o755)
    libraries = "lib/x86_64-linux-gnu"
    archive.add("lib", stat.S_IFLNK | 0o777, b"usr/lib")
    archive.add(f"usr/{libraries}", stat.S_IFDIR | 0o755)
    files = {
        "init": build / "init",
        "virtio_rpmb.ko": build / "virtio_rpmb.ko",
        "usr/bin/rpmb-send": build / "rpmb-send",
        "bin/busybox": system / "bin/busybox",
        "usr/bin/mmc": system / "usr/bin/mmc",
        # What mmc is linked with.
        "lib64/ld-linux-x86-64.so.2": system / "lib64/ld-linux-x86-64.so.2",
        f"usr/{libraries}/libc.so.6": system / libraries / "libc.so.6",
    }
    for name, path in files.items():
        archive.add(name, stat.S_IFREG | 0o755, path.read_bytes())
    return archive.finish()


class _Archive:
    """A cpio archive in the "newc" format, the one that the kernel unpacks (Linux:
    Documentation/driver-api/early-userspace/buffer-format.rst)."""

    def __init__(self) -> None:
        self._content = bytearray()
        self._inode = 0

    def add(self, name: str, mode: int, data: bytes = b"") -> None:
        """One file, folder or symbolic link (its target is the data)."""
        self._inode += 1
        encoded = name.encode() + b"\0"
        # inode, mode, uid, gid, links, mtime, size, device (2), special device (2), name, checksum
        fields = (self._inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(encoded), 0)
        self._content += b"070701" + b"".join(b"%08X" % field for field in fields) + encoded
        self._pad()
        self._content += data
        self._pad()

    def finish(self) -> bytes:
        self.add("TRAILER!!!", 0)
        return bytes(self._content)

    def _pad(self) -> None:
        self._content += bytes(-len(self._content) % 4)


def main() -> int:
    """Make the kit and print where it is."""
    start = time.monotonic()
    try:
        kit = make_kit()
    except KitUnavailable as error:
        print(f"kit.py: no guest kit: {error}", file=sys.stderr)
        return 1
    print(f"guest kit: complete in {cache_folder()} ({time.monotonic() - start:.1f} s)")
    print(f"  kernel     {kit.kernel}\n  initramfs  {kit.initramfs}\n  qemu       {kit.qemu[3]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
