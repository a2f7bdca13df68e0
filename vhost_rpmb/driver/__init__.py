# SPDX-License-Identifier: Apache-2.0
"""A vhost-user front-end and virtio-rpmb driver as a library: `vhost_rpmb.driver.rpmb.RpmbClient`.

Belongs here: the roles of a VMM (`frontend`, `memory`) and of a guest's driver (`ring`, `rpmb`),
for tests and tools. Does not belong here: frames (`vhost_rpmb.rpmb`), messages
(`vhost_rpmb.vhost_user.wire`) and the program ``vhost-rpmb-client``.
"""
