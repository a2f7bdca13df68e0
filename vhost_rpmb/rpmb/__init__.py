# SPDX-License-Identifier: Apache-2.0
"""The rules of the RPMB device in plain Python, shared by engines, driver, client and tests.

Belongs here: numbers and limits, frames with their MAC, names of requests and results. Does not:
rings, sockets and files.
"""
