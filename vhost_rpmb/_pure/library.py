# SPDX-License-Identifier: Apache-2.0
"""Calls into shared libraries: programs without an engine and this engine share them."""

from vhost_rpmb.library import Library

__all__ = ["Library"]
