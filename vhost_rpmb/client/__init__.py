# SPDX-License-Identifier: Apache-2.0
"""The program ``vhost-rpmb-client``.

Belongs here: its command line, one module for each verb in `verbs`, its files and streams. Does not
belong here: the protocol and the requests, which `vhost_rpmb.driver` has as a library. The man page
is made from `cli` where only the standard library is installed: nothing is imported here.
"""
