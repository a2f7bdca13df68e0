# SPDX-License-Identifier: Apache-2.0
"""A vhost-user front-end and virtio-rpmb driver: VMM and guest in one, for tests and operators.

`vhost_rpmb.driver.rpmb.RpmbClient` is the way in, `vhost_rpmb.driver.errors` what it raises. This
package imports nothing by itself: the man page is made from `cli` without the dependencies.
"""
