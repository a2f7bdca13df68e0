# SPDX-License-Identifier: Apache-2.0
"""What the end-to-end tests take long to make, made once and cached.

Folders ``<name>-<hash>`` below ``${XDG_CACHE_HOME:-~/.cache}/vhost-rpmb/``; the hash is over what a
folder is made of. Each is made under another name, gets the marker ``.complete`` last and is
renamed then, so what has the marker is whole. What was not used for two weeks is removed. Most are
a Debian made by debootstrap, in which programs run that the machine does not have.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

SUITE = "trixie"
BACKPORTS = "trixie-backports"
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
# For where root is the only user.
ONE_USER = 'APT::Sandbox::User "root";\n'
# To be raised when the steps of make_debian change and the values above do not.
RECIPE_VERSION = 1
# What a Debian here is made of, but for its packages.
RECIPE = (SUITE, BACKPORTS, DPKG_CONFIG, APT_CONFIG, RECIPE_VERSION)

# The settings of this machine's apt that the kit's apt needs too, to reach the same mirror.
INHERITED_APT_SETTINGS = (
    "Acquire::http::Proxy",
    "Acquire::https::Proxy",
    "Acquire::Check-Valid-Until",
    "Acquire::Check-Date",
)

ISOLATED = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
# Programs for aarch64 are run by QEMU's user emulation. The kernel is told so in the table of a
# user namespace, so the machine's table stays as it is (docs/decisions/0016-aarch64.md).
EMULATED = (*ISOLATED, "--user", "--map-root-user")
INTERPRETER = (
    r":emulated:M::\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00:"
    r"\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff:"
    "/usr/bin/qemu-aarch64:F"
)
REGISTER = (
    'mount -t binfmt_misc none "$0/proc/sys/fs/binfmt_misc" && chroot "$0" '
    f"sh -c 'printf %s \"$1\" >/proc/sys/fs/binfmt_misc/register' sh '{INTERPRETER}'"
)
MOUNT_PROC = 'mount -t proc proc "$0/proc"'
KEYRINGS = (  # of Debian 12, and of later ones
    Path("/usr/share/keyrings/debian-archive-keyring.gpg"),
    Path("/usr/share/keyrings/debian-archive-keyring.pgp"),
)
MARKER = ".complete"  # its time is that of the latest use
UNUSED = 14 * 24 * 3600  # seconds


class KitUnavailable(Exception):
    """What is wanted cannot be made on this machine; the text says why, and what would help."""


Say = Callable[[str], None]


def say_it(text: str) -> None:
    """Print a line now."""
    print(text, flush=True)


def cache_folder() -> Path:
    """The folder of all that is cached; may not exist yet."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "vhost-rpmb"


def cached(
    name: str, ingredients: object, fill: Callable[[Path, Steps], None], say: Say = say_it
) -> Path:
    """The folder `name` made of `ingredients` (whose repr decides): the cached one, or a new one.

    `fill` fills a new one; `say` gets a line for each step done. Raises KitUnavailable where it
    cannot be made, and what `fill` raises.
    """
    cache = cache_folder()
    target = cache / f"{name}-{hashlib.sha256(repr(ingredients).encode()).hexdigest()[:12]}"
    if not _complete(target):
        _check_machine()
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache / "lock", say):
            _remove_useless(cache)
            if not _complete(target):
                with _made_whole(target) as folder:
                    fill(folder, Steps(name, cache / "kit.log", say))
    (target / MARKER).touch()
    return target


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
def _locked(path: Path, say: Say) -> Iterator[None]:
    """Hold the cache against other makers; what they made meanwhile is found afterwards."""
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("kit: another process is making one, waiting for that")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _remove_useless(cache: Path) -> None:
    """Remove what was left half made, and what nobody has used for long: sources change."""
    for path in cache.glob("*-*/"):
        if not _complete(path) or time.time() - (path / MARKER).stat().st_mtime > UNUSED:
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


class Steps:
    """Runs the commands that fill a folder; a step is a line with its time, output is logged."""

    def __init__(self, name: str, log: Path, say: Say) -> None:
        self._name = name
        self._log = log
        self._say = say

    @contextmanager
    def step(self, what: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self._say(f"kit {self._name}: {what} ({time.monotonic() - start:.1f} s)")

    def run(
        self,
        *command: str | Path,
        env: dict[str, str] | None = None,
        isolated: tuple[str, ...] = ISOLATED,
    ) -> None:
        """Run a command in namespaces of its own: its mounts and processes end with it."""
        with self._log.open("ab") as log:
            result = subprocess.run(
                [*isolated, *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "LC_ALL": "C", **(env or {})},
            )
        if result.returncode != 0:
            tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-15:])
            raise subprocess.CalledProcessError(result.returncode, command, tail)

    def run_inside(self, system: Path, *command: str | Path, emulated: bool = False) -> None:
        """Run a command inside the system folder, with /proc there.

        With `emulated`, programs for aarch64 can be run, and root is the only user.
        """
        script = [MOUNT_PROC, *([REGISTER] if emulated else []), 'exec chroot "$0" "$@"']
        self.run(
            *("sh", "-c", " && ".join(script), system, *command),
            env={
                "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
                "DEBIAN_FRONTEND": "noninteractive",
                "INITRD": "No",  # no initramfs of Debian's own
            },
            isolated=EMULATED if emulated else ISOLATED,
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


def unpack_packages(folder: Path, packages: tuple[str, ...], steps: Steps) -> None:
    """Unpack packages into a folder without installing them, for programs that need libc only."""
    mirror, proxies = _mirror(), _proxies()
    _check_mirror(mirror, proxies)
    keyring = next((path for path in KEYRINGS if path.exists()), None)
    if keyring is None:
        raise KitUnavailable("no Debian keys: apt-get install debian-archive-keyring")
    apt = folder / "apt"
    for name in ("lists/partial", "archives/partial"):
        (apt / name).mkdir(parents=True)
    (apt / "sources.list").write_text(f"deb [signed-by={keyring}] {mirror} {SUITE} main\n")
    (apt / "apt.conf").write_text(
        f"""\
Dir::Etc::SourceList "{apt}/sources.list";
Dir::Etc::SourceParts "/dev/null";
Dir::State::Lists "{apt}/lists";
Dir::State::Status "/dev/null";
Dir::Cache "{apt}";
"""
        + APT_CONFIG
        + ONE_USER
    )
    environment = {"APT_CONFIG": str(apt / "apt.conf")}
    try:
        with steps.step("download"):
            steps.run("apt-get", "-q", "update", env=environment)
            download = 'cd "$0" && exec apt-get -q download "$@"'
            steps.run("sh", "-c", download, apt / "archives", *packages, env=environment)
        with steps.step("unpacking"):
            for package in sorted((apt / "archives").glob("*.deb")):
                steps.run("dpkg", "--extract", package, folder)
    except subprocess.CalledProcessError as error:
        raise KitUnavailable(
            f"unpacking Debian's packages failed, the log ends with:\n{error.output}"
        ) from error
    shutil.rmtree(apt)


def check_emulation() -> None:
    """Raise KitUnavailable unless the kernel can run programs for aarch64 as it is done here."""
    release = platform.release()
    if tuple(int(number) for number in re.findall(r"\d+", release)[:2]) < (6, 7):
        raise KitUnavailable(
            "programs for aarch64 need Linux 6.7 or later, whose user namespaces have a binfmt_misc"
            f" of their own; this is {release}"
        )


def make_debian(
    folder: Path,
    packages: tuple[str, ...],
    steps: Steps,
    foreign: str | None = None,
    release: str = BACKPORTS,
    emulated: tuple[str, ...] = (),
) -> None:
    """Make a Debian with these packages, also ones of a `foreign` architecture.

    They are of `release` where that has them. `emulated` are packages that come last, because
    installing them runs programs for aarch64; the others include qemu-user then. Raises
    KitUnavailable, with the log's end, when it fails.
    """
    if emulated:
        check_emulation()
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
        with steps.step("its packages"):
            (folder / "etc/dpkg/dpkg.cfg.d/kit").write_text(DPKG_CONFIG)
            apt_config = APT_CONFIG + (ONE_USER if emulated else "")
            (folder / "etc/apt/apt.conf.d/kit").write_text(apt_config + _inherited_apt_config())
            (folder / "etc/apt/sources.list").write_text(
                f"deb {mirror} {SUITE} main\ndeb {mirror} {BACKPORTS} main\n"
            )
            if foreign is not None:
                steps.run_inside(folder, "dpkg", "--add-architecture", foreign)
            steps.run_inside(folder, "apt-get", "update")
            steps.run_inside(folder, "apt-get", "-y", "-t", release, "install", *packages)
            if emulated:
                install = ("apt-get", "-y", "-t", release, "install", *emulated)
                steps.run_inside(folder, *install, emulated=True)
            steps.run_inside(folder, "apt-get", "clean")
            shutil.rmtree(folder / "var/lib/apt/lists")
    except subprocess.CalledProcessError as error:
        hint = ""
        if "unknown key" in error.output:
            hint = "\nThe installed keys are too old: apt-get install debian-archive-keyring"
        raise KitUnavailable(
            f"making the kit's Debian failed, the log ends with:\n{error.output}{hint}"
        ) from error
