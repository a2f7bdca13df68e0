# SPDX-License-Identifier: Apache-2.0
"""The process of the daemon: once per start.

Belongs here: socket, signals, event loop, log, notifications, sandbox. Does not: messages of the
protocol, requests of a guest, files of the state.
"""
