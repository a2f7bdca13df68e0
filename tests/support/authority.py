# SPDX-License-Identifier: Apache-2.0
"""Certificates for servers and clients on this machine, as strict verification wants them.

That is the default since Python 3.13: key identifiers, the use of the authority's key, and critical
names where there is no subject.
"""

from __future__ import annotations

import datetime
import ipaddress
import ssl
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

# All uses of a key, of which two are allowed.
_SIGNING = x509.KeyUsage(
    digital_signature=False,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    key_cert_sign=True,
    crl_sign=True,
    encipher_only=False,
    decipher_only=False,
)


class Authority:
    """A certificate authority in a folder: NAME.pem and NAME.key for each certificate."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
        self._save("ca", self._key, self._name, None)

    def issue(self, name: str, common_name: str | None = None) -> None:
        parts = (
            [] if common_name is None else [x509.NameAttribute(NameOID.COMMON_NAME, common_name)]
        )
        self._save(name, ec.generate_private_key(ec.SECP256R1()), x509.Name(parts), "localhost")

    def _save(
        self, name: str, key: ec.EllipticCurvePrivateKey, subject: x509.Name, host: str | None
    ) -> None:
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=host is None, path_length=None), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), False
            )
        )
        if host is None:
            builder = builder.add_extension(_SIGNING, critical=True)
        else:
            names = [x509.DNSName(host), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
            builder = builder.add_extension(x509.SubjectAlternativeName(names), not len(subject))
        certificate = builder.sign(self._key, hashes.SHA256())
        self.path(name, "pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        self.path(name, "key").write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )

    def path(self, name: str, kind: str = "pem") -> Path:
        return self._folder / f"{name}.{kind}"

    def context(self, name: str | None) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=self.path("ca"))
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        if name is not None:
            context.load_cert_chain(self.path(name), self.path(name, "key"))
        return context
