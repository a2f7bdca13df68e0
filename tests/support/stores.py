# SPDX-License-Identifier: Apache-2.0
"""The states of shared memory between the stores of an engine: where a kill can leave it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

_PTRACE_TRACEME, _PTRACE_SINGLESTEP = 0, 9
_ptrace = ctypes.CDLL(None, use_errno=True).ptrace
_ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_ptrace.restype = ctypes.c_long


def trace_me() -> None:
    """Let the parent process step this one."""
    _ptrace(_PTRACE_TRACEME, 0, None, None)


def step(child: int) -> int:
    """Let a stopped child execute one instruction; return its status. Raises OSError."""
    if _ptrace(_PTRACE_SINGLESTEP, child, None, None):
        raise OSError(ctypes.get_errno(), "PTRACE_SINGLESTEP failed")
    return os.waitpid(child, 0)[1]


def stop_at_changes(look: Callable[[], bytes]) -> None:
    """From now on, stop this process when code in Python has changed what `look` returns."""
    last = look()

    def trace(frame: FrameType, _event: str, _argument: Any) -> Any:
        nonlocal last
        frame.f_trace_opcodes = True
        if (found := look()) != last:
            last = found
            signal.raise_signal(signal.SIGSTOP)
        return trace

    sys.settrace(trace)


def states_of(engine: str, action: Callable[[], object], look: Callable[[], bytes]) -> list[bytes]:
    """The states that `look` sees while `action` runs, the first and the last included.

    The memory has to be shared, because the compiled engine runs in a child process.
    """
    return _of_instructions(action, look) if engine == "fast" else _of_opcodes(action, look)


def _of_instructions(action: Callable[[], object], look: Callable[[], bytes]) -> list[bytes]:
    """Of code in C: in a child that is stepped instruction by instruction."""
    child = os.fork()
    if not child:
        try:
            trace_me()
            os.kill(os.getpid(), signal.SIGSTOP)
            action()
        finally:
            os._exit(0)
    states = [look()]
    os.waitpid(child, 0)
    while True:
        status = step(child)
        if not os.WIFSTOPPED(status):
            assert os.waitstatus_to_exitcode(status) == 0
            return states
        assert os.WSTOPSIG(status) == signal.SIGTRAP
        found = look()
        if found != states[-1]:
            states.append(found)


def _of_opcodes(action: Callable[[], object], look: Callable[[], bytes]) -> list[bytes]:
    """Of code in Python: by its trace, opcode by opcode."""
    states = [look()]

    def trace(frame: FrameType, _event: str, _argument: Any) -> Any:
        if "vhost_rpmb" not in frame.f_code.co_filename:
            return None
        frame.f_trace_opcodes = True
        found = look()
        if found != states[-1]:
            states.append(found)
        return trace

    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    finally:
        sys.settrace(previous)
    found = look()
    if found != states[-1]:
        states.append(found)
    return states
