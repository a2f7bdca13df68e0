# SPDX-License-Identifier: Apache-2.0
"""Faults on request, for developers of firmware: a script of rules, and the device that obeys it.

Used only with --inject; a device without it has no part of this. docs/guides/faults.md has the
rules.
"""
