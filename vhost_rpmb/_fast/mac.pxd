# SPDX-License-Identifier: Apache-2.0
from libc.stddef cimport size_t


cdef extern from "<openssl/evp.h>" nogil:
    ctypedef struct EVP_MAC
    ctypedef struct EVP_MAC_CTX


cdef class Authenticator:
    cdef EVP_MAC_CTX *_context

    cdef int _feed(self, frames) except -1
    cdef int set_key(self, const unsigned char *key) except -1
    cdef int begin(self) except -1 nogil
    cdef int add(self, const unsigned char *frame) except -1 nogil
    cdef int finish(self, unsigned char *mac) except -1 nogil
    cdef bint check(self, const unsigned char *mac) except -1 nogil


cdef Authenticator new_authenticator(const unsigned char *key)
