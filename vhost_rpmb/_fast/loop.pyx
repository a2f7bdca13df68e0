# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, auto_pickle=False
"""The twin of vhost_rpmb._pure.loop, where the docstrings are; and busy polling.

Between batches the loop polls the available ring for a bounded time before it sleeps, which removes
the two wake-ups from a ping-pong. The bound adapts as KVM's halt polling does: it grows after a
sleep that was shorter than the longest watch, and becomes zero after a longer one. So an idle queue
uses no processor time.
"""

cimport cython
from libc.errno cimport EAGAIN, EINTR, errno
from libc.stdint cimport int64_t, uint64_t
from posix.time cimport CLOCK_MONOTONIC, clock_gettime, timespec
from posix.unistd cimport write

from cpython.exc cimport PyErr_CheckSignals

from vhost_rpmb._fast.constants cimport (
    BLOCKED,
    BROKEN,
    FAULTS,
    IDLE,
    MORE,
    NOTIFY,
    SLEEP_MS,
    UNSIGNALLED,
)
from vhost_rpmb._fast.virtqueue cimport Virtqueue

__all__ = ["Loop"]

cdef enum:
    MAX_UNPOLLED_NS = 1000000  # of watching without epoll
    FIRST_WATCH_NS = 8000  # the bound of a first watch; it doubles from there
    MAX_EVENTS = 8

cdef extern from "<sys/epoll.h>" nogil:
    ctypedef union epoll_data:
        int fd
    cdef struct epoll_event:
        epoll_data data
    int epoll_wait(int, epoll_event *, int, int)

cdef extern from "<poll.h>" nogil:
    enum:
        POLLOUT
        POLLNVAL
    cdef struct pollfd:
        int fd
        short events
        short revents
    int poll(pollfd *, unsigned long, int)

cdef extern from "<sched.h>" nogil:
    int sched_yield()


@cython.final
cdef class Loop:
    cdef object _process
    cdef object _epoll
    cdef int _epoll_fd
    cdef int64_t _max_watch_ns
    cdef int64_t _watch_ns  # the bound of the next watch
    cdef int64_t _unpolled_since  # the start of watching without epoll; 0: epoll was just asked
    cdef list _events

    def __init__(self, device, epoll, poll_us):
        self._process = device.process
        self._epoll = epoll
        self._epoll_fd = epoll.fileno()
        self._max_watch_ns = poll_us * 1000
        self._watch_ns = 0
        self._events = []

    def take_events(self):
        events = self._events
        self._events = []
        return events

    def serve(self, Virtqueue queue not None, int kick_fd, int call_fd, bint once=False):
        cdef int flags
        cdef int others
        cdef int64_t start = 0
        self._unpolled_since = 0
        if self._events:
            self._events = []
        while True:
            queue.watched = self._watch_ns > 0
            flags = self._process(queue)
            if flags & NOTIFY:
                flags |= _signal(call_fd)
            if once or flags & (BROKEN | FAULTS | UNSIGNALLED | BLOCKED):
                return self._leave(queue, flags & ~NOTIFY)
            if flags & MORE:
                if self._others_ready(kick_fd, 0) > 0:
                    return self._leave(queue, flags & MORE)
            elif self._spin(queue):
                if _now() - self._unpolled_since > MAX_UNPOLLED_NS:
                    self._unpolled_since = 0
                    if self._others_ready(kick_fd, 0) > 0:
                        return self._leave(queue, 0)
            elif not queue.arm():
                if self._max_watch_ns:
                    start = _now()
                others = self._others_ready(kick_fd, SLEEP_MS)
                if self._max_watch_ns:
                    self._adapt(_now() - start)
                self._unpolled_since = 0
                if others:
                    return self._leave(queue, 0 if others > 0 else IDLE)

    cdef int _leave(self, Virtqueue queue, int flags) noexcept:
        queue.watched = False
        if not flags & BROKEN and queue.arm():
            flags |= MORE
        return flags

    cdef int _others_ready(self, int kick_fd, int timeout) except -2:
        """Wait for events: 1 if there are others than kicks, -1 if there are none, else 0."""
        cdef epoll_event events[MAX_EVENTS]
        cdef int count
        cdef int index
        cdef int64_t ends = _now() + <int64_t>timeout * 1000000 if timeout else 0
        while True:
            with nogil:
                count = epoll_wait(self._epoll_fd, events, MAX_EVENTS, timeout)
            if count >= 0:
                break
            if errno != EINTR:
                raise OSError(errno, "epoll_wait failed")
            PyErr_CheckSignals()
            if timeout:
                timeout = <int>max((ends - _now() + 999999) // 1000000, 0)
        for index in range(count):
            if events[index].data.fd != kick_fd:
                self._events.append(events[index].data.fd)
        if self._events:
            return 1
        return 0 if count else -1

    cdef bint _spin(self, Virtqueue queue) noexcept:
        """Poll the ring for a bounded time; tell whether there is something to process."""
        cdef int64_t start
        if not self._watch_ns:
            return False
        start = _now()
        if not self._unpolled_since:
            self._unpolled_since = start
        with nogil:
            while not queue.peek():
                if _now() - start > self._watch_ns:
                    break
                sched_yield()  # the driver may need this processor
            else:
                start = 0
        return start == 0

    cdef void _adapt(self, int64_t slept) noexcept:
        """Adapt the bound of the next watch to a sleep of ``slept`` ns."""
        if slept <= self._max_watch_ns:
            self._watch_ns = max(2 * self._watch_ns, <int64_t>FIRST_WATCH_NS)
            self._watch_ns = min(self._watch_ns, self._max_watch_ns)
        else:
            self._watch_ns = 0


cdef int64_t _now() noexcept nogil:
    cdef timespec time
    clock_gettime(CLOCK_MONOTONIC, &time)
    return <int64_t>time.tv_sec * 1000000000 + time.tv_nsec


cdef int _signal(int fd) noexcept:
    """Signal an eventfd; return 0, UNSIGNALLED or BLOCKED."""
    cdef uint64_t event = 1
    cdef pollfd room
    if fd < 0:
        return 0
    room.fd = fd
    room.events = POLLOUT
    room.revents = 0
    if poll(&room, 1, 0) <= 0 or not room.revents & (POLLOUT | POLLNVAL):
        return 0  # full: the signal is there, and the front-end has yet to take it
    if write(fd, &event, sizeof(event)) == sizeof(event) or errno == EAGAIN:
        return 0
    return BLOCKED if errno == EINTR else UNSIGNALLED
