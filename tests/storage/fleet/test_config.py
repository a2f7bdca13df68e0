# SPDX-License-Identifier: Apache-2.0
"""The configuration file: one line for each error, secrets only from private files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.authority import Authority
from vhost_rpmb.errors import UsageError
from vhost_rpmb.storage.fleet.config import load

COMPLETE = """\
endpoints = ["https://etcd-1.example:2379", "https://[::1]", "https://10.0.0.3:2400/"]
prefix = "/site-1/"
ca = "/etc/ca.pem"
certificate = "/etc/host.pem"
certificate-key = "/etc/host.key"
user = "rpmb"
password-file = "/etc/password"
key-file = "/etc/kek"
witness = "/var/lib/witness"
lease = 60
reads = "confirmed"
"""
LEAST = """\
endpoints = ["http://127.0.0.1:2379"]
key-file = "/etc/kek"
witness = "/var/lib/witness"
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "fleet.toml"


def test_complete_file(file: Path) -> None:
    file.write_text(COMPLETE)
    config = load(str(file))
    assert config._asdict() == {
        "path": str(file),
        "endpoints": (("etcd-1.example", 2379), ("::1", 2379), ("10.0.0.3", 2400)),
        "tls": True,
        "prefix": b"/site-1/",
        "ca": "/etc/ca.pem",
        "certificate": "/etc/host.pem",
        "certificate_key": "/etc/host.key",
        "user": "rpmb",
        "password_file": "/etc/password",
        "key_file": "/etc/kek",
        "witness": "/var/lib/witness",
        "lease_seconds": 60,
        "confirmed_reads": True,
    }


def test_defaults(file: Path) -> None:
    file.write_text(LEAST)
    config = load(str(file))
    assert (config.tls, config.prefix, config.lease_seconds) == (False, b"/vhost-rpmb/1/", 15)
    assert (config.ca, config.certificate, config.user) == (None, None, None)
    assert config.confirmed_reads is False


@pytest.mark.parametrize(
    ("replaced", "by", "message"),
    [
        ("endpoints = [", "endpoints [", "expected TOML, found: "),
        ('endpoints = ["https', '# ["https', "endpoints: expected a list, found nothing"),
        ('"https://etcd-1.example:2379"', "7", "endpoints: expected URLs such as .*, found 7"),
        ("https://etcd-1.example:2379", "etcd:2379", "endpoints: .*, found 'etcd:2379'"),
        ("https://etcd-1.example:2379", "https://a:99999", "endpoints: .*'https://a:99999'"),
        ("https://etcd-1.example:2379", "https://u@a", "endpoints: .*'https://u@a'"),
        ("https://[::1]", "http://[::1]", "endpoints: .* same scheme .*, found http and https"),
        ('"/site-1/"', '"site-1"', "prefix: expected ASCII text .*, found 'site-1'"),
        ('"/site-1/"', "1", "prefix: expected text, found 1"),
        ('"/etc/ca.pem"', '"ca.pem"', "ca: expected an absolute path, found 'ca.pem'"),
        ('"/etc/kek"', '"credential:kek"', "key-file: expected CREDENTIALS_DIRECTORY .* none"),
        ("key-file", "key_file", "key-file: expected text, found nothing"),
        ("witness", "wittness", "witness: expected text, found nothing"),
        ("certificate-key", "#", "certificate-key: expected a value beside certificate, found"),
        ("password-file", "#", "password-file: expected a value beside user, found none"),
        ("user =", "#", "user: expected a value beside password-file, found none"),
        ("ca =", "#", "ca: expected a value with https endpoints, found none"),
        ("lease = 60", "lease = 4", "lease: expected 5 to 3600 seconds, found 4"),
        ("lease = 60", "lease = 3601", "lease: expected 5 to 3600 seconds, found 3601"),
        ("lease = 60", "lease = true", "lease: expected a number, found True"),
        ('"confirmed"', '"fast"', "reads: expected 'lease' or 'confirmed', found 'fast'"),
        ('"confirmed"', "true", "reads: expected text, found True"),
        ("lease = 60", "leese = 60", "leese: expected a known field, found an unknown one"),
        ("https://", "http://", "ca: expected it with https endpoints only, found http"),
    ],
)
def test_each_error_is_one_line(
    file: Path, monkeypatch: pytest.MonkeyPatch, replaced: str, by: str, message: str
) -> None:
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    assert replaced in COMPLETE
    file.write_text(COMPLETE.replace(replaced, by))
    with pytest.raises(UsageError, match=f"^{file}: {message}") as found:
        load(str(file))
    assert "\n" not in str(found.value)


def test_missing_file(file: Path) -> None:
    with pytest.raises(UsageError, match=r"fleet\.toml: No such file or directory"):
        load(str(file))


def test_key_encryption_key_is_read_from_a_private_file_of_32_bytes(
    file: Path, tmp_path: Path
) -> None:
    key = tmp_path / "kek"
    file.write_text(LEAST.replace("/etc/kek", str(key)))
    config = load(str(file))
    with pytest.raises(UsageError, match=r"key-file: .*/kek: No such file"):
        config.key_encryption_key()
    key.write_bytes(bytes(31))
    key.chmod(0o600)
    with pytest.raises(UsageError, match=f"expected 32 bytes in {key}, found 31: create it with"):
        config.key_encryption_key()
    key.write_bytes(bytes(range(32)))
    assert len(config.key_encryption_key().name) == 16
    key.chmod(0o640)
    with pytest.raises(UsageError, match=f"only its owner can access, found mode 0640 of {key}"):
        config.key_encryption_key()


def test_key_encryption_key_may_be_a_credential(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    file.write_text(LEAST.replace("/etc/kek", "credential:kek"))
    assert load(str(file)).key_file == os.path.join(tmp_path, "kek")


def test_wrong_certificate_is_named(file: Path, tmp_path: Path) -> None:
    password = tmp_path / "password"
    password.touch(0o600)
    text = COMPLETE.replace("etcd-1.example", "127.0.0.1")
    text = text.replace("/etc/password", str(password))
    authority = Authority(tmp_path)
    file.write_text(text.replace("/etc/ca.pem", str(authority.path("ca"))))
    with pytest.raises(UsageError, match=r"certificate: .* /etc/host\.pem and /etc/host\.key"):
        load(str(file)).connect()
    file.write_text(text)
    with pytest.raises(UsageError, match=r"ca: expected certificates in /etc/ca\.pem, found: No"):
        load(str(file)).connect()
