# SPDX-License-Identifier: Apache-2.0
"""The configuration file of a store on etcd: TOML, checked completely before anything is used.

Secrets are in files of their own, which the configuration names. docs/fleet.md has an example.
"""

from __future__ import annotations

import os
import ssl
import stat
import tomllib
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from vhost_rpmb.errors import UsageError
from vhost_rpmb.storage.fleet.etcd import Endpoint, Etcd, resolve
from vhost_rpmb.storage.fleet.seal import KEY_SIZE, KeyEncryptionKey

__all__ = ["Config", "load"]

_CREDENTIAL = "credential:"  # of systemd: a file in the folder that it names
_CREDENTIALS_VARIABLE = "CREDENTIALS_DIRECTORY"
_DEFAULT_PORT = 2379
_DEFAULT_PREFIX = "/vhost-rpmb/1/"
_DEFAULT_LEASE = 15  # seconds
_LEASES = range(5, 3601)  # seconds
_MAX_SECRET = 4096  # bytes


class Config(NamedTuple):
    """A valid configuration; files are read when it is used."""

    path: str
    endpoints: tuple[tuple[str, int], ...]
    tls: bool
    prefix: bytes
    ca: str | None
    certificate: str | None
    certificate_key: str | None
    user: str | None
    password_file: str | None
    key_file: str
    witness: str
    lease_seconds: int
    confirmed_reads: bool

    def connect(self) -> Etcd:
        """Read certificates and password, resolve names; nothing is sent yet.

        Raises UsageError for a file, StateError for a name.
        """
        password = ""
        if self.password_file is not None:
            raw = self._read("password-file", self.password_file)
            password = raw.decode(errors="replace").rstrip("\n")
        endpoints: list[Endpoint] = [resolve(*each) for each in self.endpoints]
        tls = self._tls() if self.tls else None
        return Etcd(endpoints, tls=tls, user=self.user, password=password)

    def key_encryption_key(self) -> KeyEncryptionKey:
        """Read the key-encryption key. Raises UsageError."""
        raw = self._read("key-file", self.key_file)
        if len(raw) != KEY_SIZE:
            raise UsageError(
                f"{self.path}: key-file: expected {KEY_SIZE} bytes in {self.key_file}, found"
                f" {len(raw)}: create it with head -c {KEY_SIZE} /dev/urandom"
            )
        return KeyEncryptionKey(raw)

    def _tls(self) -> ssl.SSLContext:
        try:
            context = ssl.create_default_context(cafile=self.ca)
        except OSError as error:
            raise UsageError(
                f"{self.path}: ca: expected certificates in {self.ca}, found:"
                f" {error.strerror or error}: correct the file"
            ) from error
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if self.certificate is not None:
            try:
                context.load_cert_chain(self.certificate, self.certificate_key)
            except OSError as error:
                raise UsageError(
                    f"{self.path}: certificate: expected a certificate with its key in"
                    f" {self.certificate} and {self.certificate_key}, found:"
                    f" {error.strerror or error}: correct the files"
                ) from error
        return context

    def _read(self, name: str, path: str) -> bytes:
        """Read a secret, which only the daemon's user may be able to read."""
        try:
            with open(path, "rb") as file:
                mode = os.fstat(file.fileno()).st_mode
                raw = file.read(_MAX_SECRET + 1)
        except OSError as error:
            raise UsageError(f"{self.path}: {name}: {path}: {error.strerror}") from error
        credentials = os.environ.get(_CREDENTIALS_VARIABLE)
        if credentials is not None and os.path.dirname(path) == credentials:
            return raw  # systemd protects it, with an access list that looks like rights of a group
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise UsageError(
                f"{self.path}: {name}: expected a file that only its owner can access, found mode"
                f" {stat.S_IMODE(mode):04o} of {path}: chmod 600 {path}"
            )
        return raw


def load(path: str) -> Config:
    """Read and check a configuration. Raises UsageError, whose one line names file and field."""
    try:
        with open(path, "rb") as file:
            fields = tomllib.load(file)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: expected TOML, found: {error}: correct it") from error
    return _Reader(path, fields).config()


class _Reader:
    """The fields of a file, each taken once; what is left is unknown."""

    def __init__(self, path: str, fields: dict[str, Any]) -> None:
        self._path = path
        self._fields = fields

    def config(self) -> Config:
        urls = self._take("endpoints", list, None)
        endpoints = tuple(self._endpoint(url) for url in urls)
        if not endpoints:
            raise self._error("endpoints", "at least one URL", "none")
        schemes = {scheme for scheme, _, _ in endpoints}
        if len(schemes) > 1:
            raise self._error("endpoints", "the same scheme in all URLs", "http and https")
        tls = schemes == {"https"}
        config = Config(
            self._path,
            tuple((host, port) for _, host, port in endpoints),
            tls,
            self._prefix(),
            self._file("ca"),
            self._file("certificate"),
            self._file("certificate-key"),
            self._take("user", str, ""),
            self._file("password-file"),
            self._file("key-file", required=True) or "",
            self._file("witness", required=True) or "",
            self._lease(),
            self._choice("reads", ("lease", "confirmed")) == "confirmed",
        )
        if self._fields:
            name = min(self._fields)
            raise self._error(name, "a known field", "an unknown one")
        self._check_together(config)
        return config._replace(user=config.user or None)

    def _check_together(self, config: Config) -> None:
        pairs = (
            ("certificate", config.certificate, "certificate-key", config.certificate_key),
            ("user", config.user, "password-file", config.password_file),
        )
        for one, first, other, second in pairs:
            if bool(first) != bool(second):
                present, missing = (one, other) if first else (other, one)
                raise self._error(missing, f"a value beside {present}", "none")
        if config.tls and not config.ca:
            # Those of the system may be files that a sandboxed process cannot read any more.
            raise self._error("ca", "a value with https endpoints", "none")
        if not config.tls:
            for name, value in (
                ("ca", config.ca),
                ("certificate", config.certificate),
                ("user", config.user),
            ):
                if value:
                    raise self._error(name, "it with https endpoints only", "http endpoints")

    def _error(self, name: str, expected: str, found: str) -> UsageError:
        return UsageError(f"{self._path}: {name}: expected {expected}, found {found}: correct it")

    def _take(self, name: str, kind: type, default: object) -> Any:
        value = self._fields.pop(name, default)
        if value is None:
            raise self._error(name, _KINDS[kind], "nothing")
        if type(value) is not kind:
            raise self._error(name, _KINDS[kind], repr(value))
        return value

    def _endpoint(self, url: object) -> tuple[str, str, int]:
        expected = "URLs such as https://etcd-1.example:2379"
        try:
            parts = urlsplit(url if isinstance(url, str) else "")
            port = parts.port or _DEFAULT_PORT
        except ValueError as error:
            raise self._error("endpoints", expected, repr(url)) from error
        plain = not (parts.path.strip("/") or parts.query or parts.fragment or parts.username)
        if parts.scheme not in ("http", "https") or not parts.hostname or not plain:
            raise self._error("endpoints", expected, repr(url))
        return parts.scheme, parts.hostname, port

    def _prefix(self) -> bytes:
        prefix: str = self._take("prefix", str, _DEFAULT_PREFIX)
        if not (prefix.startswith("/") and prefix.endswith("/") and prefix.isascii()):
            raise self._error("prefix", "ASCII text that begins and ends with /", repr(prefix))
        return prefix.encode()

    def _lease(self) -> int:
        lease: int = self._take("lease", int, _DEFAULT_LEASE)
        if lease not in _LEASES:
            expected = f"{_LEASES[0]} to {_LEASES[-1]} seconds"
            raise self._error("lease", expected, str(lease))
        return lease

    def _choice(self, name: str, choices: tuple[str, ...]) -> str:
        """Return one of the words, the first one if there is no field."""
        word: str = self._take(name, str, choices[0])
        if word not in choices:
            raise self._error(name, " or ".join(map(repr, choices)), repr(word))
        return word

    def _file(self, name: str, *, required: bool = False) -> str | None:
        """Return an absolute path, or that of a systemd credential."""
        path: str = self._take(name, str, None if required else "")
        if not path and not required:
            return None
        if path.startswith(_CREDENTIAL):
            folder = os.environ.get(_CREDENTIALS_VARIABLE)
            if folder is None:
                raise self._error(name, f"{_CREDENTIALS_VARIABLE} in the environment", "none")
            return os.path.join(folder, path.removeprefix(_CREDENTIAL))
        if not os.path.isabs(path) or "\0" in path:
            raise self._error(name, "an absolute path", repr(path))
        return path


_KINDS: dict[type, str] = {str: "text", int: "a number", list: "a list"}
