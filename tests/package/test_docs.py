# SPDX-License-Identifier: Apache-2.0
"""What the README, the man pages and the guides print, run as it is printed.

Not here: what a guest runs and what attaches one (tests/e2e/test_guides.py), what a running systemd
needs (tests/e2e/test_systemd.py), and what builds and installs (tests/package/test_package.py).
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.documents import (
    GUIDES,
    Block,
    blocks_of_guide,
    blocks_of_man_page,
    blocks_of_readme,
    blocks_that_begin,
    commands,
)
from vhost_rpmb.rpmb import spec

pytestmark = pytest.mark.needs_sources
MAN_PAGES = ("vhost-user-rpmb", "vhost-rpmb-client")
RUN_HERE = ("client", "debugging", "device", "qemu", "quick-start")
RUN_ELSEWHERE = ("fleet", "guest", "migration", "optee", "systemd")
NOT_RUN = (
    "embedding",
    "faults",
    "front-ends",
    "libvirt",
)  # nothing to type, but files, which have tests of their own below
ELSEWHERE = ("qemu-system", "make ", "pip ", "python3 -m venv", "venv/bin/pip", "export PATH=")
# The socket's name is there before the daemon listens; a daemon that has ended fails the script.
CONNECT = 'import socket; socket.socket(socket.AF_UNIX).connect("rpmb.sock")'
WAIT = f"until '{sys.executable}' -c '{CONNECT}' 2> /dev/null; do kill -0 $!; sleep 0.05; done"


def blocks_of(name: str) -> list[Block]:
    if name == "README":
        return blocks_of_readme()
    return blocks_of_man_page(name) if name in MAN_PAGES else blocks_of_guide(name)


def script(blocks: list[Block]) -> str:
    """One script of all blocks; a daemon that a block starts serves what follows it."""
    lines = ["set -eu"]
    for block in blocks:
        if block.language != "sh" or "systemctl" in block.text:
            continue
        for command in commands(block.text):
            if command.startswith(ELSEWHERE):
                continue
            if command.startswith("vhost-user-rpmb "):
                # A person would start the next one only after ending this one.
                lines += ['for job in $(jobs -p); do kill "$job"; done', "wait"]
                # A group that the user of the tests may give the socket to.
                start = command.removesuffix("&").replace("=kvm", f"={os.getegid()}")
                lines += [f"{start} &", WAIT]
            else:
                lines.append(command)
    return "\n".join([*lines, 'for job in $(jobs -p); do kill "$job"; done', "wait"])


def run(program: str, folder: Path) -> None:
    done = subprocess.run(
        ["bash", "-c", program],
        cwd=folder,
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, f"{program}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("name", ["README", *MAN_PAGES, *RUN_HERE])
def test_examples_run_as_printed(name: str, tmp_path: Path) -> None:
    blocks = blocks_of(name)
    program = script(blocks)
    assert "vhost-" in program
    run(program, tmp_path)
    for language, text in blocks:
        assert language in ("sh", "text")
        if language == "text":
            log = (tmp_path / "debug.log").read_text()
            for line in text.splitlines():
                pattern = re.sub(r"[0-9a-f]+…", "[0-9a-f]+", re.escape(line))
                assert re.search(f"debug: {pattern}$", log, re.MULTILINE), line


@pytest.mark.parametrize("name", ["README", "vhost-user-rpmb"])
def test_machines_are_started_as_in_the_guide(name: str) -> None:
    """Whose command lines start real ones in tests/e2e/test_guides.py."""
    (by_hand,) = blocks_that_begin("qemu", "qemu-system-x86_64")
    found = [command for _, text in blocks_of(name) for command in commands(text)]
    assert [command for command in found if "qemu" in command] == commands(by_hand)


def test_machine_under_systemd_is_as_in_the_guide() -> None:
    """Whose command lines a running systemd follows in tests/e2e/test_systemd.py."""
    (found,) = (text for _, text in blocks_of_readme() if "systemctl" in text)
    install, enable, *_ = (text for _, text in blocks_of_guide("systemd") if "systemctl" in text)
    assert commands(found) == commands(install) + commands(enable)


def test_key_of_optee_is_derived(tmp_path: Path) -> None:
    """By the definition of HMAC, and with the identity that the guest driver has by default."""
    unique = bytes(range(16))
    (tmp_path / "huk").write_bytes(unique)
    ((_, program),) = (found for found in blocks_of_guide("optee") if found.language == "python")
    (tmp_path / "derive.py").write_text(program)
    (block,) = blocks_that_begin("optee", "vhost-rpmb-client create")
    run(script([Block("sh", block)]), tmp_path)

    def pad(value: int) -> bytes:
        return bytes(byte ^ value for byte in unique.ljust(64, b"\0"))

    inner = hashlib.sha256(pad(0x36) + b"virtio-rp\0b-000\0").digest()
    assert (tmp_path / "optee/rpmb.key").read_bytes() == (
        hashlib.sha256(pad(0x5C) + inner).digest()
    )


def test_every_guide_has_its_test() -> None:
    guides = {path.stem for path in GUIDES.glob("*.md")}
    assert guides == {*RUN_HERE, *RUN_ELSEWHERE, *NOT_RUN}


def test_description_in_the_systemd_guide_matches(tmp_path: Path) -> None:
    (command,) = blocks_that_begin("systemd", "vhost-user-rpmb --print-capabilities")
    run(command, tmp_path)


def test_domain_is_one_of_libvirt(tmp_path: Path) -> None:
    """By libvirt's schema; what it has QEMU do is what the guide to QEMU has it do.

    tests/e2e/test_guides.py starts it.
    """
    ((language, text),) = blocks_of_guide("libvirt")
    assert language == "xml"
    domain = tmp_path / "vm1.xml"
    domain.write_text(text)
    subprocess.run(["virt-xml-validate", str(domain), "domain"], check=True)
    arguments = re.findall("<qemu:arg value='(.*)'/>", text)
    (by_hand,) = blocks_that_begin("qemu", "qemu-system-x86_64")
    by_hand = by_hand.replace("path=rpmb.sock", "path=/run/vhost-user-rpmb/vm1.sock")
    assert arguments[::2] == ["-chardev", "-device"]
    # libvirt counts up the slots of the devices that it knows.
    assert arguments[-1].endswith(slot := ",bus=pcie.0,addr=0x10")
    assert " ".join(arguments).removesuffix(slot) in commands(by_hand)[0]


def run_suite(folder: Path) -> str:
    """Run the test suite in a folder, which must pass; return what pytest said."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--rootdir", str(folder)]
    done = subprocess.run(
        [*command, str(folder)], cwd=folder, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_fixture_serves_a_test_suite(tmp_path: Path) -> None:
    (_, conftest), (_, tests) = blocks_of_guide("embedding")
    (tmp_path / "conftest.py").write_text(conftest)
    (tmp_path / "test_rollback.py").write_text(tests)
    assert "2 passed" in run_suite(tmp_path)


def test_script_of_faults_acts_as_described(tmp_path: Path) -> None:
    """Each command of the guide succeeds, or fails where it is printed with an exclamation mark."""
    blocks = blocks_of_guide("faults")
    (toml,) = (text for language, text in blocks if language == "toml")
    (tmp_path / "faults.toml").write_text(toml)
    # The exit status of a command after "!" does not end a script.
    program = re.sub(r"(?m)^! (.*)$", r"if \1; then exit 9; fi", script(blocks))
    assert program.count("exit 9") == 2
    end = 'for job in $(jobs -p); do kill "$job"; done'
    run(f"trap '{end}' EXIT\n{program}", tmp_path)


def test_faults_serve_a_test_suite(tmp_path: Path) -> None:
    ((_, tests),) = (block for block in blocks_of_guide("faults") if block.language == "python")
    (tmp_path / "test_faults.py").write_text(tests)
    assert "1 passed" in run_suite(tmp_path)


def test_every_result_has_its_meaning() -> None:
    """The table of the guide to debugging names all results, by their numbers."""
    text = (GUIDES / "debugging.md").read_text()
    rows = dict(re.findall(r"^\| 0x([0-9a-f]{4}) \| `([A-Z_]+)`", text, re.MULTILINE))
    assert {int(number, 16): name for number, name in rows.items()} == {
        value: name.removeprefix("VIRTIO_RPMB_RES_")
        for name, value in vars(spec).items()
        if name.startswith("VIRTIO_RPMB_RES_")
    }
