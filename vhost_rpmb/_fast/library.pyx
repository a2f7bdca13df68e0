# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, auto_pickle=False
"""The twin of vhost_rpmb._pure.library, where the docstrings are."""

cimport cython
from libc.errno cimport errno

from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_AS_STRING

__all__ = ["Library"]

cdef extern from "<dlfcn.h>" nogil:
    int RTLD_NOW
    void *dlopen(const char *, int)
    void *dlsym(void *, const char *)
    char *dlerror()

cdef enum:
    MAX_ARGUMENTS = 7

ctypedef long (*Function)(long, long, long, long, long, long, long) noexcept nogil


@cython.final
cdef class Library:
    cdef void *_handle

    def __cinit__(self, name=None):
        cdef bytes path = b"" if name is None else name.encode()
        self._handle = dlopen(NULL if name is None else PyBytes_AS_STRING(path), RTLD_NOW)
        if self._handle == NULL:
            raise OSError((<bytes>dlerror()).decode())

    def __init__(self, name=None):
        pass

    def call(self, str function, *arguments):
        cdef long values[MAX_ARGUMENTS]
        cdef Py_buffer views[MAX_ARGUMENTS]
        cdef Py_ssize_t held = 0, index
        cdef long result
        cdef int number
        cdef void *symbol = dlsym(self._handle, function.encode())
        if symbol == NULL:
            raise OSError((<bytes>dlerror()).decode())
        if len(arguments) > MAX_ARGUMENTS:
            raise ValueError(f"expected at most {MAX_ARGUMENTS} arguments")
        try:
            for index in range(MAX_ARGUMENTS):
                argument = arguments[index] if index < len(arguments) else None
                if argument is None:
                    values[index] = 0
                elif isinstance(argument, int):
                    values[index] = argument
                else:
                    PyObject_GetBuffer(argument, &views[held], PyBUF_SIMPLE)
                    values[index] = <long>views[held].buf
                    held += 1
            with nogil:
                result = (<Function>symbol)(
                    values[0], values[1], values[2], values[3], values[4], values[5], values[6]
                )
                number = errno
        finally:
            for index in range(held):
                PyBuffer_Release(&views[index])
        return result, number

    @staticmethod
    def address(memory):
        cdef Py_buffer view
        PyObject_GetBuffer(memory, &view, PyBUF_SIMPLE)
        cdef size_t start = <size_t>view.buf
        PyBuffer_Release(&view)
        return start
