# SPDX-License-Identifier: Apache-2.0
"""State in files of this host: raw image, SQLite database, key file (docs/durability.md).

Belongs here: all that touches these files. Does not: the protocol and the engines.
"""
