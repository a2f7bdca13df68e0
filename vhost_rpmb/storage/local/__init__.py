# SPDX-License-Identifier: Apache-2.0
"""State in files of this host: raw image, SQLite database, key file (docs/durability.md).

Belongs here: every access to these files. Does not belong here: options, the protocol and the
engines. From top to bottom: `opening` (open, verify, decide), `store` (the running store),
`contents` (the blocks at a start), `database`, `statefile`, `wal`, `image`, `keyfile`, `files`.
"""
