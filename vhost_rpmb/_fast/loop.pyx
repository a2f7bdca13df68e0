# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, auto_pickle=False
"""Serving one virtqueue until something else needs attention.

Between batches the loop watches the available ring for a bounded time before it sleeps: that takes
the two wake-ups out of a ping-pong. The bound adapts as KVM's halt polling does: it grows when a
sleep turned out shorter than the watch would have been allowed to be, and goes back to nothing when
it was longer. So an idle queue costs nothing.
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
    MAX_AWAY = 1000000  # ns of watching without a look at the other descriptors
    FIRST_WATCH = 8000  # ns that a first watch takes; then they double
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
    """Serves the virtqueues of ``device``; watches a ring for up to ``poll_us`` microseconds.

    ``epoll`` is where all descriptors that may need attention are registered: kick descriptors
    edge-triggered, others level-triggered. When one of the others is ready, serve() returns. Epoll
    reports an edge once: kicks of other virtqueues that serve() saw are in take_events().
    """

    cdef object _process
    cdef object _epoll
    cdef int _epoll_fd
    cdef int64_t _most  # ns
    cdef int64_t _watch  # ns that the next watch may take
    cdef int64_t _away  # when watching began without a look at the others, 0: just looked
    cdef list _events

    def __init__(self, device, epoll, poll_us):
        self._process = device.process
        self._epoll = epoll
        self._epoll_fd = epoll.fileno()
        self._most = poll_us * 1000
        self._watch = 0
        self._events = []

    def take_events(self):
        """Return the descriptors but ``kick_fd`` whose events the last serve() took from epoll."""
        events = self._events
        self._events = []
        return events

    def serve(self, Virtqueue queue not None, int kick_fd, int call_fd, bint once=False):
        """Process batches and signal ``call_fd`` (-1: none) until something else is to be done.

        Return flags: MORE (call again after serving other events), BROKEN, FAULTS (as a batch
        returns them), UNSIGNALLED, BLOCKED, IDLE. With ``once``, returns after one batch: another
        virtqueue waits for its turn.
        """
        cdef int flags
        cdef int others
        cdef int64_t start = 0
        self._away = 0
        if self._events:
            self._events = []
        while True:
            queue.watched = self._watch > 0
            flags = self._process(queue)
            if flags & NOTIFY:
                flags |= _signal(call_fd)
            if once or flags & (BROKEN | FAULTS | UNSIGNALLED | BLOCKED):
                return self._leave(queue, flags & ~NOTIFY)
            if flags & MORE:
                if self._others_ready(kick_fd, 0) > 0:
                    return self._leave(queue, flags & MORE)
            elif self._spin(queue):
                if _now() - self._away > MAX_AWAY:
                    self._away = 0
                    if self._others_ready(kick_fd, 0) > 0:
                        return self._leave(queue, 0)
            elif not queue.arm():
                if self._most:
                    start = _now()
                others = self._others_ready(kick_fd, SLEEP_MS)
                if self._most:
                    self._adapt(_now() - start)
                self._away = 0
                if others:
                    return self._leave(queue, 0 if others > 0 else IDLE)

    cdef int _leave(self, Virtqueue queue, int flags) noexcept:
        """Make sure that the driver kicks while nobody looks at the ring; complete the flags."""
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
        """Watch the available ring for as long as that may pay; tell whether something came."""
        cdef int64_t start
        if not self._watch:
            return False
        start = _now()
        if not self._away:
            self._away = start
        with nogil:
            while not queue.peek():
                if _now() - start > self._watch:
                    break
                sched_yield()  # the driver may need this processor
            else:
                start = 0
        return start == 0

    cdef void _adapt(self, int64_t slept) noexcept:
        """Learn from a sleep of ``slept`` ns whether a watch would have been enough."""
        if slept <= self._most:
            self._watch = min(max(2 * self._watch, <int64_t>FIRST_WATCH), self._most)
        else:
            self._watch = 0


cdef int64_t _now() noexcept nogil:
    cdef timespec time
    clock_gettime(CLOCK_MONOTONIC, &time)
    return <int64_t>time.tv_sec * 1000000000 + time.tv_nsec


cdef int _signal(int fd) noexcept:
    """Signal an eventfd or a pipe; return 0, UNSIGNALLED or BLOCKED."""
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
