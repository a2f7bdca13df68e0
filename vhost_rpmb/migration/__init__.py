# SPDX-License-Identifier: Apache-2.0
"""The device on its way to another host: the bytes that travel, who may be active, and the modes.

docs/decisions/0036-device-state.md has the states and the reasons. Does not belong here: the
messages (`vhost_rpmb.vhost_user.transfer`) and the files of the device (`vhost_rpmb.storage`).
"""
