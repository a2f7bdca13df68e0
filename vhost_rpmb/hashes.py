# SPDX-License-Identifier: Apache-2.0
"""SHA-256 of what is in files: by the engine or, in programs without one, by `hashlib`.

The import of `hashlib` and `hmac` takes 0.1 MiB of memory and a twentieth of a daemon's start.
"""

from __future__ import annotations

__all__ = ["Hashes", "equal", "hmac_sha256", "sha256", "use"]


class Hashes:
    """The functions of this module, by the standard library."""

    @staticmethod
    def sha256(data: bytes) -> bytes:
        """Return the SHA-256 of data."""
        import hashlib  # imported lazily: an engine does without

        return hashlib.sha256(data).digest()

    @staticmethod
    def hmac_sha256(key: bytes, data: bytes) -> bytes:
        """Return the HMAC-SHA256 of data."""
        import hmac  # imported lazily: likewise

        return hmac.digest(key, data, "sha256")

    @staticmethod
    def equal(one: bytes, other: bytes) -> bool:
        """Compare two values in a time that does not depend on their content."""
        import hmac  # imported lazily: likewise

        return hmac.compare_digest(one, other)


_kind: type[Hashes] = Hashes


def use(kind: type[Hashes]) -> None:
    """Compute by the class of an engine from now on."""
    global _kind  # noqa: PLW0603
    _kind = kind


def sha256(data: bytes) -> bytes:
    """Return the SHA-256 of data."""
    return _kind.sha256(data)


def hmac_sha256(key: bytes, data: bytes) -> bytes:
    """Return the HMAC-SHA256 of data."""
    return _kind.hmac_sha256(key, data)


def equal(one: bytes, other: bytes) -> bool:
    """Compare two values in a time that does not depend on their content."""
    return _kind.equal(one, other)
