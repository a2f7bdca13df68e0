# SPDX-License-Identifier: Apache-2.0
"""Durable state of a device.

Belongs here: the interface that the device and the daemon use, the paths, and one folder a home of
the state. Does not: requests, sockets and guest memory.
"""
