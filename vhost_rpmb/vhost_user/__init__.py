# SPDX-License-Identifier: Apache-2.0
"""The vhost-user protocol, on the back-end's side.

Belongs here: messages, descriptors that a front-end sends, vrings as the protocol sees them. Does
not belong here: rings in guest memory and requests (the engines), the device and its state, the
process. `interfaces` states what a session is given of those; it imports none of them.
"""
