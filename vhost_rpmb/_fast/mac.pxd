# SPDX-License-Identifier: Apache-2.0
from libc.stddef cimport size_t

from vhost_rpmb._fast.constants cimport FRAME_DATA, FRAME_SIZE, MAC_SIZE


cdef extern from "<openssl/evp.h>" nogil:
    ctypedef struct OSSL_PARAM:
        pass
    ctypedef struct EVP_MAC
    ctypedef struct EVP_MAC_CTX
    int EVP_MAC_init(EVP_MAC_CTX *, const unsigned char *, size_t, const OSSL_PARAM *)
    int EVP_MAC_update(EVP_MAC_CTX *, const unsigned char *, size_t)
    int EVP_MAC_final(EVP_MAC_CTX *, unsigned char *, size_t *, size_t)


cdef int fail() except -1 nogil


cdef class Authenticator:
    cdef EVP_MAC_CTX *_context

    cdef int _feed(self, frames) except -1
    cdef int set_key(self, const unsigned char *key) except -1
    cdef inline int begin(self) except -1 nogil:
        """Begin a message, under the key as it was set."""
        if not EVP_MAC_init(self._context, NULL, 0, NULL):
            fail()
        return 0
    cdef inline int add(self, const unsigned char *frame) except -1 nogil:
        """Add the MAC'd part of one whole frame."""
        if not EVP_MAC_update(self._context, frame + FRAME_DATA, FRAME_SIZE - FRAME_DATA):
            fail()
        return 0
    cdef inline int finish(self, unsigned char *mac) except -1 nogil:
        """Write the 32 bytes of the message's MAC."""
        cdef size_t length = 0
        if not EVP_MAC_final(self._context, mac, &length, MAC_SIZE) or length != MAC_SIZE:
            fail()
        return 0
    cdef bint check(self, const unsigned char *mac) except -1 nogil


cdef Authenticator new_authenticator(const unsigned char *key)
