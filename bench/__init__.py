# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: the running daemon under a compiled load generator, against measured floors."""
