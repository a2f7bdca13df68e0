# SPDX-License-Identifier: Apache-2.0
"""The process of the daemon: everything that is done once for each start.

Belongs here: the socket, signals, the event loop, notifications, the sandbox. Does not belong here:
messages of the protocol (``vhost_user``), requests of a guest (the engines), files of the state
(``storage``), the format of log lines (``log``).
"""
