# SPDX-License-Identifier: Apache-2.0
"""Durable state of a device.

Belongs here: the contract of a store (`interface`), the paths, and one folder for each home of the
state. Does not belong here: requests, sockets, guest memory and the sandbox itself.
"""
