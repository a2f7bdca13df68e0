# SPDX-License-Identifier: Apache-2.0
"""State in a replicated engine that several hosts share; at most one daemon owns a device.

Belongs here: every decision about ownership, commits and the state's form in the engine. Does not
belong here: options, the protocol and the compiled engine. From top to bottom: `opening` (take a
device over, load, verify), `store` (the running store), `ownership`, `administration`, `contents`
(the blocks at a start), `witness`, `requests` (repetition until a definite answer), `layout` (keys
and records), `seal`, `engine` (the contract of a replicated engine). Beside
them, `etcd` is the only one with network code. docs/fleet.md has the rules.
"""
