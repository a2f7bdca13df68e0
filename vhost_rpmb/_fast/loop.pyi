# SPDX-License-Identifier: Apache-2.0
import select
from typing import Protocol, final

from vhost_rpmb._fast.virtqueue import Virtqueue

__all__ = ["Loop"]

class _Device(Protocol):
    def process(self, queue: Virtqueue) -> int: ...

@final
class Loop:
    def __init__(self, device: _Device, epoll: select.epoll, poll_us: int) -> None: ...
    def take_events(self) -> list[int]: ...
    def serve(self, queue: Virtqueue, kick_fd: int, call_fd: int, once: bool = False) -> int: ...
