# SPDX-License-Identifier: Apache-2.0
"""Names of requests, responses and results, and the text of a frame for the log."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vhost_rpmb.rpmb import spec

if TYPE_CHECKING:
    from vhost_rpmb.rpmb.frame import Frame

__all__ = [
    "count_frames",
    "describe_answer",
    "describe_request",
    "request_name",
    "response_name",
    "result_name",
]


def _names(prefix: str) -> dict[int, str]:
    return {
        value: name.removeprefix(prefix)
        for name, value in vars(spec).items()
        if name.startswith(prefix)
    }


_REQUESTS = _names("VIRTIO_RPMB_REQ_")
_RESPONSES = _names("VIRTIO_RPMB_RESP_")
_RESULTS = _names("VIRTIO_RPMB_RES_")


def request_name(req_resp: int) -> str:
    """Return the specification's name of a request type, or its number."""
    return _REQUESTS.get(req_resp, f"0x{req_resp:04x}")


def response_name(req_resp: int) -> str:
    """Return the specification's name of a response type, or its number."""
    return _RESPONSES.get(req_resp, f"0x{req_resp:04x}")


def result_name(result: int) -> str:
    """Return the specification's name of a result, the expired bit included ("A, B" with both)."""
    status = result & ~spec.VIRTIO_RPMB_RES_WRITE_COUNTER_EXPIRED
    expired = result & spec.VIRTIO_RPMB_RES_WRITE_COUNTER_EXPIRED
    names = [_RESULTS.get(status, "unknown result")] if status or not expired else []
    if expired:
        names.append(_RESULTS[expired])
    return ", ".join(names)


def count_frames(count: int) -> str:
    """Return a number of frames with its noun."""
    return f"{count} {'frame' if count == 1 else 'frames'}"


def describe_request(frame: Frame, result: int) -> str:
    """Return the text of a request and its result, without key, data and MAC.

    The nonce is included only where the type gives it a meaning, because a malformed frame may have
    a key in any place. The MAC may be a key too, of another device or of a later time; the result
    tells whether it was right.
    """
    nonce = frame.req_resp in (
        spec.VIRTIO_RPMB_REQ_GET_WRITE_COUNTER,
        spec.VIRTIO_RPMB_REQ_DATA_READ,
    )
    return (
        f"request {request_name(frame.req_resp)}: "
        f"{_fields(frame, nonce=nonce, mac=False)}: {result_name(result)}"
    )


def describe_answer(first: Frame, count: int) -> str:
    """Return the text of an answer of ``count`` frames by its first one, without its data."""
    return (
        f"answer {response_name(first.req_resp)}: "
        f"{_fields(first, nonce=any(first.nonce), mac=count == 1)}: "
        f"{result_name(first.result)}, {count_frames(count)}"
    )


def _fields(frame: Frame, *, nonce: bool, mac: bool) -> str:
    return (
        f"address {frame.address}, block count {frame.block_count}, "
        f"write counter {frame.write_counter}"
        f"{f', nonce {frame.nonce.hex()}' if nonce else ''}"
        f"{f', MAC {frame.key_mac.hex()}' if mac else ''}"
    )
