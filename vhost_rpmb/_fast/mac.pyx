# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, auto_pickle=False
"""The twin of vhost_rpmb._pure.mac, where the docstrings are; on libcrypto."""

cimport cython
from libc.stddef cimport size_t

from cpython.bytes cimport PyBytes_AS_STRING

from vhost_rpmb._fast.constants cimport FRAME_SIZE, KEY_SIZE, MAC_SIZE

__all__ = ["Authenticator", "Hashes"]

cdef extern from "<openssl/evp.h>" nogil:
    EVP_MAC *EVP_MAC_fetch(void *, const char *, const char *)
    void EVP_MAC_free(EVP_MAC *)
    EVP_MAC_CTX *EVP_MAC_CTX_new(EVP_MAC *)
    void EVP_MAC_CTX_free(EVP_MAC_CTX *)

    ctypedef struct EVP_MD:
        pass
    EVP_MD *EVP_MD_fetch(void *, const char *, const char *)
    int EVP_Digest(const void *, size_t, unsigned char *, unsigned *, const EVP_MD *, void *)

cdef extern from "<openssl/hmac.h>" nogil:
    unsigned char *HMAC(
        const EVP_MD *, const void *, int, const unsigned char *, size_t, unsigned char *,
        unsigned *,
    )

cdef extern from "<openssl/params.h>" nogil:
    OSSL_PARAM OSSL_PARAM_construct_utf8_string(const char *, char *, size_t)
    OSSL_PARAM OSSL_PARAM_construct_end()

cdef extern from "<openssl/crypto.h>" nogil:
    int CRYPTO_memcmp(const void *, const void *, size_t)


@cython.final
cdef class Authenticator:
    def __cinit__(self, key=None):
        cdef EVP_MAC *method = EVP_MAC_fetch(NULL, b"HMAC", NULL)
        if method == NULL:
            raise RuntimeError("libcrypto has no HMAC")
        self._context = EVP_MAC_CTX_new(method)
        EVP_MAC_free(method)
        if self._context == NULL:
            raise MemoryError()

    def __init__(self, bytes key):
        if len(key) != KEY_SIZE:
            raise ValueError(f"a key has {KEY_SIZE} bytes, not {len(key)}")
        self.set_key(<const unsigned char *>PyBytes_AS_STRING(key))

    def __dealloc__(self):
        EVP_MAC_CTX_free(self._context)

    def mac(self, frames):
        cdef unsigned char value[MAC_SIZE]
        self._feed(frames)
        self.finish(value)
        return <bytes>value[:MAC_SIZE]

    def verify(self, frames, bytes mac):
        if len(mac) != MAC_SIZE:
            return False
        self._feed(frames)
        return self.check(<const unsigned char *>PyBytes_AS_STRING(mac))

    cdef int _feed(self, frames) except -1:
        self.begin()
        for frame in frames:
            if len(<bytes?>frame) != FRAME_SIZE:
                raise ValueError(f"a frame has {FRAME_SIZE} bytes, not {len(frame)}")
            self.add(<const unsigned char *>PyBytes_AS_STRING(frame))
        return 0

    cdef int set_key(self, const unsigned char *key) except -1:
        cdef OSSL_PARAM parameters[2]
        parameters[0] = OSSL_PARAM_construct_utf8_string(b"digest", b"SHA256", 0)
        parameters[1] = OSSL_PARAM_construct_end()
        if not EVP_MAC_init(self._context, key, KEY_SIZE, parameters):
            raise RuntimeError("libcrypto cannot compute HMAC-SHA256")
        return 0

    cdef bint check(self, const unsigned char *mac) except -1 nogil:
        """Finish the message and compare its MAC with 32 bytes, in constant time."""
        cdef unsigned char expected[MAC_SIZE]
        self.finish(expected)
        return CRYPTO_memcmp(expected, mac, MAC_SIZE) == 0


cdef int fail() except -1 nogil:
    with gil:
        raise RuntimeError("libcrypto cannot compute HMAC-SHA256")


cdef EVP_MD *_sha256 = NULL  # fetched once, which takes longer than a digest


cdef EVP_MD *_method() except NULL:
    global _sha256
    if _sha256 == NULL:
        _sha256 = EVP_MD_fetch(NULL, b"SHA256", NULL)
        if _sha256 == NULL:
            raise RuntimeError("libcrypto has no SHA-256")
    return _sha256


@cython.final
cdef class Hashes:
    @staticmethod
    def sha256(bytes data not None):
        cdef unsigned char value[MAC_SIZE]
        cdef const unsigned char *start = <const unsigned char *>PyBytes_AS_STRING(data)
        if not EVP_Digest(start, <size_t>len(data), value, NULL, _method(), NULL):
            raise RuntimeError("libcrypto cannot compute SHA-256")
        return <bytes>value[:MAC_SIZE]

    @staticmethod
    def hmac_sha256(bytes key not None, bytes data not None):
        cdef unsigned char value[MAC_SIZE]
        cdef const unsigned char *start = <const unsigned char *>PyBytes_AS_STRING(data)
        cdef const void *secret = PyBytes_AS_STRING(key)
        if HMAC(_method(), secret, <int>len(key), start, <size_t>len(data), value, NULL) == NULL:
            fail()
        return <bytes>value[:MAC_SIZE]

    @staticmethod
    def equal(bytes one not None, bytes other not None):
        if len(one) != len(other):
            return False
        return CRYPTO_memcmp(
            PyBytes_AS_STRING(one), PyBytes_AS_STRING(other), <size_t>len(one)
        ) == 0


cdef Authenticator new_authenticator(const unsigned char *key):
    """Make an Authenticator from 32 bytes without a Python object that holds them."""
    cdef Authenticator authenticator = Authenticator.__new__(Authenticator)
    authenticator.set_key(key)
    return authenticator
