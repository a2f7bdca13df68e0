# SPDX-License-Identifier: Apache-2.0
"""A vhost-user front-end and virtio-rpmb driver as a library: `vhost_rpmb.driver.rpmb.RpmbClient`.

Belongs here: what a VMM and a guest driver do. Does not: the command line of the client.
"""
